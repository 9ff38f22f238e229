"""Cheap head scores: attention mass, output error and random scores, against their definitions written out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tm
import torch
import transformers

import bitsandheads as bh
from bitsandheads import Window
from bitsandheads.headfinding import Sequence, ablation_scores, clip_sequences, mass, mass_scores, random_scores, solve, text_sequences
from bitsandheads.headfinding.sequences import SequenceError
from bitsandheads.tasks import video

WINDOW = Window(2, 5)


def model_and_sequences(name: str = "qwen3"):
    model = tm.make(name, dtype=torch.float64)
    sequences = [Sequence(tuple(tm.tokens(1, n, seed=n)[0].tolist()), p) for n, p in ((30, 9), (17, 12), (24, 3), (6, 2))]
    return model, sequences


def beyond(n: int, prompt: int) -> torch.Tensor:
    """bool [n, n]: key j was dropped by a windowed head before query i, which comes after the prompt."""
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    return (j <= i) & (j >= WINDOW.sink) & (j <= i - WINDOW.recent) & (i >= prompt)


@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma3"])
@pytest.mark.parametrize("elements", [1, 1 << 26])
def test_mass_is_the_attention_beyond_the_window(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mass, "SCORES", elements)  # one query at a time, or all at once
    model, sequences = model_and_sequences(name)
    got = mass_scores(model, sequences, WINDOW, batch_size=3)
    bh.disable(model)
    model.set_attn_implementation("eager")
    total, count = torch.zeros(2, 4, dtype=torch.float64), 0
    for s in sequences:
        weights = torch.cat(model(torch.tensor([s.ids]), output_attentions=True).attentions).double()  # [layers, query heads, n, n]
        far = beyond(len(s.ids), s.prompt)
        total += (weights * far).sum((2, 3))
        count += int(far.any(1).sum())
    want = (total / count).view(2, 2, 2).amax(2)[[1] if name == "gemma3" else [0, 1]]
    assert want.min() > 0.01
    np.testing.assert_allclose(got.values, want.numpy(), rtol=1e-5)
    assert (got.method, got.sink, got.recent) == ("mass", 2, 5)
    got.check(model)


def step_by_step(model, s: Sequence, plan) -> torch.Tensor:
    """Log-probabilities of the tokens that are predicted, through a real cache of the plan, one token at a time."""
    cache = bh.CompressedCache(plan, model)
    ids, inputs = torch.tensor([s.ids]), {name: x[None] for name, x in s.inputs.items()}
    logits = [model(ids[:, : s.prompt], past_key_values=cache, logits_to_keep=1, **inputs).logits[0]]
    logits += [model(ids[:, i : i + 1], past_key_values=cache).logits[0] for i in range(s.prompt, len(s.ids) - 1)]
    return torch.cat(logits)[s.predicted - s.prompt :].log_softmax(-1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_ablation_is_the_error_of_a_cache_that_windows_this_head(name: str) -> None:
    model, sequences = model_and_sequences(name)
    ticks: list[int] = []
    got = ablation_scores(model, sequences, WINDOW, batch_size=3, tick=ticks.append)
    assert sum(ticks) == len(sequences) * 2
    full = torch.cat([step_by_step(model, s, "bf16") for s in sequences])
    for layer in range(2):
        for head in range(2):
            scores = np.ones((2, 2))
            scores[layer, head] = 0
            plan = bh.rlkv(bh.HeadScores(scores), 0.25, WINDOW)
            windowed = torch.cat([step_by_step(model, s, plan) for s in sequences])
            kl = (full.exp() * (full - windowed)).sum(-1).mean()
            assert kl > 1e-4
            assert got.values[layer, head] == pytest.approx(float(kl), rel=1e-4)


def test_a_head_without_an_effect_scores_zero() -> None:
    model, sequences = model_and_sequences("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * 64 :] = 0  # the query heads of KV head 1
    values = ablation_scores(model, sequences, WINDOW).values
    assert values[1, 1] == pytest.approx(0, abs=1e-12) and (np.delete(values.ravel(), 3) > 1e-4).all()


@torch.no_grad()
def test_ablation_on_questions_about_clips() -> None:
    """Two clips of a model that sees, padded to one length; a later turn asks, and only its answer counts."""
    folder = Path(__file__).parents[1] / "models" / "tiny-video"
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    bh.enable(model)
    samples = sorted(video.samples(6, "train", 8, per_clip=1), key=lambda s: len(s.prompt.split()))[::5]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sequences = clip_sequences(model.config, tokenizer, samples, torch.float64)
    for s, sample in zip(sequences, samples, strict=True):
        assert tokenizer.decode(s.ids[s.predicted :]) == f"{sample.answer} <end>"
        assert tokenizer.decode(s.ids[s.prompt : s.predicted]).startswith("<user> ")
    assert len({len(s.ids) for s in sequences}) == 2
    got = ablation_scores(model, sequences, WINDOW)
    full = torch.cat([step_by_step(model, s, "bf16") for s in sequences])
    assert len(full) == 4
    order = got.values.ravel().argsort()[::-1]
    for layer, head in (divmod(int(i), 2) for i in order[:2]):
        scores = np.ones((6, 2))
        scores[layer, head] = 0
        windowed = torch.cat([step_by_step(model, s, bh.rlkv(bh.HeadScores(scores), 1 / 12, WINDOW)) for s in sequences])
        kl = (full.exp() * (full - windowed)).sum(-1).mean()
        assert got.values[layer, head] == pytest.approx(float(kl), rel=1e-4, abs=2e-7) and kl > 4e-6


def test_random_scores_are_the_seeds() -> None:
    model = tm.make("qwen3")
    a, b = random_scores(model, 1), random_scores(model.config, 1)
    assert np.array_equal(a.values, b.values) and a.seed == 1 and a.method == "random"
    assert not np.array_equal(a.values, random_scores(model, 2).values)


def test_solve_continues_greedily() -> None:
    model = tm.make("qwen3")
    prompts = [tm.tokens(1, n, seed=n)[0].tolist() for n in (9, 4, 15)]
    found = solve(model, prompts, 7, end=[3], batch=2)
    assert [s.prompt for s in found] == [9, 4, 15]
    for s, prompt in zip(found, prompts, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False, eos_token_id=3, pad_token_id=0)[0].tolist()
        assert list(s.ids) == out
    with pytest.raises(bh.PlanError, match="full attention"):
        solve(tm.make("gemma3"), prompts, 7, end=[3])


def test_pieces_of_a_text() -> None:
    pieces = text_sequences(range(100), 20, 8, 3)
    assert [(s.ids[0], len(s.ids), s.prompt) for s in pieces] == [(0, 20, 8), (40, 20, 8), (80, 20, 8)]
    with pytest.raises(SequenceError, match="longer text"):
        text_sequences(range(10), 20, 8, 3)
    with pytest.raises(SequenceError, match="at least one token"):
        text_sequences(range(100), 20, 20, 1)
    with pytest.raises(SequenceError, match="begins after the prompt"):
        replace(pieces[0], answer=20)


@pytest.mark.parametrize("find", [mass_scores, ablation_scores])
def test_sequences_inside_the_window_are_refused(find) -> None:
    model, sequences = model_and_sequences()
    with pytest.raises(SequenceError, match="a smaller window"):
        find(model, sequences, Window(10, 20))


def test_the_model_keeps_its_attention() -> None:
    model, sequences = model_and_sequences()
    before = model.config._attn_implementation
    mass_scores(model, sequences, WINDOW)
    assert model.config._attn_implementation == before
    tm.same(model, tm.inputs_for(tm.tokens(1, 20)), "bf16", new=3)
