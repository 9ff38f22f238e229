"""Fewer heads: the KV heads that need their whole past keep it (whole or quantized), the others keep a window (RLKV, arXiv 2510.08525).

As text, for `get_plan` and the command line: `rlkv:SCORES@SPARSITY`, `BITS+rlkv:SCORES@SPARSITY`, each with `@SINK+RECENT` behind
it where the window is not 32+128. SCORES is a file, a folder or a hub repository (see HeadScores.from_pretrained), BITS a preset
or a plan file: "rlkv:scores.tsv@0.5", "balanced+rlkv:scores.tsv@0.5@16+64".
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..plan import CachePlan, HeadGroup, Window
from ..scores import HeadScores

MARK = "rlkv:"
SYNTAX = re.compile(r"(?:(?P<bits>.+)\+)?rlkv:(?P<scores>[^@]+)@(?P<sparsity>\d*\.?\d+)(?:@(?P<sink>\d+)\+(?P<recent>\d+))?")
DEFAULT = Window(32, 128)


def rlkv(scores: HeadScores, sparsity: float, window: Window = DEFAULT, name: str | None = None) -> CachePlan:
    """A share `sparsity` of all KV heads windowed, the others whole.

    Args:
        scores: of this model; floor(sparsity * heads) heads with the lowest scores are windowed (tie rule: HeadScores.top).
        sparsity: share of the model's KV heads, 0 to 1. What it saves in bytes depends on the length: see CachePlan.sparsity.
        window: sink and recent tokens of a windowed head; the paper's own is Window(16, 64).
        name: of the plan; None: from the scores' method, the sparsity and the window.
    Raises:
        PlanError: the sparsity is not in [0, 1].
    """
    return compose(CachePlan("", (HeadGroup(),)), scores, sparsity, window, name)


def compose(bits: CachePlan, scores: HeadScores, sparsity: float, window: Window = DEFAULT, name: str | None = None) -> CachePlan:
    """Both methods in one cache: the heads that `rlkv` would keep whole are stored as the plan `bits` says, the others windowed.

    Raises:
        PlanError: `bits` windows heads itself, names other layers or heads than the scores, or the sparsity is not in [0, 1].
    """
    if any(g.window is not None for groups in (bits.groups, *bits.layers.values()) for g in groups):
        raise PlanError(f"Plan {bits.name!r} windows heads itself; compose a plan without windows with head scores.")
    foreign = sorted(set(bits.layers) - set(scores.layers))
    if foreign:
        raise PlanError(f"Plan {bits.name!r} names the layers {foreign}, for which there are no head scores. Use scores of the same model.")
    if not 0 <= sparsity <= 1:
        raise PlanError(f"The sparsity is {sparsity!r}; give the share of windowed heads, from 0 to 1.")
    keep = scores.top(1 - sparsity)
    layers = {
        i: _split(bits.layers.get(i, bits.groups), [bool(k) for k in row], window) for i, row in zip(scores.layers, keep, strict=True)
    }
    note = f"{(~keep).sum()} of {keep.size} KV heads windowed by {scores.method or 'given'} scores of {scores.model or 'an unnamed model'}"
    name = name or _name(bits.name, scores.method or "scores", sparsity, window)
    return CachePlan(name, bits.groups, layers, f"{bits.note}; {note}" if bits.note else note, strict=True)


def _split(groups: tuple[HeadGroup, ...], keep: list[bool], window: Window) -> tuple[HeadGroup, ...]:
    """The groups of a layer without their windowed heads, and a group for these."""
    if all(keep):
        return groups
    everything = tuple(range(len(keep)))
    out = []
    for g in groups:
        named = everything if g.kv_heads is None else g.kv_heads
        kept = tuple(h for h in named if h not in everything or keep[h])  # a wrong head stays, for `resolve` to name it
        if kept:
            out.append(dataclasses.replace(g, kv_heads=kept))
    windowed = tuple(h for h in everything if not keep[h])
    return (*out, HeadGroup(windowed, window=window)) if windowed else tuple(out)


def _name(bits: str, scores: str, sparsity: float, window: Window) -> str:
    tail = "" if window == DEFAULT else f"@{window.sink}+{window.recent}"
    return f"{f'{bits}+' if bits else ''}{MARK}{scores}@{sparsity:g}{tail}"


def parse(text: str, get_plan: Callable[[str], CachePlan], model: Any = None) -> CachePlan:
    """The plan that a text with "rlkv:" describes (see the top of this file).

    Args:
        get_plan: reads what stands before "+rlkv:".
        model: a model or configuration that the scores must belong to; None: not checked yet.
    Raises:
        PlanError: the text does not follow the syntax.
        ModelMismatchError: the scores are another model's.
    """
    found = SYNTAX.fullmatch(text)
    if found is None:
        raise PlanError(
            f"{text!r} is no plan with head scores; write rlkv:SCORES@SPARSITY or BITS+rlkv:SCORES@SPARSITY, with @SINK+RECENT behind it for a "
            'window other than 32+128: "rlkv:scores.tsv@0.5", "balanced+rlkv:scores.tsv@0.5@16+64".'
        )
    scores, sparsity = HeadScores.from_pretrained(found["scores"]), float(found["sparsity"])
    if model is not None:
        scores.check(model)
    window = Window(int(found["sink"]), int(found["recent"])) if found["sink"] else DEFAULT
    bits = None if found["bits"] is None else get_plan(found["bits"])
    name = _name("" if bits is None else bits.name, Path(found["scores"]).stem, sparsity, window)
    return rlkv(scores, sparsity, window, name) if bits is None else compose(bits, scores, sparsity, window, name)
