"""The benchmarks of video: caches filled for the search are what the plan says, the search brackets; shards and rows of the table."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import tiny_models as tiny
import torch
import video_longest as longest
import video_tiny as table
from test_tiny_video_training import tv

import bitsandheads as bh


@pytest.fixture(scope="module")
def qwen():
    model = tiny.make("qwen2.5-vl")
    bh.enable(model)
    return model


@pytest.mark.parametrize("plan", ["bf16", "balanced", "kivi-2", "vidkv-1.5/1.58"])
def test_filled_caches_are_what_the_plan_says(qwen, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that fit no tile, room for what is decoded, and steps of the whole model."""
    monkeypatch.setattr(longest, "PIECE", 900)
    found = longest.held(qwen, plan, 2500, 2)
    resolved = bh.get_plan(plan).resolve(qwen.config)
    assert found["cache_bytes"] == resolved.bytes_for(2502, 1, qwen.dtype.itemsize)
    assert found["cache_bytes"] <= found["allocated_bytes"] <= found["cache_bytes"] + 130 * resolved.bytes_for(1, 1, qwen.dtype.itemsize)


def test_filled_layers_hold_the_given_tokens(qwen) -> None:
    """As if the layer had been given them through the model's attention, piece by piece."""
    layers = [bh.CompressedCache("vidkv-1.5/1.58", qwen.config).compressed_layers()[0] for _ in range(2)]
    q, k, v = longest.random_tokens(layers[0], 700, "cpu", torch.float32)
    longest.fill(layers[0], q, k, v, 1500, 4)
    for n in (700, 700, 100):
        layers[1].stage(k[:, :, :n], v[:, :, :n])
        layers[1].attend(q[:, :, :1].expand(-1, -1, n, -1), longest.read_mask(None, n), 0.1, lambda q, k, v: q)
    for a, b in zip(layers[0].stores, layers[1].stores, strict=True):
        assert a.appended() == b.appended() == [1500]
        n = a.bank.count[0]
        assert b.bank.count == [n] and n > 9 and torch.equal(a.bank.tiles[:, :, :n], b.bank.tiles[:, :, :n])
        kept = a.tail.count[0]
        assert torch.equal(a.tail.k[:, :, :kept], b.tail.k[:, :, :kept])


def test_a_clip_is_read_in_one_pass(qwen) -> None:
    found = longest.one_pass(qwen, "bf16", 6, 56, 2)
    assert found["tokens"] == 3 * 4 + 34 and found["bits_per_element"] == 8 * qwen.dtype.itemsize


def test_the_search_brackets() -> None:
    for guess in (400, 998, 1000, 1500):
        notes: list[dict] = []
        longest.search(lambda n: {"n": n} if n <= 1000 else None, guess, 0.01, 1e18, notes.append)
        found = notes[-1]
        assert len(notes) == len(found["tried"])
        assert found["frames"] == found["n"] <= 1000 < found["too_long"] <= found["frames"] * 1.01 + 2, guess
    longest.search(lambda n: None, 8, 0.01, 1e18, notes.append)
    assert notes[-1]["frames"] is None and notes[-1]["too_long"] == 2


def test_shards_together_are_the_table(tmp_path: Path) -> None:
    """Two shards and a run that goes on; plans with the same groups are run once; differences and bits stand in the rows."""
    torch.manual_seed(0)
    tv.save(tv.Model(tv.model_config(tv.CONFIGS["test"])), tmp_path / "model")
    options = {"model": tmp_path / "model", "questions": 4, "frames": 24, "batch": 4, "backend": "reference", "seconds": 1e9}
    options |= {"output": tmp_path / "runs", "result": tmp_path / "table.json"}
    names = ["bf16", "balanced", "vidkv-1.5/2", "keys by range"]
    for shard, only in (("0/2", names), ("1/2", names), ("0/1", names)):
        table.run(Namespace(**options, shard=shard, only=only))
    assert {k: len(v) for k, v in table.records_of(tmp_path / "runs")["torch.float32"].items()} == dict.fromkeys(names[:3], 4)
    table.merge(Namespace(**options))
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    total = {r["plan"]: r for r in rows if r["kind"] == "all"}
    assert set(total) >= set(names) and {r["group"] for r in rows} == {"setting", "ablation"}
    assert {r["dtype"] for r in rows} == {"torch.float32"} and len(rows) == len({(r["plan"], r["kind"]) for r in rows})
    assert all(r["n"] == 4 and len(r["right"]) == 4 for r in total.values())
    assert total["keys by range"]["bits_per_element"] == total["vidkv-1.5/2"]["bits_per_element"] < 16 == total["bf16"]["bits_per_element"]
    assert total["balanced"]["bits_per_element_at_32k"] < 2 and total["balanced"]["difference"] is not None
    assert total["balanced"]["versus_balanced"]["difference"] is None and total["bf16"]["versus_balanced"]["difference"] is not None
