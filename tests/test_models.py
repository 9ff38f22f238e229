"""The whole contract with transformers, on tiny random models of its own classes. Longer than other files: it is run as one on the oldest transformers."""

import dataclasses

import pytest
import tiny_models as tm
import torch

import bitsandheads as bh
from bitsandheads.ops import long_chunks
from bitsandheads.quant.spec import AxisClass, KVQuant, TensorQuant

TWO = TensorQuant((AxisClass(2, 1.0, "minmax"),))
SMALL = KVQuant(TWO, TWO, group_size=16, tile=16, residual=16, sink=4, basis_tokens=16)
EIGHT = (AxisClass(6, 1.0, "minmax"),)
FINE = KVQuant(TensorQuant(EIGHT), TensorQuant(EIGHT), group_size=16, tile=16, residual=16, sink=4, basis_tokens=16)


def small(plan: str) -> bh.CachePlan:
    """A preset whose sink, residual and first basis are so short that a tiny prompt is packed."""
    preset = bh.get_plan(plan)
    groups = []
    for g in preset.groups:
        short = {} if g.quant is None else {"residual": 8, "sink": min(g.quant.sink, 4), "basis_tokens": g.quant.tile}
        groups.append(dataclasses.replace(g, quant=g.quant and dataclasses.replace(g.quant, **short)))
    return dataclasses.replace(preset, groups=tuple(groups))


MIXED = bh.CachePlan(
    "mixed",
    (bh.HeadGroup((0,), quant=SMALL), bh.HeadGroup((1,), window=bh.Window(4, 8))),
    {1: (bh.HeadGroup((1,), quant=SMALL), bh.HeadGroup((0,)))},
)


# -- equality with transformers' own cache ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tm.MODELS)
def test_bf16_plan_equals_dynamic_cache(name: str) -> None:
    model = tm.make(name)
    tm.same(model, tm.inputs_for(tm.tokens(2, 20)), "bf16", new=12)
    tm.same(model, tm.left_padded([20, 7, 1]), "bf16", new=12)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bf16_plan_in_every_dtype_and_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    model = tm.make("llama", dtype=dtype, head_dim=head_dim)
    tm.same(model, tm.left_padded([9, 4]), "bf16", new=4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bf16_plan_with_either_attention(implementation: str) -> None:
    model = tm.make("llama")
    bh.disable(model)
    model.set_attn_implementation(implementation)
    bh.enable(model)
    assert model.config._attn_implementation.endswith(implementation)
    tm.same(model, tm.left_padded([20, 7, 1]), "bf16")


@pytest.mark.parametrize("plan", ["kivi-2", "balanced", "vidkv-1.5/1.66"])
def test_short_prompts_stay_whole(plan: str) -> None:
    """Nothing is packed yet, so the answer is DynamicCache's, bit for bit."""
    tm.same(tm.make("llama"), tm.inputs_for(tm.tokens(2, 20)), plan)


def test_padded_short_prompts_stay_nearly_exact() -> None:
    model, inputs = tm.make("llama"), tm.left_padded([20, 7, 1])
    expected, logits = tm.generate(model, inputs, tm.dynamic(model))
    got, got_logits = tm.generate(model, inputs, bh.CompressedCache("balanced", model))
    assert torch.equal(got, expected)
    torch.testing.assert_close(got_logits, logits, atol=1e-4, rtol=1e-4)


def test_right_padded_prompts() -> None:
    """Real tokens may come first: each row then goes on from its own end, as without its padding."""
    model = tm.make("llama")
    ids, lengths = tm.tokens(2, 40), [40, 25]
    mask = (torch.arange(40)[None] < torch.tensor(lengths)[:, None]).long()
    more = tm.tokens(2, 3, seed=5)
    cache = bh.CompressedCache(bh.CachePlan("fine", (bh.HeadGroup(quant=FINE),)), model)
    model(ids, attention_mask=mask, past_key_values=cache)
    assert cache.compressed_layers()[0].real_tokens() == lengths
    both = torch.cat([mask, torch.ones(2, 3, dtype=torch.long)], 1)
    positions = torch.tensor(lengths)[:, None] + torch.arange(3)
    got = model(more, attention_mask=both, position_ids=positions, past_key_values=cache).logits
    for b, n in enumerate(lengths):
        alone = bh.CompressedCache(cache.plan, model)
        model(ids[b : b + 1, :n], past_key_values=alone)
        torch.testing.assert_close(model(more[b : b + 1], past_key_values=alone).logits[0], got[b], atol=2e-3, rtol=1e-3)


# -- every plan generates ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*bh.preset_names(), MIXED], ids=lambda p: getattr(p, "name", p))
def test_every_plan_generates_and_packs(plan: "str | bh.CachePlan") -> None:
    model = tm.make("llama")
    plan = small(plan) if isinstance(plan, str) else plan
    cache = bh.CompressedCache(plan, model)
    _, logits = tm.generate(model, tm.left_padded([170, 150]), cache, new=12)
    assert logits.isfinite().all()
    assert cache.get_seq_length() == 181
    if any(g.quant is not None for g in plan.groups):
        assert cache.memory().in_use["codes"] > 0


@pytest.mark.parametrize("name", [n for n in tm.MODELS if n != "mistral-sliding"])
def test_every_model_generates_from_packed_heads(name: str) -> None:
    """At six bits a channel the answer stays close to full precision's; the packed tokens are really used."""
    model = tm.make(name)
    inputs = tm.left_padded([60, 44])
    cache = bh.CompressedCache(bh.CachePlan("fine", (bh.HeadGroup(quant=FINE),)), model)
    _, got = tm.generate(model, inputs, cache, new=6)
    assert cache.memory().in_use["codes"] > 0
    bh.disable(model)
    _, expected = tm.generate(model, inputs, tm.dynamic(model), new=6)
    assert 0 < (got - expected)[:, 1].norm() < 0.1 * expected[:, 1].norm()


def test_only_sliding_layers() -> None:
    model = tm.make("mistral-sliding")
    cache = bh.CompressedCache("balanced", model)
    tm.generate(model, tm.inputs_for(tm.tokens(1, 40)), cache)
    assert cache.compressed_layers() == [] and cache.memory_bytes() == 0


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_heads_in_every_dtype_and_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    model = tm.make("llama", dtype=dtype, head_dim=head_dim, num_hidden_layers=1)
    for plan in ("balanced", "vidkv-1.5/1.66"):
        cache = bh.CompressedCache(small(plan), model)
        _, logits = tm.generate(model, tm.left_padded([150, 145]), cache, new=3)
        assert logits.dtype is torch.float32 or logits.dtype is dtype
        assert logits.isfinite().all() and cache.memory().in_use["codes"] > 0


def test_whole_tokens_in_a_dtype_of_their_own() -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache("bf16", model, dtype=torch.bfloat16)
    inputs = tm.inputs_for(tm.tokens(2, 30))
    _, got = tm.generate(model, inputs, cache)
    assert cache.memory_bytes() == 2 * 37 * 2 * 2 * 2 * 64 * 2  # sequences, tokens, layers, heads, k and v, head_dim, bytes
    _, expected = tm.generate(model, inputs, tm.dynamic(model))
    torch.testing.assert_close(got[:, 1], expected[:, 1], atol=0.2, rtol=0.1)


# -- ways of generating --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_beam_search(name: str) -> None:
    model = tm.make(name)
    for inputs in (tm.inputs_for(tm.tokens(2, 20)), tm.left_padded([20, 9])):
        options = dict(max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
        expected = model.generate(**inputs, past_key_values=tm.dynamic(model), **options)
        assert torch.equal(model.generate(**inputs, past_key_values=bh.CompressedCache("bf16", model), **options), expected)


def test_beam_search_reorders_packed_heads() -> None:
    """Beams over a packed prompt score as each sequence scores alone, teacher-forced from the same packed prompt."""
    model, plan = tm.make("llama"), bh.CachePlan("fine", (bh.HeadGroup(quant=FINE),))
    ids = tm.tokens(2, 60)
    out = model.generate(
        ids, past_key_values=bh.CompressedCache(plan, model), max_new_tokens=30, num_beams=3, num_return_sequences=3,
        do_sample=False, pad_token_id=0, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    for i, sequence in enumerate(out.sequences):
        cache = bh.CompressedCache(plan, model)
        steps = [model(sequence[None, :60], past_key_values=cache).logits[:, -1:]]
        steps += [model(sequence[None, t : t + 1], past_key_values=cache).logits for t in range(60, 89)]
        scores = torch.cat(steps, 1).log_softmax(-1)[0].gather(-1, sequence[60:, None]).sum()
        torch.testing.assert_close(scores, out.sequences_scores[i], atol=0.02, rtol=1e-3)


def test_sampling_several_sequences_with_a_seed() -> None:
    model, inputs = tm.make("llama"), tm.left_padded([20, 9])
    outs = []
    for cache in (tm.dynamic(model), bh.CompressedCache("bf16", model)):
        torch.manual_seed(7)
        outs.append(tm.generate(model, inputs, cache, do_sample=True, num_return_sequences=3))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])
    assert len({tuple(row) for row in outs[0][0][:3].tolist()}) > 1


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_assisted_decoding(name: str) -> None:
    model, assistant = tm.make(name), tm.make(name, seed=3)
    inputs, options = tm.inputs_for(tm.tokens(1, 14)), dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    try:
        expected = model.generate(**inputs, past_key_values=tm.dynamic(model), assistant_model=assistant, **options)
    except RuntimeError as error:  # transformers 5.16 and sliding layers
        pytest.skip(f"transformers' own cache cannot do it: {error}")
    cache = bh.CompressedCache("bf16", model)
    assert torch.equal(model.generate(**inputs, past_key_values=cache, assistant_model=assistant, **options), expected)
    assert cache.get_seq_length() == tm.tokens(1, 14).shape[1] + 23


@pytest.mark.parametrize("plan", ["bf16", MIXED], ids=lambda p: getattr(p, "name", p))
def test_prompt_lookup_with_packed_history(plan: "str | bh.CachePlan") -> None:
    """Candidates are taken back by crop; windowed heads step back within their rollback, packed ones open a tile again."""
    model = tm.make("llama")
    ids = tm.tokens(1, 10).repeat(1, 6)
    cache = bh.CompressedCache(plan, model)
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, prompt_lookup_num_tokens=4)
    out = model.generate(ids, past_key_values=cache, **options)
    assert out.shape[1] == 84 and cache.get_seq_length() == 83
    if plan == "bf16":
        assert torch.equal(out, model.generate(ids, past_key_values=tm.dynamic(model), **options))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
def test_second_user_turn(name: str) -> None:
    model = tm.make(name)
    first, second = tm.tokens(2, 20), tm.tokens(2, 6, seed=4)
    outs = []
    for cache in (tm.dynamic(model), bh.CompressedCache("bf16", model)):
        ids, _ = tm.generate(model, tm.inputs_for(first), cache, new=5)
        outs.append(tm.generate(model, tm.inputs_for(torch.cat([ids, second], 1)), cache, new=5))
    assert torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][1], outs[1][1])


def test_second_user_turn_over_a_packed_history() -> None:
    """A turn of several tokens at once sees what the same tokens see one by one."""
    model, plan = tm.make("llama"), bh.CachePlan("fine", (bh.HeadGroup(quant=FINE),))
    first, second = tm.tokens(2, 52), tm.tokens(2, 7, seed=4)
    together, alone = bh.CompressedCache(plan, model), bh.CompressedCache(plan, model)
    for cache in (together, alone):
        model(first, past_key_values=cache)
        assert cache.memory().in_use["codes"] > 0
    at_once = model(second, past_key_values=together).logits
    one_by_one = torch.cat([model(second[:, i : i + 1], past_key_values=alone).logits for i in range(7)], 1)
    torch.testing.assert_close(at_once, one_by_one, atol=1e-3, rtol=1e-3)


def chunked(model, cache, ids: torch.Tensor, mask: torch.Tensor, chunk: int) -> torch.Tensor:
    """Logits of all positions, the prompt given in chunks."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    parts = [
        model(
            ids[:, i : i + chunk], attention_mask=mask[:, : i + chunk], position_ids=positions[:, i : i + chunk], past_key_values=cache
        ).logits
        for i in range(0, ids.shape[1], chunk)
    ]
    return torch.cat(parts, 1)


WIDE = bh.CachePlan("wide", (bh.HeadGroup((0,), window=bh.Window(4, 64)), bh.HeadGroup((1,))))
KEEPING = bh.CachePlan("keeping", (bh.HeadGroup(quant=dataclasses.replace(SMALL, residual=64)),))


@pytest.mark.parametrize("plan", ["bf16", WIDE, KEEPING], ids=lambda p: getattr(p, "name", p))
@pytest.mark.parametrize("lengths", [[50, 50], [50, 23, 3]], ids=str)
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunked_prefill_equals_one_prefill(plan: "str | bh.CachePlan", lengths: list[int], chunk: int) -> None:
    """With whole heads, with windows longer than the prompt, and before anything is packed."""
    model, inputs = tm.make("llama"), tm.left_padded(lengths)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = bh.CompressedCache(plan, model)
    got = chunked(model, cache, ids, mask, chunk)
    expected = chunked(model, bh.CompressedCache(plan, model), ids, mask, ids.shape[1])
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=2e-4, rtol=1e-3)
    assert cache.compressed_layers()[0].real_tokens() == lengths


def test_a_chunk_never_sees_its_own_future() -> None:
    """Logits of a chunk's first tokens do not change with its last ones, in packed and in windowed heads."""
    model = tm.make("llama")
    first, second = tm.tokens(2, 52), tm.tokens(2, 9, seed=4)
    logits = []
    for last in (3, 77):
        cache = bh.CompressedCache(MIXED, model)
        model(first, past_key_values=cache)
        logits.append(model(torch.cat([second, torch.full((2, 4), last)], 1), past_key_values=cache).logits)
    torch.testing.assert_close(logits[0][:, :9], logits[1][:, :9], atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits[0][:, 9:], logits[1][:, 9:])


@pytest.mark.parametrize("lengths", [[90, 90], [90, 61, 3]], ids=str)
def test_long_chunks_in_blocks_of_tiles(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> None:
    """The road of long chunks on a GPU gives the logits of the road of short ones: packed and windowed heads, prompts of different lengths."""
    model, prompt = tm.make("llama"), tm.left_padded(lengths)
    ids = torch.cat([prompt["input_ids"], tm.tokens(len(lengths), 100, seed=9)], 1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(len(lengths), 100, dtype=torch.long)], 1)
    want, blocks = chunked(model, bh.CompressedCache(MIXED, model), ids, mask, 38), []
    monkeypatch.setattr("bitsandheads.ops.chunks.covers", lambda q, backend: q.shape[2] > 1)
    attend_block = long_chunks.attend_block
    monkeypatch.setattr(long_chunks, "attend_block", lambda *args, **kwargs: blocks.append(args[1].shape) or attend_block(*args, **kwargs))
    cache = bh.CompressedCache(MIXED, model)
    got = chunked(model, cache, ids, mask, 38)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-3, rtol=1e-3)
    assert len(blocks) > 12
    for store in (store for layer in cache.compressed_layers() for store in layer.stores):
        assert store.heads().known == store.heads().lengths.tolist()


# -- windowed heads ---------------------------------------------------------------------------------------------------------------


def masked_forward(model, ids: torch.Tensor, mask: torch.Tensor, prompt: int, window: bh.Window) -> torch.Tensor:
    """Logits of the whole text at once, with the rule of windowed heads written out as a mask of every layer.

    A query of the prompt sees every real token up to itself; a later one at real position t sees j < sink and j > t - recent.
    """
    real = mask.bool()
    position = mask.cumsum(1) - 1
    t, j = position[:, :, None], position[:, None, :]
    seen = (j <= t) & real[:, None]
    later = torch.arange(ids.shape[1])[None, :, None] >= prompt
    seen &= ~later | (j < window.sink) | (j > t - window.recent)
    seen |= torch.eye(ids.shape[1], dtype=torch.bool)[None]  # padding sees itself, so that nothing is NaN
    return model(ids, attention_mask=seen[:, None], position_ids=position.clamp(min=0)).logits


@pytest.mark.parametrize("lengths", [[30, 30], [30, 12, 3]], ids=str)
@pytest.mark.parametrize("window", [bh.Window(4, 8), bh.Window(0, 5), bh.Window(16, 1), bh.Window(4, 64)], ids=str)
@pytest.mark.parametrize("step", [1, 3])
def test_windowed_heads_see_what_the_rule_says(lengths: list[int], window: bh.Window, step: int) -> None:
    model = tm.make("llama")
    inputs, new = tm.left_padded(lengths), 60
    ids = torch.cat([inputs["input_ids"], tm.tokens(len(lengths), new, seed=9)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(lengths), new, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = bh.CompressedCache(bh.CachePlan("window", (bh.HeadGroup(window=window),)), model)
    got = [model(ids[:, :30], attention_mask=mask[:, :30], position_ids=positions[:, :30], past_key_values=cache).logits[:, -1:]]
    for i in range(30, 30 + new, step):
        part = slice(i, i + step)
        out = model(ids[:, part], attention_mask=mask[:, : i + step], position_ids=positions[:, part], past_key_values=cache)
        got.append(out.logits)
    expected = masked_forward(model, ids, mask, 30, window)[:, 29:]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=2e-4, rtol=1e-3)
    unlimited = masked_forward(model, ids, mask, 30, bh.Window(0, 1000))[:, 29:]
    assert torch.allclose(expected, unlimited, atol=1e-3) == (window.recent == 64 and max(lengths) + new <= 68)


# -- vision ------------------------------------------------------------------------------------------------------------------------


def image_inputs(name: str) -> dict[str, torch.Tensor]:
    if name == "llava-onevision":  # 2 x 2 patches of the image, the same once more as its one crop, and line ends
        ids = torch.cat([tm.tokens(1, 5), torch.full((1, 4 + 4 + 2), 90), tm.tokens(1, 6, seed=2)], 1)
        return tm.inputs_for(ids) | {"pixel_values": torch.randn(1, 2, 3, 28, 28), "image_sizes": torch.tensor([[28, 28]])}
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.cat([tm.tokens(1, 5), torch.tensor([[92]]), torch.full((1, 4), 90), torch.tensor([[93]]), tm.tokens(1, 6, seed=2)], 1)
    inputs = tm.inputs_for(ids) | {"pixel_values": torch.randn(16, 3 * 2 * 14 * 14), "image_grid_thw": grid}
    return inputs | {"mm_token_type_ids": (ids == 90).int()}


@pytest.mark.parametrize("name", tm.VISION)
def test_an_image(name: str) -> None:
    model = tm.make(name)
    inputs = image_inputs(name)
    tm.same(model, inputs, "bf16")
    _, seen = tm.generate(model, inputs, bh.CompressedCache("bf16", model))
    _, other = tm.generate(model, inputs | {"pixel_values": -inputs["pixel_values"]}, bh.CompressedCache("bf16", model))
    assert not torch.equal(seen, other)
    plan = bh.CachePlan("fine", (bh.HeadGroup(quant=dataclasses.replace(FINE, residual=2, sink=1, basis_tokens=1)),))
    cache = bh.CompressedCache(plan, model)
    _, packed = tm.generate(model, inputs, cache, new=4)
    assert cache.memory().in_use["codes"] > 0 and packed.isfinite().all()


@pytest.mark.parametrize("name", tm.VISION)
def test_only_the_text_part_is_switched(name: str) -> None:
    model = tm.make(name)
    assert model.config.get_text_config()._attn_implementation == "bitsandheads_sdpa"
    assert model.config.vision_config._attn_implementation == "sdpa"
    bh.disable(model)
    assert model.config.get_text_config()._attn_implementation == "sdpa"


# -- modes of PyTorch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [None, 120])
@pytest.mark.parametrize("plan", ["bf16", MIXED, small("balanced")], ids=lambda p: getattr(p, "name", p))
def test_inference_mode_for_the_prompt_only(plan: "str | bh.CachePlan", capacity: int | None) -> None:
    model, logits = tm.make("llama"), []
    for mode in (torch.no_grad, torch.inference_mode):
        cache = bh.CompressedCache(plan, model, capacity=capacity)
        with mode():
            model(tm.tokens(2, 60), past_key_values=cache)
            model(tm.tokens(2, 1), past_key_values=cache)
        with torch.no_grad():
            cache.crop(-1)
            cache.reorder_cache(torch.tensor([1, 0]))
            logits.append(torch.cat([model(tm.tokens(2, 1, seed=i), past_key_values=cache).logits for i in range(20)], 1))
    assert torch.equal(*logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_autocast(implementation: str) -> None:
    """Keys leave RoPE in another dtype than values there. Attention is computed in autocast's dtype, as DynamicCache has it."""
    model = tm.make("llama")
    bh.disable(model)
    model.set_attn_implementation(implementation)
    bh.enable(model)
    with torch.autocast("cpu", torch.bfloat16):
        tm.same(model, tm.left_padded([150, 145]), "bf16")
        for plan in (MIXED, small("balanced")):
            whole, fixed = (
                tm.generate(model, tm.left_padded([150, 145]), bh.CompressedCache(plan, model, capacity=n), new=20)[1] for n in (None, 170)
            )
            torch.testing.assert_close(fixed[:, 1], whole[:, 1], atol=0.1, rtol=0.1)


def test_a_forward_that_the_user_compiled() -> None:
    """The cache's bookkeeping is no part of the graph; traced, a sequence counted a tile twice."""
    model, inputs = tm.make("llama", num_hidden_layers=1), tm.left_padded([60, 50])
    plain, logits = model.forward, []
    for forward in (plain, torch.compile(plain, backend="eager")):
        cache = bh.CompressedCache(bh.CachePlan("fine", (bh.HeadGroup(quant=FINE),)), model)
        model.forward = forward
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            model.forward = plain
            logits.append(model(tm.tokens(2, 1), past_key_values=cache).logits)
    assert torch.equal(*logits)


# -- switching on and off ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_enable_and_disable(implementation: str) -> None:
    model = tm.make("llama")
    bh.disable(model)
    bh.disable(model)
    model.set_attn_implementation(implementation)
    with bh.enabled(model) as same:
        assert same is model and model.config._attn_implementation == f"bitsandheads_{implementation}"
        with bh.enabled(model):
            pass
        assert model.config._attn_implementation == f"bitsandheads_{implementation}"
    assert model.config._attn_implementation == implementation
    with pytest.raises(KeyError), bh.enabled(model):
        raise KeyError
    assert model.config._attn_implementation == implementation
    bh.enable(model)
    bh.enable(model)
    with bh.enabled(model):
        pass
    assert model.config._attn_implementation == f"bitsandheads_{implementation}"
    bh.disable(model)
    assert model.config._attn_implementation == implementation


def test_other_caches_work_on_an_enabled_model() -> None:
    model, inputs = tm.make("gemma3"), tm.left_padded([20, 7])
    _, on = tm.generate(model, inputs, tm.dynamic(model))
    without_cache = model.generate(**inputs, use_cache=False, max_new_tokens=4, do_sample=False, pad_token_id=0)
    bh.disable(model)
    _, off = tm.generate(model, inputs, tm.dynamic(model))
    assert torch.equal(on, off)
    assert torch.equal(without_cache, model.generate(**inputs, use_cache=False, max_new_tokens=4, do_sample=False, pad_token_id=0))


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3-next"])
@pytest.mark.parametrize("plan", ["bf16", MIXED], ids=lambda p: getattr(p, "name", p))
def test_reset_and_reuse(name: str, plan: "str | bh.CachePlan") -> None:
    model = tm.make(name)
    cache, fresh = bh.CompressedCache(plan, model), bh.CompressedCache(plan, model)
    tm.generate(model, tm.left_padded([50, 40]), cache)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0
    inputs = tm.inputs_for(tm.tokens(3, 30, seed=8))
    got, expected = tm.generate(model, inputs, cache), tm.generate(model, inputs, fresh)
    assert torch.equal(got[1], expected[1])


def test_crop_then_go_on() -> None:
    """Cropped to a shared prefix, the cache answers as if the rest had never been there."""
    model = tm.make("llama")
    ids, more = tm.tokens(2, 40), tm.tokens(2, 5, seed=3)
    logits = []
    for cache in (tm.dynamic(model), bh.CompressedCache("bf16", model), bh.CompressedCache(WIDE, model)):
        model(ids, past_key_values=cache)
        cache.crop(torch.tensor(-15))
        assert cache.get_seq_length() == 25
        cache.crop(0)
        logits.append(model(more, past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_batch_select_and_repeat() -> None:
    model, inputs = tm.make("llama"), tm.left_padded([50, 33, 41])
    step = tm.tokens(4, 1, seed=3)
    mask = torch.ones(4, 51, dtype=torch.long)
    mask[:, :50] = inputs["attention_mask"][[2, 2, 0, 0]]
    positions = (mask.cumsum(1) - 1)[:, -1:]
    for plan in ("bf16", MIXED):
        cache, whole = bh.CompressedCache(plan, model), bh.CompressedCache(plan, model)
        model(**inputs, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        got = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        repeated = {name: t[[2, 2, 0, 0]] for name, t in inputs.items()}
        model(**repeated, past_key_values=whole)
        expected = model(step, attention_mask=mask, position_ids=positions, past_key_values=whole).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_bits_are_counted_from_the_tensors() -> None:
    model = tm.make("llama", dtype=torch.bfloat16)
    whole, packed = bh.CompressedCache("bf16", model), bh.CompressedCache(MIXED, model)
    for cache in (whole, packed):
        model(**tm.left_padded([100, 70]), past_key_values=cache)
        memory = cache.memory()
        assert all(memory.in_use[part] <= memory.allocated[part] for part in memory.in_use)
        assert cache.memory_bytes() == sum(memory.in_use.values()) <= cache.memory_bytes(allocated=True)
    assert whole.bits_per_element() == pytest.approx(16 * 200 / 170)  # padding is kept as DynamicCache keeps it
    elements = 170 * 2 * 2 * 2 * 64
    assert packed.bits_per_element() == pytest.approx(8 * packed.memory_bytes() / elements)
    assert packed.bits_per_element(residual=False) < packed.bits_per_element() < 16
