"""Accuracy of the tiny reasoner by sparsity, for every source of head scores and every comparator, on held-out problems.

    python benchmarks/heads_tiny_reasoner.py run --output runs/heads --shard 0/4 &   # as many processes as there are cores and memory for
    python benchmarks/heads_tiny_reasoner.py merge --output runs/heads               # -> benchmarks/results/heads-tiny-reasoner.json
    python benchmarks/heads_tiny_reasoner.py plot                                    # -> docs/heads-tiny-reasoner.svg

A cell is one cache on all problems. Cells stand in order of importance and are dealt to the shards in turn; each shard has a run
folder of its own, so a killed one goes on where it stopped. With --seconds a shard starts no cell that would not end in time.
Sources of scores are the files in --scores; the comparators get, at every length, the bytes of the plan with the same sparsity.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from comparators.eviction import EvictionCache
from comparators.methods import METHODS
from torch import Tensor

from bitsandheads import CachePlan, HeadGroup, HeadScores, Window, compose, get_plan, rlkv
from bitsandheads.eval.environment import write_json
from bitsandheads.eval.runner import CacheFactory, evaluate, plan_cache, through_transformers
from bitsandheads.eval.runs import RunFolder, read_records
from bitsandheads.eval.summary import grouped, row_of, summarise
from bitsandheads.eval.tasks import Task
from bitsandheads.gates.rollout import RolloutEngine
from bitsandheads.models import load
from bitsandheads.seam import enable_gates
from bitsandheads.tasks import reasoning

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "heads-tiny-reasoner.json"
PLOT = ROOT / "docs" / "heads-tiny-reasoner.svg"
SCORES = ROOT / "benchmarks" / "results" / "head-scores"
SPARSITIES = (0.5, 0.8, 0.2, 0.4, 0.6)  # the most telling first
FINER = (0.7, 0.625)  # for scores only
BATCHES = ((3, 4), (0, 1, 2))  # levels that are answered together
LONG = 2  # problems of this level on are longer than prompt and solution of 32 + 128 tokens
SPARE = 32  # an answer may be so many tokens longer than the longest solution of its batch
WHOLE = "all heads"
SHORT = {"group_size": 32, "tile": 32, "residual": 16, "basis_tokens": 96}  # of a quantized head, so that short texts are packed too


@dataclass(frozen=True)
class Cell:
    """One cache. scores: a source of head scores, a comparator, or WHOLE; bits: how the heads with all tokens are stored."""

    scores: str
    sparsity: float
    bits: str = "bf16"
    sink: int = 32
    recent: int = 128

    @property
    def name(self) -> str:
        """What records call it."""
        if self == Cell(WHOLE, 0.0):
            return "bf16"
        return f"{self.bits}+{self.scores}@{self.sparsity:g}@{self.sink}+{self.recent}"

    @property
    def masked(self) -> bool:
        """Whether `Masked` can answer for it."""
        return self.bits == "bf16" and self.scores not in METHODS

    @property
    def window(self) -> Window:
        """Of the windowed heads."""
        return Window(self.sink, self.recent)


def bits_plan(name: str) -> CachePlan:
    """bf16, or a preset with short groups."""
    if name == "bf16":
        return get_plan(name)
    preset = get_plan(name.removesuffix("-short"))
    quant = replace(preset.groups[0].quant, **SHORT)
    return CachePlan(name, (HeadGroup(quant=quant),), note=f"{preset.note}, groups of {quant.tile} tokens")


def cells(sources: list[str]) -> list[Cell]:
    """All cells, the most important first. sources: names of score files; those that begin with "random" come after the others."""
    found = [s for s in sources if not s.startswith("random")]
    random = sorted(set(sources) - set(found))
    best = next((s for s in ("rlkv-0", "ablation") if s in sources), None)
    out = [Cell(WHOLE, 0.0)]
    for s in SPARSITIES:
        out += [Cell(name, s) for name in (*found, *random[:1], *METHODS)]
    out += [Cell(name, s) for s in FINER for name in (*found, *random)]
    out += [Cell(WHOLE, 0.0, bits) for bits in ("balanced-short", "extreme-short")]
    out += [Cell(name, s) for name in random[1:] for s in SPARSITIES]
    if best:
        out += [Cell(best, s, bits) for s in SPARSITIES for bits in ("balanced-short", "extreme-short")]
        out += [Cell(name, s, sink=16, recent=64) for name in (best, *(n for n in found if "16-64" in n)) for s in SPARSITIES]
    return out


def plan_of(cell: Cell, folder: Path) -> CachePlan:
    """The plan of a cell; for a comparator the plan whose bytes it gets."""
    if cell.scores == WHOLE:
        return bits_plan(cell.bits)
    path = folder / f"{cell.scores}.tsv"
    scores = HeadScores.read(next(iter(sorted(folder.glob("*.tsv")))) if cell.scores in METHODS else path)
    if cell.bits == "bf16":
        return rlkv(scores, cell.sparsity, cell.window)
    return compose(bits_plan(cell.bits), scores, cell.sparsity, cell.window)


def cache_of(cell: Cell, folder: Path) -> CacheFactory:
    """Makes the caches of a cell. Tokens are kept in bfloat16."""
    plan = plan_of(cell, folder)
    if cell.scores not in METHODS:
        return plan_cache(plan)
    return lambda model, batch: EvictionCache(METHODS[cell.scores], plan, model, torch.bfloat16)


class Masked:
    """Answers of a plan whose heads are whole or windowed, by attention with the mask written out, at the speed of CUDA graphs.

    tests/test_heads.py holds a windowed head equal to attention with its mask, and tests/test_heads_benchmark.py this to the cache.
    A decode step of this small model through transformers is nearly all Python, 20 times as slow; the cells through real caches
    ("engine": "cache") stand beside these in the results.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self.model = copy.deepcopy(model)
        self.gates = enable_gates(self.model, Window(32, 128))
        self.gates.whole_prompts = True
        config = model.generation_config
        self.engine = RolloutEngine(self.model, batch, [config.eos_token_id], config.pad_token_id)

    def __call__(self, model: Any, inputs: Mapping[str, Tensor], cache: Any, config: Any) -> Tensor:
        """See bitsandheads.eval.runner.Generate; of the cache only the plan is used."""
        windows = set()
        for row, groups in enumerate(cache.resolved.layers):
            for group in groups:
                assert group.quant is None
                self.gates.alpha.data[row, list(group.kv_heads)] = float(group.window is None)
                windows |= {group.window} - {None}
        if windows and windows != {self.gates.window}:
            (self.gates.window,) = windows
            self.engine.release()  # captured steps have the former window
        prompts = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        answers = self.engine.generate(prompts, config.max_new_tokens, temperature=0.0).tokens
        longest = max(map(len, answers))
        padded = torch.tensor([a + [config.pad_token_id] * (longest - len(a)) for a in answers])
        return torch.cat([inputs["input_ids"].cpu(), padded], 1)


def tasks_of(samples: int) -> list[Task]:
    """Held-out problems of all kinds and levels in turn, in parts of similar length; all parts have the same name."""
    problems, out = reasoning.samples("test", samples, seed=1), []
    for levels in BATCHES:
        part = [p for p in problems if p.level in levels]
        longest = max(len(reasoning.encode(p.solution)) for p in part) + 1
        out.append(Task("reasoning", part, reasoning.score, longest + SPARE))
    return out


def folders(output: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The run folders below a folder, whatever shards they belong to, and their run.json."""
    for path in sorted(output.rglob("run.json")):
        yield path.parent, json.loads(path.read_text())


def whole_cells(output: Path, engine: str, samples: int) -> set[str]:
    """Plans that an earlier run has answered for all samples."""
    found: dict[str, set[str]] = {}
    for folder, about in folders(output):
        if about["config"].get("engine", "cache") == engine:
            for r in read_records(folder):
                found.setdefault(r["plan"], set()).add(r["id"])
    return {plan for plan, ids in found.items() if len(ids) == samples}


def run(args: argparse.Namespace) -> None:
    """The cells of one shard, one after the other."""
    started, longest = time.perf_counter(), 0.0
    number, shards = (int(x) for x in args.shard.split("/"))
    sources = sorted(p.stem for p in args.scores.glob("*.tsv"))
    there = whole_cells(args.output, args.engine, args.samples)
    wanted = list(dict.fromkeys(c for part in args.only.split(",") for c in cells(sources) if part in c.name and c.name not in there))
    mine = [c for c in wanted if (c.masked or args.engine == "cache") and not (c.masked and args.unmasked)][number::shards]
    model, tokenizer = load(str(args.model), args.device)
    tasks = tasks_of(args.samples)
    for name in sources:
        HeadScores.read(args.scores / f"{name}.tsv").check(model)
    generate = Masked(model, args.batch_size) if args.engine == "mask" else through_transformers
    config = {"engine": args.engine, "model": args.model.name, "samples": args.samples, "batch_size": args.batch_size}
    config["new_tokens"] = [t.max_new_tokens for t in tasks]
    with RunFolder(args.output / f"shard-{args.engine}-{number}-of-{shards}", config) as folder:
        for cell in mine:
            left = args.seconds - (time.perf_counter() - started)
            if left < 1.2 * longest:
                print(f"shard {number}: {left:.0f} s left, cells from {cell.name} on are not run", flush=True)
                break
            begun = time.perf_counter()
            caches = {cell.name: cache_of(cell, args.scores)}
            for task in tasks:
                evaluate(model, tokenizer, task, caches, folder, batch_size=args.batch_size, generate=generate)
            longest = max(longest, time.perf_counter() - begun)
            done = row_of([r for r in folder.records() if r["plan"] == cell.name])
            seconds = time.perf_counter() - begun
            print(f"{time.strftime('%X')} {cell.name:40} {seconds:6.1f} s  accuracy {done['accuracy']:.3f}", flush=True)


# -- results ------------------------------------------------------------------------------------------------------------------


def packed_share(cell: Cell, records: list[dict[str, Any]]) -> float | None:
    """Share of the tokens of quantized heads that are packed when an answer ends; None without quantized heads."""
    quant = bits_plan(cell.bits).groups[0].quant
    if quant is None:
        return None
    held = [r["prompt_tokens"] + r["output_tokens"] - 1 for r in records]
    return sum(quant.start_tiles(t) * quant.tile for t in held) / sum(held)


def rows_of(records: list[dict[str, Any]], engine: str, folder: Path, model: Any) -> Iterator[dict[str, Any]]:
    """One row for each complete cell, compared with bf16 on the same samples. records: of one engine, and of bf16."""
    by_plan = {k[0]: v for k, v in grouped(records, ["plan"]).items()}
    summary = {r["plan"]: r for r in summarise(records)}
    far = {r["plan"]: r for r in summarise([r for r in records if r["level"] >= LONG])}
    kinds = {(r["plan"], r["kind"]): r["accuracy"] for r in summarise(records, ["kind"])}
    for cell in cells(sorted(p.stem for p in folder.glob("*.tsv"))):
        own = by_plan.get(cell.name, [])
        if not own or own[0]["engine"] != engine or len(own) < len(by_plan["bf16"]):
            continue
        windowed = 0.0 if cell.scores in METHODS else plan_of(cell, folder).sparsity(model.config, 1000).windowed
        yield {
            **asdict(cell),
            "engine": engine,
            "window": f"{cell.sink}+{cell.recent}",
            "windowed_heads": windowed,
            "packed_share": packed_share(cell, own),
            **{
                f"long_{k}": far[cell.name][k]
                for k in ("n", "accuracy", "low", "high", "difference", "difference_low", "difference_high", "verdict")
            },
            "accuracy_by_kind": {kind: kinds[cell.name, kind] for kind in reasoning.KINDS},
            "right": "".join(str(int(r["score"])) for r in sorted(own, key=lambda r: r["id"])),
            **{k: v for k, v in summary[cell.name].items() if k not in ("task", "seeds", "peak_bytes")},
        }


def merge(args: argparse.Namespace) -> None:
    """Rows from the records of all shards; a cell that is whole in two folders counts once."""
    by_engine: dict[str, dict[tuple[str, str], dict[str, Any]]] = {"cache": {}, "mask": {}}
    runs = []
    for folder, about in folders(args.output):
        runs.append(about)
        engine = about["config"].get("engine", "cache")
        for r in read_records(folder):
            by_engine[engine].setdefault((r["plan"], r["id"]), r | {"engine": engine})
    base = {k: r for found in by_engine.values() for k, r in found.items() if k[0] == "bf16"}
    model, _ = load(str(args.model), "cpu")
    rows = []
    for engine, found in by_engine.items():
        rows += rows_of(list((base | found).values()), engine, args.scores, model)
    there = {(r["scores"], r["sparsity"], r["bits"], r["window"]) for r in rows}
    for cell in cells(sorted(p.stem for p in args.scores.glob("*.tsv"))):
        if (cell.scores, cell.sparsity, cell.bits, f"{cell.sink}+{cell.recent}") not in there:
            print(f"missing or incomplete: {cell.name}")
    data = {
        "model": args.model.name,
        "task": "reasoning, test split, seed 1",
        "runs": [{k: r[k] for k in ("config", "versions", "commit")} for r in runs],
        "ids": sorted({k[1] for found in by_engine.values() for k in found}),
        "rows": rows,
    }
    write_json(data, args.result)
    print(f"{len(rows)} rows in {args.result}")


# -- plot ---------------------------------------------------------------------------------------------------------------------


def preferred(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a cell that both engines ran the row of the cache."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in sorted(rows, key=lambda r: r["engine"]):
        found.setdefault((r["scores"], r["sparsity"], r["bits"], r["window"]), r)
    return list(found.values())


def lines_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by source, seeds of one source together ("random-0", "random-1" -> "random"), each with its sparsity 0 in front."""
    out: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        if r["scores"] != WHOLE:
            head, _, seed = r["scores"].rpartition("-")
            out.setdefault(head if len(seed) == 1 else r["scores"], []).append(r)
    return out


def ablation(scores: str) -> bool:
    """Whether scores are of a training run that leaves something out; benchmarks/tables.py has a table of those."""
    return scores.startswith("rlkv-") and not scores.removeprefix("rlkv-").removeprefix("mean-").isdecimal()


def plot(args: argparse.Namespace) -> None:
    """Accuracy, and output length, by sparsity; accuracy by bytes saved."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = preferred(json.loads(args.result.read_text())["rows"])
    zero = {r["bits"]: r for r in rows if r["scores"] == WHOLE}
    panels = [("bf16", [r for r in rows if r["bits"] == "bf16" and r["window"] == "32+128" and not ablation(r["scores"])])]
    panels += [(b, [r for r in rows if r["bits"] == b]) for b in ("balanced-short", "extreme-short") if b in zero]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    colours = iter(plt.get_cmap("tab20").colors)

    def draw(ax: Any, members: list[dict[str, Any]], start: dict[str, Any], label: str, colour: Any, x: str, y: str) -> None:
        points: dict[float, list[dict[str, Any]]] = {0.0: [start]}
        for r in members:
            points.setdefault(r["sparsity"], []).append(r)
        order = sorted(points)
        xs = [np.mean([r[x] for r in points[s]]) for s in order]
        ys = np.array([np.mean([r[y] for r in points[s]]) for s in order])
        style = "--" if label in METHODS else "-"
        error = None
        if y.endswith("accuracy"):
            low, high = ([np.mean([r[y.replace("accuracy", k)] for r in points[s]]) for s in order] for k in ("low", "high"))
            error = np.maximum(np.array([ys - low, high - ys]), 0)
        ax.errorbar(xs, ys, error, label=label, color=colour, linestyle=style, marker="o", markersize=3.5, capsize=2, linewidth=1.4)

    for label, members in lines_of(panels[0][1]).items():
        colour = next(colours)
        draw(axes[0, 0], members, zero["bf16"], label, colour, "sparsity", "long_accuracy")
        draw(axes[0, 1], members, zero["bf16"], label, colour, "bytes_saved", "accuracy")
        draw(axes[1, 0], members, zero["bf16"], label, colour, "sparsity", "mean_output_tokens")
    for bits, members in panels:
        for label, own in lines_of(members).items():
            if bits != "bf16" or any(label in lines_of(m) for b, m in panels[1:]):
                draw(axes[1, 1], own, zero[bits], f"{label}, {bits}", next(colours, None), "bytes_saved", "accuracy")
    axes[0, 0].set(xlabel="sparsity (share of heads windowed, or its bytes)", ylabel="accuracy, long problems", ylim=(-0.02, 1.02))
    axes[0, 1].set(xlabel="share of the cache's bytes saved", ylabel="accuracy, all problems", ylim=(-0.02, 1.02))
    axes[1, 0].set(xlabel="sparsity", ylabel="mean output tokens")
    axes[1, 1].set(xlabel="share of the cache's bytes saved", ylabel="accuracy", ylim=(-0.02, 1.02), title="with fewer bits", xlim=(0, 1))
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=7)
    figure.savefig(args.plot, metadata={"Date": None})
    print(f"wrote {args.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "merge", "plot"))
    parser.add_argument("--output", type=Path, help="folder of the shards' run folders")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny-reasoner")
    parser.add_argument("--scores", type=Path, default=SCORES, help="folder of score files")
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--engine", choices=("cache", "mask"), default="cache", help="mask: see Masked; cells that it can answer only")
    parser.add_argument("--samples", type=int, default=1050)
    parser.add_argument("--batch-size", type=int, default=1050)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--unmasked", action="store_true", help="only the cells that --engine mask cannot answer")
    parser.add_argument("--only", default="", help="cells whose name contains this; several, separated by commas: in this order")
    parser.add_argument("--device")
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    args = parser.parse_args()
    if args.command != "plot" and args.output is None:
        parser.error("run and merge need --output")
    {"run": run, "merge": merge, "plot": plot}[args.command](args)


if __name__ == "__main__":
    main()
