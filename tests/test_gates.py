"""Gated attention, rollouts, the penalty, rewards, curriculum, distillation, memory estimate."""

import json
import math

import planted
import pytest
import tiny_models as tm
import torch

import bitsandheads as bh
from bitsandheads.errors import CacheStateError, FileFormatError, ModelMismatchError, PlanError
from bitsandheads.gates.attention import local_mask
from bitsandheads.gates.config import TrainConfig, load_config
from bitsandheads.gates.curriculum import Spread, build
from bitsandheads.gates.distill import DistillConfig, distill, passkey_batches, solution_batches
from bitsandheads.gates.memory import estimate
from bitsandheads.gates.problems import get_reward, math_reward, read_problems
from bitsandheads.gates.rollout import RolloutEngine
from bitsandheads.plan import Window
from bitsandheads.seam import disable_gates, enable_gates
from bitsandheads.tasks import Sample

WINDOW = Window(sink=2, recent=6)


@pytest.fixture
def gated():
    model = tm.make("qwen3")
    bh.disable(model)
    gates = enable_gates(model, WINDOW)
    yield model, gates
    disable_gates(model)


def mix(gates):
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.2]]))


def written_out(q, k, v, real, alpha, scale):
    """Gated attention of one sequence in loops: q [H_q, T, D], k, v [H_kv, T, D], real [T]."""
    out = torch.zeros_like(q)
    positions = real.cumsum(0) - 1
    for h in range(q.shape[0]):
        kv = h // (q.shape[0] // k.shape[0])
        for t in range(q.shape[1]):
            seen = [j for j in range(t + 1) if real[j]]
            near = [j for j in seen if positions[j] < WINDOW.sink or positions[j] > positions[t] - WINDOW.recent]
            for columns, weight in ((seen, alpha[kv]), (near, 1 - alpha[kv])):
                if columns:
                    out[h, t] += weight * ((q[h, t] @ k[kv, columns].T * scale).softmax(-1) @ v[kv, columns])
    return out


@pytest.mark.parametrize("padding", [(0, 0), (5, 0), (0, 4), (3, 2)])
def test_gated_attention_is_what_the_paper_writes(gated, padding):
    _, gates = gated
    mix(gates)
    q, k, v = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    real = torch.ones(20, dtype=torch.bool)
    real[: padding[0]] = False
    real[20 - padding[1] :] = False
    mask = torch.ones(20, 20, dtype=torch.bool).tril() & real
    out = gates(1, q, k, v, mask[None, None], 0.25)
    expected = written_out(q[0], k[0], v[0], real, gates.alpha[1], 0.25)
    torch.testing.assert_close(out[0][:, real], expected[:, real])
    if not any(padding):
        torch.testing.assert_close(gates(1, q, k, v, None, 0.25), out)
        torch.testing.assert_close(gates(1, q[:, :, 10:], k, v, None, 0.25), out[:, :, 10:])


def test_the_window_of_a_query_is_the_caches():
    mask = torch.ones(12, 12, dtype=torch.bool).tril()[None, None]
    seen = local_mask(mask, WINDOW)[0, 0]
    for t in range(12):
        assert seen[t].nonzero().squeeze(1).tolist() == [j for j in range(t + 1) if j < WINDOW.sink or j > t - WINDOW.recent]


def test_decoding_with_padding_equals_a_pass_over_all_tokens(gated):
    model, gates = gated
    mix(gates)
    inputs = tm.left_padded([30, 20, 5])
    tokens, logits = tm.generate(model, inputs, None, 12)
    mask = torch.cat((inputs["attention_mask"], torch.ones(3, 12, dtype=torch.long)), 1)
    again = model(tokens, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 29:-1]
    torch.testing.assert_close(again, logits, atol=2e-5, rtol=1e-4)


def test_gates_of_one_change_nothing_and_are_taken_off_again():
    model = tm.make("qwen3")
    bh.disable(model)
    inputs = tm.left_padded([30, 20, 5])
    expected = model(**inputs).logits
    before, names = model.config._attn_implementation, [n for n, _ in model.named_parameters()]
    gates = enable_gates(model, WINDOW)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[real], expected[real], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        gates.alpha.zero_()
    assert (model(**inputs).logits[real] - expected[real]).abs().max() > 0.1
    with pytest.raises(ModelMismatchError, match="has gates"):
        enable_gates(model, WINDOW)
    disable_gates(model)
    assert torch.equal(model(**inputs).logits, expected)
    assert model.config._attn_implementation == before and [n for n, _ in model.named_parameters()] == names


def test_only_the_gates_have_gradients_with_and_without_checkpointing(gated):
    model, gates = gated
    mix(gates)
    inputs = tm.left_padded([30, 20])
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model(**inputs).logits.square().mean().backward()
        found.append(gates.alpha.grad.clone())
        gates.alpha.grad = None
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] != 0).all()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["head_gates.alpha"]
    step = 1e-3
    for layer, head in ((0, 1), (1, 0)):
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                gates.alpha[layer, head] += sign * step
                losses.append(model(**inputs).logits.double().square().mean())
                gates.alpha[layer, head] -= sign * step
        assert found[0][layer, head].item() == pytest.approx(((losses[0] - losses[1]) / (2 * step)).item(), rel=0.05, abs=1e-3)


def test_gates_stay_float32_and_clamp(gated):
    model, gates = gated
    model.to(torch.bfloat16)
    assert gates.alpha.dtype == torch.float32
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[1.5, -0.5], [0.3, 1.0]]))
    gates.clamp_()
    assert gates.alpha.tolist() == [[1.0, 0.0], [pytest.approx(0.3), 1.0]]


@pytest.mark.parametrize("name", ["mistral-sliding", "gemma3", "qwen3-next"])
def test_models_with_other_layers_are_refused(name):
    model = tm.make(name)
    with pytest.raises(ModelMismatchError, match="no plain full attention"):
        enable_gates(model, WINDOW)
    with pytest.raises(PlanError, match="full attention"):
        RolloutEngine(model, 4, [1], 0)


# -- rollouts -----------------------------------------------------------------------------------------------------------------------


def prompts_of(lengths, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 80, (n,), generator=draw).tolist() for n in lengths]


def test_rollouts_agree_with_the_models_own_log_probabilities(gated):
    model, gates = gated
    mix(gates)
    prompts = prompts_of((30, 20, 5, 12, 9))
    out = RolloutEngine(model, 8, [7, 11], 0).generate(prompts, 140, 0.7, 3)
    assert len({len(t) for t in out.tokens}) > 2
    for prompt, tokens, logprobs in zip(prompts, out.tokens, out.logprobs, strict=True):
        assert tokens[-1] in (7, 11) or len(tokens) == 140
        assert not {7, 11} & set(tokens[:-1])
        with torch.no_grad():
            own = (model(torch.tensor([prompt + tokens])).logits[0] / 0.7).log_softmax(-1)[len(prompt) - 1 : -1]
        torch.testing.assert_close(own.gather(1, torch.tensor(tokens)[:, None])[:, 0], torch.tensor(logprobs), atol=1e-4, rtol=1e-4)


def test_rollouts_do_not_depend_on_the_batch(gated):
    model, gates = gated
    mix(gates)
    prompts = prompts_of([7, 30, 12] * 7)
    expected = RolloutEngine(model, 64, [7, 11, 13], 0).generate(prompts, 60, 1.0, (1, 2))
    for batch in (5, 32):
        assert RolloutEngine(model, batch, [7, 11, 13], 0).generate(prompts, 60, 1.0, (1, 2)).tokens == expected.tokens
    engine = RolloutEngine(model, 32, [7, 11, 13], 0)
    assert engine.generate(prompts, 60, 1.0, (1, 3)).tokens != expected.tokens
    assert engine.generate(prompts, 60, 1.0, (1, 2)).tokens == expected.tokens, "buffers of the call before leak"
    assert sum(len(t) < 60 for t in expected.tokens) > 5


def test_greedy_rollouts_are_transformers_own(gated):
    model, _ = gated
    prompts = prompts_of((30, 8))
    out = RolloutEngine(model, 2, [7], 0).generate(prompts, 40, 0.0)
    for prompt, tokens in zip(prompts, out.tokens, strict=True):
        ids = torch.tensor([prompt])
        own = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40, eos_token_id=7, pad_token_id=0)
        assert own[0, len(prompt) :].tolist() == tokens


def test_sampling_follows_the_probabilities(gated):
    model, _ = gated
    prompt = prompts_of((10,))[0]
    with torch.no_grad():
        probabilities = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    tokens = RolloutEngine(model, 2000, [7], 0).generate([prompt] * 2000, 1, 1.0, 5).tokens
    found = torch.bincount(torch.tensor(tokens)[:, 0], minlength=96) / 2000
    assert (found - probabilities).abs().sum() < 0.2
    expected = sum(math.sqrt(p * (1 - p) / 2000) for p in probabilities.tolist())
    assert (found - probabilities).abs().sum() < 2 * expected


def test_rollouts_refuse_what_cannot_be(gated):
    model, _ = gated
    engine = RolloutEngine(model, 2, [7], 0)
    for prompts, new in (([[]], 5), ([[3] * 1000], 100)):
        with pytest.raises(CacheStateError, match="positions"):
            engine.generate(prompts, new)


# -- rewards, problems, configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "output", "expected"),
    [
        ("1/2", r"so \boxed{\frac{1}{2}}", 1.0),
        ("0.5", r"\boxed{1/2}", 1.0),
        ("12", r"It is \boxed{12\text{ cm}}.", 1.0),
        ("12", r"\boxed{12} no, it is \boxed{7}", 0.0),
        (r"\frac{3}{4}", "The answer is 0.75", 1.0),
        ("x+1", r"\boxed{1+x}", 1.0),
        ("(1,2)", r"\boxed{(1,2)}", 1.0),
        ("(1,2)", r"\boxed{(2,1)}", 0.0),
        ("5", "I do not know", 0.0),
        ("5", r"\boxed{\frac{}{}}", 0.0),
    ],
)
def test_math_reward(answer, output, expected):
    assert math_reward(Sample("a", "?", answer), output) == expected


def test_rewards_by_name():
    assert get_reward("planted:score")(Sample("a", "?", "x"), "x") == 1.0
    for name in ("maths", "planted:nothing", "no_such_module:f"):
        with pytest.raises(PlanError, match=r"math.*module:function"):
            get_reward(name)


def test_problem_files(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"prompt": "1+1", "answer": 2, "source": "x"}\n\n{"prompt": "2+2", "answer": "4", "id": "b", "level": 3}\n')
    assert read_problems(path) == [Sample("1", "1+1", "2"), Sample("b", "2+2", "4", level=3)]
    for text, message in (('{"prompt": "1"}\n', "line 1"), ("[1]\n", "line 1"), ("x\n", "line 1"), ("\n", "no problems")):
        path.write_text(text)
        with pytest.raises(FileFormatError, match=message):
            read_problems(path)
    with pytest.raises(FileFormatError, match="reasoning:train"):
        read_problems(tmp_path / "none")
    assert len(read_problems("reasoning:train:5:0")) == 5


def test_configurations(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("steps: 3\npenalty: micro_batch\n")
    config = load_config(TrainConfig, path, seed=4, reward=None)
    assert config == TrainConfig(steps=3, penalty="micro_batch", seed=4)
    (tmp_path / "c.json").write_text(config.to_json())
    assert load_config(TrainConfig, tmp_path / "c.json") == config
    for text, message in (
        ("stepz: 3", "stepz"),
        ("steps: 0", "steps"),
        ("penalty: x", "penalty"),
        ("[1]", "may set"),
        ("a: [", "no config"),
    ):
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            load_config(TrainConfig, path)
    with pytest.raises(PlanError, match="micro_batch"):
        TrainConfig(questions=3, samples=2, micro_batch=4).accumulation(1)


# -- curriculum ---------------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_curriculum_keeps_what_is_solved_and_resumes(tmp_path):
    """The 'model' answers with as many tokens as the problem's level says; problem ids divisible by 5 are answered wrongly."""
    problems = [Sample(str(i), f"p{i}", "yes", level=i % 40 + 1) for i in range(200)]
    calls = []

    class Engine:
        batch = 30

        def generate(self, prompts, new, temperature):
            calls.append([p[0] for p in prompts])
            assert (new, temperature) == (40, 0.0)
            if len(calls) == 4:
                raise Killed

            class Out:
                tokens = [[p[0]] * problems[p[0]].level for p in prompts]  # noqa: RUF012

            return Out

    def run():
        return build(
            Engine(), lambda s: [int(s.id)], lambda ids: "no" if ids[0] % 5 == 0 else "yes", lambda s, text: float(text == s.answer),
            problems, tmp_path / "out.jsonl", Spread((10, 20, 40), (7, 20, 1000)), seed=1,
        )  # fmt: skip

    with pytest.raises(Killed):
        run()
    assert not (tmp_path / "out.jsonl").exists()
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text()[:-9])  # cut off inside a line
    counts = run()
    assert calls[4][0] == 89, "the problems that were done are not solved again"
    assert sum(len(set(c)) for i, c in enumerate(calls) if i != 3) == 201, "one was done twice: its line was cut off"
    chosen = read_problems(tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert counts == [7, 20, 80] and len(chosen) == 107
    assert all(int(c.id) % 5 for c in chosen)
    assert [r["output_tokens"] for r in rows] == [c.level for c in chosen]
    assert not partial.exists()
    partial.write_text('{"problems": 3}\n')
    with pytest.raises(FileFormatError, match="another"):
        run()


def test_spreads_are_checked():
    assert [Spread().bin(n) for n in (1, 2048, 2049, 8192)] == [0, 0, 1, 3]
    with pytest.raises(PlanError, match="growing"):
        Spread((10, 5), (1, 1))


# -- distillation -------------------------------------------------------------------------------------------------------------------


def test_passkey_texts():
    config = DistillConfig(length=200, passkeys=3, passkey_tokens=8, cue=2, batch=2)
    ids, mask, counts = next(passkey_batches(list(range(100, 1000)), config))
    assert ids.shape == (2, 200) and mask.all() and counts.sum(1).tolist() == [18, 18]
    for row in ids.tolist():
        text, keys = row[:-24], row[-24:]
        for i in range(3):
            key = keys[8 * i : 8 * (i + 1)]
            assert any(text[j : j + 8] == key for j in range(len(text)))
    with pytest.raises(CacheStateError, match="longer text"):
        next(passkey_batches([1, 2, 3], config))


def test_distillation_finds_the_head_that_the_task_needs():
    model, tokenizer = planted.model(), planted.tokenizer()
    pairs = [(tokenizer(p.prompt)["input_ids"], tokenizer(p.answer + "<eos>")["input_ids"]) for p in planted.problems(64, 2)]
    config = DistillConfig(sink=planted.SINK, recent=planted.RECENT, steps=40, batch=16, learning_rate=0.05, gradient_checkpointing=True)
    scores = distill(model, solution_batches(pairs, config), config, data="recall")
    assert scores.method == "duo" and (scores.sink, scores.recent) == (planted.SINK, planted.RECENT)
    others = [v for i, row in enumerate(scores.values) for j, v in enumerate(row) if (i, j) != planted.HEAD]
    assert scores.values[planted.HEAD] > 0.5 and max(others) < 0.2
    assert model.config._attn_implementation == "sdpa"


# -- memory -------------------------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_weights_and_cache_exactly():
    model = tm.make("qwen3")
    config = TrainConfig(rollout_batch=4, max_new_tokens=100)
    found = estimate(model.config, config, prompt=28, dtype_bytes=4)
    assert found.weights == sum(p.numel() * 4 for p in model.parameters())
    engine = RolloutEngine(model, 4, [7], 0)
    engine.generate(prompts_of((28, 3)), 100, 0.0)
    cache = engine.state.cache
    assert found.cache == sum(t.nbytes for t in (*cache.keys, *cache.values))
    assert found.total > found.weights + found.cache + found.training
