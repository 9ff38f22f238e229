"""Read what a report shows: run folders, files of results (JSON with rows), head scores."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import BitsAndHeadsError
from ...scores import HeadScores
from .. import fidelity
from ..runs import KEY, RUN, read_records, read_run

Rows = list[dict[str, Any]]


class ReportError(BitsAndHeadsError, ValueError):
    """Something that a report cannot show."""


@dataclass(frozen=True)
class Run:
    """A run folder. title: its model, and the run's name where several runs have that model."""

    name: str
    about: dict[str, Any]
    records: Rows
    title: str = ""

    @property
    def model(self) -> str:
        """Its model, without the folders before it."""
        return Path(str(self.about["config"].get("model", "unnamed model"))).name


@dataclass(frozen=True)
class File:
    """A file of results: its rows, and what stands beside them."""

    name: str
    about: dict[str, Any]
    rows: Rows


@dataclass
class Sources:
    """Everything that was given, by kind. sparsity, video, speed, steps, fidelity: see `KINDS`; other: rows of another kind."""

    runs: list[Run] = field(default_factory=list)
    scores: list[tuple[str, HeadScores]] = field(default_factory=list)
    sparsity: list[File] = field(default_factory=list)
    video: list[File] = field(default_factory=list)
    speed: list[File] = field(default_factory=list)
    steps: list[File] = field(default_factory=list)
    fidelity: list[File] = field(default_factory=list)
    other: list[File] = field(default_factory=list)


KINDS = {  # fields that tell what rows are
    "sparsity": {"scores", "sparsity", "bytes_saved", "n", "accuracy", "low", "high"},
    "video": {"plan", "kind", "n", "accuracy", "low", "high", "bits_per_element"},
    "speed": {"plan", "backend", "model", "batch", "context", "us", "best_bf16_us", "speedup"},
    "steps": {"point", "plan", "model", "batch", "context"},
    "fidelity": {"plan", "context", "kl", "kl_low", "kl_high", "perplexity", "bits_per_element"},
}


def read(paths: Sequence[Path]) -> Sources:
    """Read all.

    Raises:
        ReportError: nothing was given, or something that is no run, no results and no head scores.
        FileFormatError, RunFolderError: a damaged run.
    """
    if not paths:
        raise ReportError("A report needs run folders, files of results (.json) or head scores (.tsv).")
    out = Sources()
    for path in paths:
        if (path / RUN).is_file():
            out.runs.append(Run(path.name, read_run(path), read_records(path)))
        elif path.suffix == ".json" and path.is_file():
            kind, file = _results(path)
            getattr(out, kind).append(file)
        elif path.is_file():
            out.scores.append((path.stem, HeadScores.from_pretrained(str(path))))
        else:
            raise ReportError(
                f"{path} is no run folder (it has no {RUN}) and no file. Give folders of `bitsandheads eval`, .json or .tsv files."
            )
    out.runs = _merged(out.runs)
    for run in out.runs:
        texts = [r for r in run.records if r["task"] == fidelity.TASK]
        if texts:
            out.fidelity.append(File(run.name, {"model": run.model}, fidelity.summarise(texts)))
    return out


def _merged(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in their plans only become one; a record that several have is taken once. All get their titles."""
    out: dict[str, Run] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in run.about["config"].items() if k != "plans"}, sort_keys=True)
        first = out.setdefault(key, run)
        if first is run:
            continue
        known = {tuple(r[k] for k in KEY) for r in first.records}
        records = first.records + [r for r in run.records if tuple(r[k] for k in KEY) not in known]
        plans = first.about.get("facts", {}).get("plans", {}) | run.about.get("facts", {}).get("plans", {})
        out[key] = Run(f"{first.name}, {run.name}", first.about | {"facts": {"plans": plans}}, records)
    models = [run.model for run in out.values()]
    return [replace(r, title=r.model if models.count(r.model) == 1 else f"{r.model} ({r.name})") for r in out.values()]


def _results(path: Path) -> tuple[str, File]:
    """What kind of rows a file has, and the file."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is no JSON ({error}).") from error
    rows = data.get("summary", data.get("rows")) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise ReportError(f'{path} has no "rows" (a list of objects), so a report cannot show it.')
    common = set.intersection(*(set(r) for r in rows))
    kind = next((k for k, fields in KINDS.items() if fields <= common), "other")
    return kind, File(path.stem, {k: v for k, v in data.items() if k not in ("rows", "summary")}, rows)
