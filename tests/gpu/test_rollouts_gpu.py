"""Rollouts and gated training on a CUDA device: graphs, padding, bfloat16."""

import pytest
import tiny_models as tm
import torch

import bitsandheads as bh
from bitsandheads.gates.rollout import RolloutEngine
from bitsandheads.plan import Window
from bitsandheads.seam import enable_gates

pytestmark = pytest.mark.gpu


def gated(dtype):
    model = tm.make("qwen3")
    bh.disable(model)
    model = model.to("cuda", dtype)
    gates = enable_gates(model, Window(2, 6))
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([[1.0, 0.0], [0.5, 0.2]]))
    return model, gates


def prompts():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(2, 80, (n,), generator=draw).tolist() for n in (7, 30, 12, 90) * 12]


def test_graphs_change_nothing():
    model, _ = gated(torch.float32)
    outs = [RolloutEngine(model, 64, [7, 11], 0, graphs=g).generate(prompts(), 200, 1.0, 3) for g in (True, False)]
    same = sum(a == b for a, b in zip(outs[0].tokens, outs[1].tokens, strict=True))
    assert same >= 46, "rounding alone may turn a sample now and then"
    assert len({len(t) for t in outs[0].tokens}) > 10


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_rollouts_agree_with_a_training_pass(dtype, tolerance):
    model, gates = gated(dtype)
    engine = RolloutEngine(model, 64, [7, 11], 0)
    for change in (0.0, 0.3):  # the graphs read the gates' present values
        with torch.no_grad():
            gates.alpha[0, 0] -= change
        out = engine.generate(prompts(), 100, 1.0, 3)
        for prompt, tokens, logprobs in list(zip(prompts(), out.tokens, out.logprobs, strict=True))[:8]:
            with torch.no_grad():
                own = model(torch.tensor([prompt + tokens]).cuda()).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1].cpu()
            distance = own.gather(1, torch.tensor(tokens)[:, None])[:, 0] - torch.tensor(logprobs)
            assert distance.abs().mean() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_batches_have_finite_gradients(dtype):
    model, gates = gated(dtype)
    inputs = {k: v.cuda() for k, v in tm.left_padded([30, 20, 5]).items()}
    inputs["attention_mask"][0, -6:] = 0
    logits = model(**inputs).logits[inputs["attention_mask"].bool()].float()
    logits.square().mean().backward()
    assert logits.isfinite().all() and gates.alpha.grad.isfinite().all() and (gates.alpha.grad != 0).any()
