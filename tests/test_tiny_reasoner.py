"""The kept weights of the tiny reasoner solve held-out problems, and need more than a window of recent tokens for the long ones."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitsandheads as bh
from bitsandheads.plan import HeadGroup, Window
from bitsandheads.tasks import reasoning

FOLDER = Path(__file__).parents[1] / "models" / "tiny-reasoner"


@pytest.fixture(scope="module")
def reasoner():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(FOLDER)


def greedy(reasoner, problems, **options) -> list[str]:
    model, tokenizer = reasoner
    inputs = tokenizer([p.prompt for p in problems], padding=True, return_tensors="pt")
    most = max(len(reasoning.encode(p.solution)) for p in problems) + 8
    output = model.generate(**inputs, max_new_tokens=most, **options)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_files_are_small_and_the_tokenizer_is_the_generators(reasoner):
    assert (FOLDER / "model.safetensors").stat().st_size <= 16e6
    model, tokenizer = reasoner
    assert model.config.head_dim == 64 and model.config.num_key_value_heads == 4
    for sample in reasoning.samples("validation", 15):
        ids = tokenizer(sample.prompt)["input_ids"]
        assert ids == reasoning.encode(sample.prompt)
        assert tokenizer.decode(ids) == sample.prompt


def test_it_solves_held_out_problems_in_a_padded_batch(reasoner):
    problems = reasoning.samples("test", 12, seed=11, levels=[0, 1])
    written = greedy(reasoner, problems)
    assert sum(reasoning.score(p, text) for p, text in zip(problems, written, strict=True)) >= 11
    assert written[0] == problems[0].solution


def test_long_problems_need_more_than_the_window(reasoner):
    """The same problems with all heads whole and with all heads windowed."""
    model, _ = reasoner
    problems = reasoning.samples("test", 6, seed=11, levels=[2])
    windowed = bh.CachePlan("windowed", (HeadGroup(window=Window()),))
    whole = sum(map(reasoning.score, problems, greedy(reasoner, problems)))
    with bh.enabled(model):
        windowed = sum(map(reasoning.score, problems, greedy(reasoner, problems, past_key_values=bh.CompressedCache(windowed, model))))
    assert whole >= 5 and windowed <= 1
