"""The benchmark of windowed heads: its fast way of answering gives the answers of real caches; its cells and rows."""

import dataclasses
import json
from argparse import Namespace
from pathlib import Path

import heads_tiny_reasoner as bench
import numpy as np
import pytest
import torch

from bitsandheads import CompressedCache, HeadScores, Window, rlkv
from bitsandheads.eval.runner import generate_records
from bitsandheads.eval.tasks import Task
from bitsandheads.models import load
from bitsandheads.tasks import reasoning


@pytest.fixture(scope="module")
def reasoner():
    model, tokenizer = load(str(bench.ROOT / "models" / "tiny-reasoner"), "cpu")
    return model.double(), tokenizer


def test_masked_heads_answer_as_the_cache_does(reasoner) -> None:
    """float64, ragged prompts, windows short enough to break some answers: every token is the same."""
    model, tokenizer = reasoner
    task = Task("reasoning", reasoning.samples("test", 6, seed=5, levels=(0,)), reasoning.score, 40)
    masked, window = bench.Masked(model, 6), Window(4, 12)
    outputs = []
    for seed, sparsity in ((0, 0.5), (1, 0.25), (2, 1.0)):
        plan = rlkv(HeadScores(np.random.default_rng(seed).random((6, 4))), sparsity, window)
        both = []
        for generate in ({}, {"generate": masked}):
            exact = lambda model, batch, plan=plan: CompressedCache(plan, model)  # noqa: E731
            records = next(generate_records(model, tokenizer, task, exact, plan="p", batch_size=6, **generate))
            both.append({r.id: (r.output, r.output_tokens, r.truncated, r.score, r.cache_bytes) for r in records})
        assert both[0] == both[1]
        outputs.append(str(both[0]))
    assert len(set(outputs)) == 3  # the plans differ in what they do to the answers


def test_cells_are_named_apart_and_cover_every_source() -> None:
    cells = bench.cells(["ablation", "mass", "random-0", "random-1", "rlkv-0"])
    assert len({c.name for c in cells}) == len(cells) and cells[0].name == "bf16"
    for source in ("ablation", "mass", "random-0", "random-1", "rlkv-0", *bench.METHODS):
        wanted = {*bench.SPARSITIES} if source in bench.METHODS else {*bench.SPARSITIES, *bench.FINER}
        assert {c.sparsity for c in cells if c.scores == source and c.bits == "bf16" and c.sink == 32} == wanted
    for bits in ("balanced-short", "extreme-short"):
        assert {c.sparsity for c in cells if c.bits == bits} == {0, *bench.SPARSITIES}


def test_problems_are_held_out_and_long_enough() -> None:
    tasks = bench.tasks_of(60)
    samples = [s for t in tasks for s in t.samples]
    assert len({s.id for s in samples}) == 60 and {(s.kind, s.level) for s in samples} == {
        (k, n) for k in reasoning.KINDS for n in range(5)
    }
    for t in tasks:
        assert t.max_new_tokens >= max(len(reasoning.encode(s.solution)) for s in t.samples) + bench.SPARE


def test_three_quarters_of_the_tokens_are_packed() -> None:
    samples = [s for t in bench.tasks_of(1050) for s in t.samples]
    records = [{"prompt_tokens": len(reasoning.encode(s.prompt)), "output_tokens": len(reasoning.encode(s.solution)) + 1} for s in samples]
    for bits in ("balanced-short", "extreme-short"):
        assert bench.packed_share(bench.Cell(bench.WHOLE, 0.0, bits), records) > 0.75
    assert bench.packed_share(bench.Cell(bench.WHOLE, 0.0), records) is None


def test_run_and_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    scores = tmp_path / "scores"
    scores.mkdir()
    HeadScores(np.random.default_rng(0).random((6, 4)), method="random").save(scores / "random-0.tsv")
    one = lambda samples: [Task("reasoning", reasoning.samples("test", samples, levels=(0, 2)), reasoning.score, 12)]  # noqa: E731
    monkeypatch.setattr(bench, "tasks_of", one)
    args = Namespace(output=tmp_path / "runs", scores=scores, model=bench.ROOT / "models" / "tiny-reasoner", samples=6, batch_size=6)
    common = {"shard": "0/1", "seconds": 1e9, "device": "cpu", "unmasked": False, "result": tmp_path / "r.json"}
    for engine, only in (("cache", "h2o@0.5"), ("cache", "bf16+random-0@0.5"), ("mask", "")):
        run = Namespace(**vars(args), **common, engine=engine, only=only)
        run.output = args.output / (only or "rest")
        bench.run(run)
        assert len(bench.whole_cells(args.output, engine, 6)) == (len(bench.SPARSITIES) + 3 if engine == "mask" else 1 + (only[0] == "b"))
        bench.run(run)  # nothing is left to do
    bench.merge(Namespace(**vars(args), **common))
    data = json.loads((tmp_path / "r.json").read_text())
    found = {(r["engine"], r["scores"], r["sparsity"]) for r in data["rows"]}
    assert found == {
        ("cache", "h2o", 0.5), ("cache", "random-0", 0.5), ("mask", "all heads", 0),
        *(("mask", "random-0", s) for s in (*bench.SPARSITIES, *bench.FINER)),
    }  # fmt: skip
    for r in data["rows"]:
        assert r["n"] == 6 == len(r["right"]) and r["accuracy"] == r["right"].count("1") / 6
        assert {"low", "high", "bytes_saved", "mean_output_tokens", "repetition", "truncated", "plan", "window"} <= set(r)
    assert len(bench.preferred(data["rows"])) == len(data["rows"]) - 1
    bench.plot(Namespace(result=tmp_path / "r.json", plot=tmp_path / "p.svg"))
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert dataclasses.asdict(bench.Cell("mass", 0.5))["recent"] == 128
