"""Presets by name. A method is a small file that builds plans; it keeps no state."""

import difflib
from collections.abc import Callable
from pathlib import Path

from ..errors import PlanError
from ..plan import CachePlan, HeadGroup
from . import kivi, transform, vidkv


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


def get_plan(plan: "str | Path | CachePlan") -> CachePlan:
    """A plan from a preset's name, a plan file's path, or a plan (returned as it is).

    Raises:
        PlanError: the name is no preset and no file.
    """
    if isinstance(plan, CachePlan):
        return plan
    if str(plan) in PRESETS:
        return PRESETS[str(plan)]()
    if Path(plan).is_file():
        return CachePlan.load(plan)
    near = difflib.get_close_matches(str(plan), PRESETS, 1)
    raise PlanError(
        f"There is no preset or plan file {str(plan)!r}{f'; did you mean {near[0]!r}?' if near else '.'} Presets: {', '.join(PRESETS)}."
    )
