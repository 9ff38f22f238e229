"""From records to tables: one row for each task and plan, compared with a base plan on the same samples."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .stats import bootstrap_mean, compare, wilson

BASE = "bf16"


def by_sample(records: Iterable[Mapping[str, Any]], figure: str = "score") -> dict[str, float]:
    """Sample -> mean of a figure over its seeds."""
    found: dict[str, list[float]] = {}
    for r in records:
        found.setdefault(r["id"], []).append(float(r[figure]))
    return {k: float(np.mean(v)) for k, v in found.items()}


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95% interval of a mean over samples: Wilson's where all scores are 0 or 1, else by bootstrap."""
    values = np.asarray(scores)
    return wilson(values.sum(), len(values)) if np.isin(values, [0, 1]).all() else bootstrap_mean(values)


def row_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Figures of some records of one plan: `n` samples (not records), each with the mean of its seeds.

    accuracy, low, high: pass@1 and its 95% interval. bits_per_element and bytes_saved: of all bytes together, so long samples weigh
    more. seconds: all together.
    """
    scores = list(by_sample(records).values())
    low, high = interval(scores)
    cache, full = (sum(r[k] for r in records) for k in ("cache_bytes", "full_bytes"))
    return {
        "n": len(scores),
        "seeds": len({r["seed"] for r in records}),
        "accuracy": float(np.mean(scores)),
        "low": low,
        "high": high,
        "mean_output_tokens": float(np.mean([r["output_tokens"] for r in records])),
        "mean_prompt_tokens": float(np.mean([r["prompt_tokens"] for r in records])),
        "repetition": float(np.mean([r["repetition"] for r in records])),
        "truncated": float(np.mean([r["truncated"] for r in records])),
        "bits_per_element": 16 * cache / full if full else float("nan"),
        "bytes_saved": 1 - cache / full if full else float("nan"),
        "mean_cache_bytes": cache / len(records),
        "peak_bytes": max(r["peak_bytes"] for r in records),
        "seconds": sum(r["seconds"] for r in records),
    }


def grouped(records: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    """Records with the same values of these keys, in the order of their first ones."""
    out: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for r in records:
        out.setdefault(tuple(r[k] for k in keys), []).append(r)
    return out


def summarise(records: Iterable[Mapping[str, Any]], by: Sequence[str] = (), base: str = BASE) -> list[dict[str, Any]]:
    """One row for each task, plan and value of `by`.

    Args:
        records: of one model.
        by: further keys, such as "kind" or "level".
        base: the plan that the others are compared with, where it was run.
    Returns:
        `row_of` with task, plan and `by`, and against the base on the common samples: difference, difference_low, difference_high,
        p (McNemar's; None where scores are no 0 and 1) and verdict; these are None in the rows of the base and where there is none.
    """
    groups = grouped(records, ["task", *by, "plan"])
    rows = []
    for key, members in groups.items():
        against = groups.get((*key[:-1], base), []) if key[-1] != base else []
        other, scores = by_sample(against), by_sample(members)
        found = compare(scores, other) if scores.keys() & other.keys() else None
        rows.append(
            dict(zip(["task", *by, "plan"], key, strict=True))
            | row_of(members)
            | {
                "difference": found and found.difference,
                "difference_low": found and found.low,
                "difference_high": found and found.high,
                "p": found and found.p,
                "verdict": found and found.verdict,
            }
        )
    return rows
