"""Presets by name. A method is a small file that builds plans; it keeps no state."""

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..plan import CachePlan, HeadGroup
from . import heads, kivi, transform, vidkv


def bf16() -> CachePlan:
    """Every token of every head in the model's own dtype."""
    return CachePlan("bf16", (HeadGroup(),), note="the model's own dtype, nothing compressed")


PRESETS: dict[str, Callable[[], CachePlan]] = {
    "bf16": bf16,
    "kivi-2": kivi.kivi_2,
    "kivi-2-sink": kivi.kivi_2_sink,
    **vidkv.PRESETS,
    "balanced": transform.balanced,
    "extreme": transform.extreme,
}


def preset_names() -> list[str]:
    """All preset names."""
    return list(PRESETS)


def get_plan(plan: "str | Path | CachePlan", model: Any = None) -> CachePlan:
    """A plan from a preset's name, a plan file's path, head scores ("rlkv:...", see methods/heads.py), or a plan (returned as it is).

    Args:
        model: a model or configuration that named head scores must belong to; None: not checked here.
    Raises:
        PlanError: the name is no preset, no file and no plan with head scores.
        ModelMismatchError: the head scores are another model's.
    """
    if isinstance(plan, CachePlan):
        return plan
    if not isinstance(plan, (str, Path)):
        raise PlanError(f"The plan is {plan!r}; give a preset's name, a plan file's path, or a CachePlan.")
    if str(plan) in PRESETS:
        return PRESETS[str(plan)]()
    if Path(plan).is_file():
        return CachePlan.load(plan)
    if heads.MARK in str(plan):
        return heads.parse(str(plan), get_plan, model)
    near = difflib.get_close_matches(str(plan), PRESETS, 1)
    raise PlanError(
        f"There is no preset or plan file {str(plan)!r}{f'; did you mean {near[0]!r}?' if near else '.'} Presets: {', '.join(PRESETS)}. "
        "With head scores: rlkv:SCORES@SPARSITY, PRESET+rlkv:SCORES@SPARSITY."
    )
