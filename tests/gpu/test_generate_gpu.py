"""The whole road on a GPU: a model, its cache and the kernels, against the same cache on the reference backend."""

import pytest
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

import bitsandheads as bh
from bitsandheads import seam
from bitsandheads.graphs import CapturedSteps
from bitsandheads.plan import CachePlan, HeadGroup, Window

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def model(head_dim: int, dtype: torch.dtype):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        head_dim=head_dim, max_position_embeddings=8192, initializer_range=0.08,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).to("cuda", dtype).eval()


def plans() -> list:
    quant = bh.get_plan("balanced").groups[0].quant
    mixed = CachePlan("mixed", (HeadGroup((0,), quant=quant), HeadGroup((1,), window=Window(16, 64))))
    half = CachePlan("half", (HeadGroup((1,)), HeadGroup((0,), window=Window(16, 64))))
    return [bh.get_plan(n) for n in ("bf16", "balanced", "extreme", "kivi-2", "vidkv-1.5/1.58", "vidkv-1.5/1.66")] + [mixed, half]


@torch.no_grad()
def run(m, plan, backend: str, ids: torch.Tensor, mask: torch.Tensor, steps: list[int]) -> torch.Tensor:
    """Logits of the steps after a prompt that the reference packs, so that backends attend to the same bytes."""
    with bh.enabled(m):
        packs = any(g.quant is not None for g in plan.groups)
        cache = bh.CompressedCache(plan, m, backend="reference" if packs else backend)
        at = ids.shape[1] - sum(steps)
        m(ids[:, :at], attention_mask=mask[:, :at], past_key_values=cache)
        for layer in cache.compressed_layers():
            layer.backend = backend
            for store in layer.stores:
                store.backend = backend
        logits = []
        for n in steps:
            logits.append(m(ids[:, at : at + n], attention_mask=mask[:, : at + n], past_key_values=cache).logits.double())
            at += n
    return torch.cat(logits, 1)


@pytest.mark.parametrize("plan", plans(), ids=lambda p: p.name)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_logits_equal_the_reference_backend(plan, head_dim: int) -> None:
    m = model(head_dim, torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 512, (2, 1500), generator=generator).cuda()
    mask = torch.ones_like(ids)
    mask[1, :333] = 0
    steps = [1] * 20 + [4, 8, 50, 300] + [1] * 10
    got, want = run(m, plan, "auto", ids, mask, steps), run(m, plan, "reference", ids, mask, steps)
    assert ((got - want).norm() / want.norm()).item() < 0.03  # bf16 activations of three layers


def test_generate_under_the_bf16_plan_equals_dynamic_cache() -> None:
    m = model(128, torch.float32)
    ids = torch.randint(0, 512, (2, 300), generator=torch.Generator().manual_seed(2)).cuda()
    kwargs = dict(max_new_tokens=30, do_sample=False, pad_token_id=0)
    want = m.generate(ids, past_key_values=DynamicCache(config=m.config), **kwargs)
    bh.enable(m)
    assert torch.equal(m.generate(ids, past_key_values=bh.CompressedCache("bf16", m), **kwargs), want)


@torch.no_grad()
def test_the_allocator_agrees_with_the_plan() -> None:
    m = model(128, torch.bfloat16)
    ids = torch.randint(0, 512, (1, 8000), generator=torch.Generator().manual_seed(3)).cuda()
    bh.enable(m)
    for plan in ("bf16", "balanced"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = bh.CompressedCache(plan, m)  # the first cache of the loop is gone: see the end of its body
        m(ids, past_key_values=cache, logits_to_keep=1)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        assert abs(held - cache.memory_bytes(allocated=True)) < 2**20 + 0.02 * held
        assert abs(cache.memory_bytes() - cache.plan.bytes_for(m.config, 8000)) <= 0.01 * cache.memory_bytes()
        del cache


@pytest.mark.parametrize("name", ["balanced", "half"])
def test_captured_steps_give_what_steps_one_by_one_give(name: str, monkeypatch) -> None:
    """`generate` with CUDA graphs against the same without: two calls of different length, tiles packed on the way, one compiled step."""
    used: list[CapturedSteps] = []

    class Noted(CapturedSteps):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            used.append(self)

    monkeypatch.setattr(seam, "CapturedSteps", Noted)
    m = model(64, torch.float32)
    bh.enable(m)
    plan = {p.name: p for p in plans()}[name]
    ids = torch.randint(0, 512, (2, 800), generator=torch.Generator().manual_seed(4)).cuda()
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    more = torch.randint(0, 512, (2, 5), generator=torch.Generator().manual_seed(5)).cuda()
    results = []
    for compiled in (False, True):
        cache = bh.CompressedCache(plan, m, capacity=1300)
        kwargs = dict(past_key_values=cache, do_sample=False, pad_token_id=0, disable_compile=not compiled)
        kwargs |= dict(return_dict_in_generate=True, output_logits=True)
        first = m.generate(ids, attention_mask=mask, max_new_tokens=200, min_new_tokens=200, **kwargs)
        longer = torch.cat([first.sequences, more], 1)
        seen = torch.cat([mask, mask.new_ones(2, 205)], 1)
        second = m.generate(longer, attention_mask=seen, max_new_tokens=150, min_new_tokens=150, **kwargs)
        results.append((second.sequences, torch.stack(first.logits + second.logits, 1)))
        assert cache.running
    assert [steps.works and steps.captured[False] is not None for steps in used] == [True, True]
    assert name == "half" or all(True in steps.captured for steps in used)  # steps that pack
    same = int((results[0][0] == results[1][0]).all(0).int().cumprod(0).sum())
    assert same >= 900, f"tokens differ from {same} on"
    assert (results[0][1][:, :90] - results[1][1][:, :90]).abs().max() < 0.05
