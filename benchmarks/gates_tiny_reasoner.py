"""Gate training on the tiny reasoner: three seeds, ablations, distillation; one run for each call, so that runs go side by side.

    python benchmarks/gates_tiny_reasoner.py curriculum --output DIR  (the problems that the runs share; a run makes them if they are not there)
    python benchmarks/gates_tiny_reasoner.py rlkv-0 --output DIR      (or another name of RUNS)
    python benchmarks/gates_tiny_reasoner.py check --output DIR       (accuracy by sparsity of every score file in DIR)
    python benchmarks/gates_tiny_reasoner.py averaged --output benchmarks/results/gates (-> benchmarks/results/head-scores/rlkv-mean-*.tsv)
    python benchmarks/gates_tiny_reasoner.py plot --output benchmarks/results/gates     (-> docs/heads-training.svg)

Scores are written to DIR/NAME.tsv, the log to DIR/NAME.csv, seconds, tokens and memory to DIR/NAME.json. Hyper-parameters:
runs/tiny-reasoner.yaml, and what RUNS changes.
"""

import argparse
import csv
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bitsandheads import __version__
from bitsandheads.gates.config import TrainConfig, load_config
from bitsandheads.gates.curriculum import Spread, build
from bitsandheads.gates.distill import DistillConfig, distill, passkey_batches, solution_batches
from bitsandheads.gates.problems import read_problems
from bitsandheads.gates.prompts import encode, make_engine
from bitsandheads.gates.rollout import RolloutEngine
from bitsandheads.models import load
from bitsandheads.plan import Window
from bitsandheads.scores import HeadScores
from bitsandheads.seam import disable_gates, enable_gates
from bitsandheads.tasks import reasoning

ROOT = Path(__file__).parents[1]
MODEL = "models/tiny-reasoner"
CONFIG = ROOT / "runs" / "tiny-reasoner.yaml"
SCORES = ROOT / "benchmarks" / "results" / "head-scores"
PLOT = ROOT / "docs" / "heads-training.svg"
POOL = "reasoning:train:4000:1"
SOLVED = "curriculum.jsonl"
SPREAD = Spread((96, 192, 288, 400), (100, 500, 900, 1200))
RUNS: dict[str, dict[str, Any]] = {f"rlkv-{i}": {"seed": i} for i in range(3)} | {
    "rlkv-no-adaptive-0": {"penalty": "constant"},
    "rlkv-micro-batch-0": {"penalty": "micro_batch"},
    "rlkv-no-curriculum-0": {},
    "rlkv-window-16-64-0": {"sink": 16, "recent": 64},
    "rlkv-beta-0.002-0": {"beta": 0.002},
}
DUO = {
    "steps": 300,
    "batch": 8,
    "length": 640,
    "passkeys": 4,
    "passkey_tokens": 16,
    "cue": 2,
    "learning_rate": 0.05,
    "gradient_checkpointing": False,
}


def curriculum(model: Any, tokenizer: Any, file: Path) -> None:
    started = time.time()
    found = build(
        make_engine(model, tokenizer, 1024),
        lambda s: encode(tokenizer, s, False),
        lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        reasoning.score, read_problems(POOL), file, SPREAD,
        progress=lambda done, solved: print(f"{done} done, {solved} solved, {time.time() - started:.1f} s", flush=True),
    )  # fmt: skip
    print("problems by output length", found)


def reinforce(name: str, model: Any, tokenizer: Any, output: Path, changes: dict[str, Any]) -> None:
    from bitsandheads.gates.training import train

    source = POOL
    if "no-curriculum" not in name:
        source = str(output / SOLVED)
        if not Path(source).is_file():
            curriculum(model, tokenizer, Path(source))
    config = load_config(TrainConfig, CONFIG, **(RUNS.get(name, {}) | changes))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        scores = train(
            model, tokenizer, read_problems(source), reasoning.score, config, run, data=POOL, commit=__version__, name=MODEL,
            say=lambda line: print(line, flush=True),
        )  # fmt: skip
        shutil.copy(run / "log.csv", output / f"{name}.csv")
        summary = json.loads((run / "summary.json").read_text()) | {"config": json.loads(config.to_json())}
    (output / f"{name}.json").write_text(json.dumps(summary, indent=1) + "\n")
    scores.save(output / f"{name}.tsv")
    print(np.round(scores.values, 3))


def distilled(name: str, model: Any, tokenizer: Any, output: Path, changes: dict[str, Any]) -> None:
    config = DistillConfig(**({"sink": 32, "recent": 128} | DUO | changes))
    samples = reasoning.samples("train", 4000, 1)
    if name.startswith("duo-solutions"):
        pairs = [(reasoning.encode(s.prompt), reasoning.encode(s.solution)) for s in samples]
        batches, data = solution_batches(pairs, config), "worked solutions"
    else:
        text = [t for s in samples for t in reasoning.encode(s.prompt)]
        batches, data = passkey_batches(text, config), "passkeys in the facts of problems"
    rows = []
    started = time.time()
    scores = distill(model, batches, config, lambda *row: rows.append(row), data=data, commit=__version__, name=MODEL)
    scores.save(output / f"{name}.tsv")
    with (output / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "relative_error", "gates_mean"), *rows])
    print(f"{time.time() - started:.1f} s, error {rows[-1][1]:.4f}\n{np.round(scores.values, 3)}")


class WindowedEngine(RolloutEngine):
    """Hard gates as a cache with windowed heads computes them: the prompt in full for all heads, then the window."""

    def _prefill(self, *args: Any) -> None:
        alpha = self.model.model.head_gates.alpha
        hard = alpha.detach().clone()
        with torch.no_grad():
            alpha.fill_(1)
            super()._prefill(*args)
            alpha.copy_(hard)


def accuracy(engine: RolloutEngine, tokenizer: Any, samples: list[Any], new: int = 640) -> tuple[float, float]:
    out = engine.generate([reasoning.encode(s.prompt) for s in samples], new, 0.0)
    texts = tokenizer.batch_decode(out.tokens, skip_special_tokens=True)
    return float(np.mean([reasoning.score(s, t) for s, t in zip(samples, texts, strict=True)])), out.count / len(samples)


def check(model: Any, tokenizer: Any, output: Path, names: list[str] | None = None, n: int = 600) -> None:
    """Quick accuracy by sparsity on validation problems; the test problems are for benchmarks/heads_tiny_reasoner.py."""
    samples = reasoning.samples("validation", n, 5)
    sources = {p.stem: HeadScores.read(p).values for p in sorted(output.glob("*.tsv")) if names is None or p.stem in names}
    if names is None:
        shape = next(iter(sources.values())).shape
        sources |= {f"random{i}": np.random.default_rng(i).random(shape, np.float32) for i in range(3)}
    rows = []
    for window in (Window(16, 64), Window(32, 128)):
        gates = enable_gates(model, window)
        engine = make_engine(model, tokenizer, n)
        engine.__class__ = WindowedEngine
        for name, values in sources.items():
            for sparsity in (0.2, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9):
                with torch.no_grad():
                    gates.alpha.copy_(torch.tensor(HeadScores(values).top(1 - sparsity).astype(np.float32)))
                right, tokens = accuracy(engine, tokenizer, samples)
                rows.append(
                    {"window": f"{window.sink}+{window.recent}", "scores": name, "sparsity": sparsity, "accuracy": right, "tokens": tokens}
                )
            print(rows[-1]["window"], name, *(f"{r['sparsity']}:{r['accuracy']:.3f}" for r in rows[-9:]), flush=True)
        engine.release()
        disable_gates(model)
    (output / f"check-{'-'.join(names or ['all'])}.json").write_text(json.dumps(rows, indent=1) + "\n")


def averaged(folder: Path, steps: int = 20) -> None:
    """rlkv-mean-SEED.tsv: the scores that `average: 20` gives, from the logs of the runs."""
    from bitsandheads.gates.trainer import ranked

    for seed in range(3):
        scores = HeadScores.read(SCORES / f"rlkv-{seed}.tsv")
        with (folder / f"rlkv-{seed}.csv").open(newline="") as file:
            rows = [[float(v) for k, v in row.items() if k.startswith("gate_")] for row in csv.DictReader(file)]
        values = ranked(torch.tensor(rows).view(-1, *scores.values.shape), steps).numpy()
        replace(scores, values=values, extra=scores.extra | {"average": steps}).save(SCORES / f"rlkv-mean-{seed}.tsv")


def plot(folder: Path) -> None:
    """Reward and sparsity of all runs by step, and every gate of the first seed."""
    from matplotlib.figure import Figure

    runs = {}
    for path in sorted(folder.glob("rlkv-*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        runs[path.stem] = {k: np.array([float(r[k]) for r in rows]) for k in rows[0]}
    figure = Figure(figsize=(11, 8), layout="constrained")
    (reward, sparsity), (gates, ablations) = figure.subplots(2, 2, sharex=True)
    for name, run in runs.items():
        seed = name.removeprefix("rlkv-").isdecimal()
        label = f"seed {name[-1]}" if seed else name.removeprefix("rlkv-").removesuffix("-0")
        smooth = [run["reward"][max(i - 4, 0) : i + 1].mean() for i in range(len(run["step"]))]
        (reward if seed else ablations).plot(run["step"], smooth, label=label)
        sparsity.plot(run["step"], run["below_0.1"], label=label, linestyle="-" if seed else ":")
    first = runs["rlkv-0"]
    for name in (k for k in first if k.startswith("gate_")):
        stays = first[name][-20:].mean() > 0.1
        gates.plot(first["step"], first[name], color=None if stays else "0.8", zorder=2 + stays)
        if stays:
            gates.annotate(" {}.{}".format(*name.split("_")[1:]), (first["step"][-1], first[name][-1]), fontsize=7, va="center")
    reward.set(ylabel="reward, mean of 5 steps", ylim=(0.7, 1.01))
    sparsity.set(ylabel="share of gates below 0.1")
    gates.set(ylabel="gates of seed 0 (layer.head)", xlabel="step")
    ablations.set(ylabel="reward, mean of 5 steps", xlabel="step", ylim=(0.7, 1.01))
    for ax in (reward, sparsity, gates, ablations):
        ax.grid(alpha=0.3)
        if ax is not gates:
            ax.legend(fontsize=7)
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", nargs="*", default=[], help="field=value")
    parser.add_argument("--check", action="store_true", help="accuracy by sparsity afterwards")
    args = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (item.split("=") for item in args.set)}
    args.output.mkdir(parents=True, exist_ok=True)
    if args.name in ("plot", "averaged"):
        return {"plot": plot, "averaged": averaged}[args.name](args.output)
    model, tokenizer = load(str(ROOT / MODEL))
    if args.name == "check":
        check(model, tokenizer, args.output)
    elif args.name == "curriculum":
        curriculum(model, tokenizer, args.output / SOLVED)
    elif args.name.startswith("duo"):
        distilled(args.name, model, tokenizer, args.output, changes)
    else:
        reinforce(args.name, model, tokenizer, args.output, changes)
    if args.check:
        check(model, tokenizer, args.output, [args.name])


if __name__ == "__main__":
    main()
