"""The benchmark of whole models gives caches a prompt that was read once; they must hold what the prompt itself gives them."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

spec = importlib.util.spec_from_file_location("bench_generate", Path(__file__).parents[1] / "benchmarks" / "bench_generate.py")
bench = sys.modules["bench_generate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


@pytest.mark.parametrize("name", ["bf16", "balanced", "balanced+rlkv@0.5", "kivi-2"])
def test_a_shared_prompt_gives_the_bytes_of_the_whole_one(name: str) -> None:
    model = bench.make_model("tiny", "cpu")
    point = bench.Point("tiny", name, 2, 700)
    with torch.no_grad():
        torch.manual_seed(1)
        prompt = bench.read_prompt(model, 700, "cpu")
        torch.manual_seed(1)
        ids = torch.randint(2, model.config.vocab_size, (1, 700))
        whole, shared = (bench.make_cache(point, model, 800) for _ in range(2))
        model(ids, past_key_values=whole)
        whole.batch_repeat_interleave(2)
        bench.fill(shared, prompt, 2, "cpu")
    assert shared.get_seq_length() == whole.get_seq_length() == 700
    for a, b in zip(shared.compressed_layers(), whole.compressed_layers(), strict=True):
        for x, y in zip(a.stores, b.stores, strict=True):
            mine, theirs = x.tensors(), y.tensors()
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[n], theirs[n]) for n in mine), name


def test_a_profile_counts_overlapping_kernels_once() -> None:
    """Idle time between kernels is counted up to where the GPU waits for the host."""

    def event(start: float, end: float, name: str):
        return SimpleNamespace(device_type=torch.autograd.DeviceType.CUDA, time_range=SimpleNamespace(start=start, end=end), name=name)

    watch = bench.Profile(1, 14, "cpu")
    events = [event(100, 110, "a"), event(112, 120, "b"), event(115, 130, "c"), event(400, 410, "a")]
    watch.profiler = SimpleNamespace(events=lambda: events)
    row = watch.summary()
    assert [row[k] * bench.PROFILED for k in ("launches", "busy_us", "between_us")] == pytest.approx([4, 10 + 18 + 10, 2])
    assert [(k["kernel"], round(k["us"] * bench.PROFILED)) for k in row["kernels"]] == [("a", 20), ("c", 15), ("b", 8)]


def test_a_run_replaces_rows_of_its_points(tmp_path) -> None:
    """Rows of an earlier version leave, others stay; figures of another device are refused."""

    def rows(*named: tuple) -> list[dict]:
        return [{"point": name, "ms_per_step": ms, **more} for name, ms, more in named]

    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    here = {"device": "a"}
    bench.write(
        kept, {"environment": here, "rows": rows(("x", 1, {"commit": "old"}), ("y", 2, {"again": "why"}), ("z", 3, {"commit": "old"}))}
    )
    bench.write(new, {"environment": here, "rows": rows(("x", 4, {"commit": ""})), "longest": [], "prefill": [], "profiles": []})
    bench.merge(kept, new, "hash")
    got = json.loads(kept.read_text())
    assert sorted((r["point"], r["ms_per_step"], r["commit"]) for r in got["rows"]) == [("x", 4, "hash"), ("z", 3, "old")]
    bench.write(new, {"environment": {"device": "b"}, "rows": []})
    with pytest.raises(SystemExit, match="another file"):
        bench.merge(kept, new, "hash")


def test_a_row_ends_in_time() -> None:
    assert "given up after 1 s" in bench.tried(lambda: time.sleep(5), seconds=1)["error"]
    assert bench.tried(lambda: {"a": 1}, seconds=5) == {"a": 1}
    watch = bench.Watch(1, 2, "cpu")
    watch.times = [time.perf_counter() - 2 * bench.STEPS_SECONDS] * 4
    assert not watch(None, None).any() and watch(None, None).all()  # not before the sixth token, then at once
