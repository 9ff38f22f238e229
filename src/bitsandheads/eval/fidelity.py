"""How far a compressed cache moves a model's next-token distribution: KL, perplexity and top-1 on teacher-forced text."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ..errors import BitsAndHeadsError
from ..plan import CachePlan
from ..seam import CompressedCache, enabled
from .runs import RunFolder
from .stats import bootstrap_mean, bootstrap_ratio

STEP = 32  # teacher-forced tokens for each forward pass; they see each other whole, as the residual would show them
BLOCK = 16  # tokens of a bootstrap block
STRIDE = 7001  # tokens between the starts of two windows of a text
TASK = "fidelity"
STORE_DTYPE = torch.bfloat16  # of tokens that a plan keeps whole, also when the model computes in float32


class TextTooShortError(BitsAndHeadsError, ValueError):
    """A text with fewer tokens than the measurement needs."""


@dataclass(frozen=True)
class Reference:
    """The full-precision run that plans are compared with.

    Attributes:
        ids: [1, context + tokens + 1].
        log_probs: float32 [tokens, vocabulary] after each of the `tokens` tokens.
    """

    ids: Tensor
    context: int
    tokens: int
    log_probs: Tensor

    @property
    def targets(self) -> Tensor:
        """The true next tokens, int64 [tokens]."""
        return self.ids[0, self.context + 1 :]


def token_ids(tokenizer: Any, text: str, context: int, tokens: int, offset: int = 0) -> Tensor:
    """The first context + tokens + 1 tokens of a text, from token `offset` on: int64 [1, that many].

    Raises:
        TextTooShortError: there are fewer.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt").input_ids[:, offset:]
    need = context + tokens + 1
    if ids.shape[1] < need:
        raise TextTooShortError(
            f"The text has {ids.shape[1]} tokens; context {context} + tokens {tokens} + 1 need {need}. Give a longer text, or smaller numbers."
        )
    return ids[:, :need]


@torch.no_grad()
def _run(model: Any, ids: Tensor, context: int, tokens: int, cache: Any, tick: Callable[[int], None]) -> Tensor:
    ids = ids.to(model.device)
    model(ids[:, :context], past_key_values=cache, logits_to_keep=1)
    tick(context)
    out = []
    for start in range(context, context + tokens, STEP):
        part = ids[:, start : min(start + STEP, context + tokens)]
        out.append(model(part, past_key_values=cache).logits[0].float().log_softmax(-1))
        tick(part.shape[1])
    return torch.cat(out)


def reference(model: Any, ids: Tensor, context: int, tokens: int, tick: Callable[[int], None] = lambda n: None) -> Reference:
    """Run the model with its own cache. ids: [1, context + tokens + 1]."""
    cache = DynamicCache(config=model.config)
    return Reference(ids, context, tokens, _run(model, ids, context, tokens, cache, tick))


def measure(
    model: Any, plan: CachePlan, against: Reference, tick: Callable[[int], None] = lambda n: None, backend: str = "auto"
) -> tuple[dict[str, Any], CompressedCache]:
    """Teacher-force the reference's text through a cache under a plan.

    Returns:
        A row of figures, and the cache after the last token. Bits are counted from the bytes in use after the last token, whole tokens as bfloat16:
        bits_per_element counts everything; bits_per_element_without_residual counts codes, metadata and sink, over the
        tokens that are not in the residual; basis_bits_per_element is what rotations, means and ranks add to that;
        bits_per_element_at_32k is everything at 32,768 tokens. kl_low and kl_high: 95% block-bootstrap interval.
    """
    started = time.perf_counter()
    with enabled(model):
        cache = CompressedCache(plan, model, backend=backend, dtype=STORE_DTYPE)
        log_probs = _run(model, against.ids, against.context, against.tokens, cache, tick)
    full = against.log_probs
    kl = (full.exp() * (full - log_probs)).sum(-1).double().cpu().numpy()
    top1 = (full.argmax(-1) == log_probs.argmax(-1)).double().cpu().numpy()
    nll = -log_probs.gather(-1, against.targets[:, None].to(log_probs.device))[:, 0].double().cpu().numpy()
    low, high = bootstrap_mean(kl, BLOCK)
    top_low, top_high = bootstrap_mean(top1, BLOCK)
    ppl_low, ppl_high = (float(np.exp(x)) for x in bootstrap_mean(nll, BLOCK))
    packed = cache.bits_per_element(residual=False, basis=False)
    bf16_bytes = sum(2 * sum(x.real_tokens()) * x.shape.kv_heads * x.shape.head_dim * 2 for x in cache.compressed_layers())
    row = {
        "plan": plan.name,
        "bits_per_element": cache.bits_per_element(),
        "bits_per_element_without_residual": packed,
        "basis_bits_per_element": cache.bits_per_element(residual=False) - packed,
        "bits_per_element_at_32k": plan.bits_for(model.config, 32768),
        "cache_bytes": cache.memory_bytes(),
        "ratio_to_bf16": bf16_bytes / cache.memory_bytes(),
        "kl": float(kl.mean()),
        "kl_low": low,
        "kl_high": high,
        "top1": float(top1.mean()),
        "top1_low": top_low,
        "top1_high": top_high,
        "perplexity": float(np.exp(nll.mean())),
        "perplexity_low": ppl_low,
        "perplexity_high": ppl_high,
        "tokens": against.tokens,
        "context": against.context,
        "seconds": time.perf_counter() - started,
        "memory": cache.memory().in_use,
        "token_kl": kl.tolist(),
    }
    return row, cache


# -- as a task of a run -------------------------------------------------------------------------------------------------------


def evaluate(
    model: Any,
    tokenizer: Any,
    text: str,
    plans: Iterable[CachePlan],
    folder: RunFolder,
    contexts: Sequence[int],
    windows: int = 3,
    tokens: int = 256,
    backend: str = "auto",
    tick: Callable[[int], None] = lambda n: None,
) -> None:
    """Measure plans on windows of a text into a run folder; what the folder holds is not measured again.

    A record has the fields of `measure`, task "fidelity", seed 0, id "CONTEXT-WINDOW" and level CONTEXT.

    Args:
        tick: called with the number of records that are new or already there.
    """
    plans = list(plans)
    length = tokenizer(text, return_tensors="pt").input_ids.shape[1]
    for context in contexts:
        need = context + tokens + 1
        for window in range(windows):
            name = f"{context}-{window}"
            todo = [p for p in plans if name not in folder.done(TASK, p.name, 0)]
            tick(len(plans) - len(todo))
            if not todo:
                continue
            ids = token_ids(tokenizer, text, context, tokens, window * STRIDE % max(length - need, 1))
            against = reference(model, ids, context, tokens)
            for plan in todo:
                row, _ = measure(model, plan, against, backend=backend)
                row["token_kl"] = [float(f"{x:.4g}") for x in row["token_kl"]]
                folder.append([{"task": TASK, "seed": 0, "id": name, "level": context, "kind": "", "window": window} | row])
                tick(1)


def _pooled(rows: Sequence[Mapping[str, Any]], name: str, scale: Callable, back: Callable) -> dict[str, float]:
    """Mean of a figure over windows on `scale`, with an interval from the windows' own (they are independent)."""
    middle = float(np.mean([scale(r[name]) for r in rows]))
    half = float(np.sqrt(sum(((scale(r[f"{name}_high"]) - scale(r[f"{name}_low"])) / 2) ** 2 for r in rows)) / len(rows))
    return {name: float(back(middle)), f"{name}_low": float(back(middle - half)), f"{name}_high": float(back(middle + half))}


def summarise(rows: Sequence[Mapping[str, Any]], base: str = "kivi-2") -> list[dict[str, Any]]:
    """One row for each plan and context: means over the windows with 95% intervals, and where `base` was measured on the same windows
    the ratio of the KL to its KL, with an interval from a paired block bootstrap.
    """
    out = []
    for context in sorted({r["context"] for r in rows}):
        here = [r for r in rows if r["context"] == context]
        kl = {(r["plan"], r["window"]): r["token_kl"] for r in here}
        for plan in dict.fromkeys(r["plan"] for r in here):
            mine = [r for r in here if r["plan"] == plan]
            windows = sorted(r["window"] for r in mine)
            values = np.concatenate([kl[plan, w] for w in windows])
            low, high = bootstrap_mean(values, BLOCK)
            row = {"plan": plan, "context": context, "windows": len(windows), "tokens": len(values)}
            row |= {"kl": float(values.mean()), "kl_low": low, "kl_high": high}
            row |= _pooled(mine, "top1", np.asarray, float) | _pooled(mine, "perplexity", np.log, np.exp)
            if all((base, w) in kl for w in windows):
                other = np.concatenate([kl[base, w] for w in windows])
                low, high = bootstrap_ratio(values, other, BLOCK)
                name = f"kl_over_{base.replace('-', '')}"
                row |= {name: float(values.mean() / other.mean()), f"{name}_low": low, f"{name}_high": high}
            out.append(row | {k: v for k, v in mine[0].items() if "bits" in k or k == "cache_bytes"})
    return out
