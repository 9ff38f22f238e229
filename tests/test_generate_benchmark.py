"""The benchmark of whole models gives caches a prompt that was read once; they must hold what the prompt itself gives them."""

import importlib.util
import sys
from pathlib import Path

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
