"""Bad input: each a named error that says what was given, what is allowed and what to do; the cache can be reset and used again."""

import dataclasses
from pathlib import Path

import pytest
import tiny_models as tm
import torch
import transformers
from test_models import MIXED, SMALL, small

import bitsandheads as bh


def works(model, cache) -> None:
    """The cache generates, after a reset, what a fresh one generates."""
    cache.reset()
    inputs = tm.inputs_for(tm.tokens(2, 30))
    fresh = bh.CompressedCache(cache.plan, model)
    assert torch.equal(tm.generate(model, inputs, cache)[1], tm.generate(model, inputs, fresh)[1])


def test_every_error_is_ours_and_pythons() -> None:
    kinds = {bh.BackendError: RuntimeError, bh.CacheStateError: RuntimeError, bh.AttentionNotEnabledError: RuntimeError}
    kinds |= {k: ValueError for k in (bh.PlanError, bh.ShapeError, bh.NotFiniteError, bh.ModelMismatchError, bh.FileFormatError)}
    for kind, python in kinds.items():
        assert issubclass(kind, bh.BitsAndHeadsError) and issubclass(kind, python)


@pytest.mark.parametrize(
    ("given", "meant"), [("balance", "balanced"), ("kivi2", "kivi-2"), ("vidkv-1.5/1.6", "vidkv-1.5/1.66"), ("BF16", "")]
)
def test_unknown_preset(given: str, meant: str) -> None:
    for ask in (bh.get_plan, lambda name: bh.CompressedCache(name, tm.make("llama"))):
        with pytest.raises(bh.PlanError) as error:
            ask(given)
        said = str(error.value)
        assert repr(given) in said and all(name in said for name in bh.preset_names())
        assert f"did you mean {meant!r}?" in said if meant else "did you mean" not in said


def test_newer_plan_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(MIXED.to_json().replace('"version": 1', '"version": 2'))
    with pytest.raises(bh.PlanError, match=r"version 2; this release reads up to 1\. Update bitsandheads"):
        bh.CompressedCache(path, tm.make("llama"))


# -- NaN, infinity, out of range -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e30])
@pytest.mark.parametrize("projection", ["k_proj", "v_proj"])
@pytest.mark.parametrize("plan", [small("balanced"), small("kivi-2"), small("vidkv-1.5/1.66")], ids=lambda p: p.name)
def test_numbers_that_cannot_be_packed(value: float, projection: str, plan: bh.CachePlan) -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(plan, model)

    def spoil(module, args, out):
        out = out.clone()
        out[:, 20, 70] = value  # one channel of the second head of one token
        return out

    hook = getattr(model.model.layers[1].self_attn, projection).register_forward_hook(spoil)
    what = {"k_proj": "keys", "v_proj": "values"}[projection]
    with pytest.raises(bh.NotFiniteError, match=rf"The {what} of KV heads \(0, 1\) hold .*finite numbers.*keep these heads whole"):
        model(tm.tokens(2, 200), past_key_values=cache)
    hook.remove()
    works(model, cache)


@pytest.mark.parametrize("metadata", ["fp16", "fp8"])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e3, 6e4, 1e6, 1e8])
@pytest.mark.parametrize("transform", ["none", "hadamard", "principal"])
def test_numbers_of_any_size_are_packed_well_or_refused(metadata: str, scale: float, transform: str) -> None:
    """Metadata have a range. Beyond it there must be an error, never a wrong number in silence."""
    half = bh.TensorQuant((bh.AxisClass(4, 0.5, "minmax"), bh.AxisClass(2, 0.5, "minmax")), transform=transform)
    quant = bh.KVQuant(half, half, tile=32, group_size=32, residual=0, sink=0, basis_tokens=32, metadata=metadata)
    from bitsandheads.layer import CompressedLayer, read_mask
    from bitsandheads.ops.reference import unpack_tiles

    layer = CompressedLayer(0, (bh.HeadGroup((0,), quant=quant),), bh.LayerShape(1, 1, 32), "reference")
    k, v, q = ((torch.randn(1, 1, 64, 32) + 1) * s for s in (scale, scale, 1.0))
    layer.stage(k, v)
    try:
        layer.attend(q, read_mask(None, 64), 1.0, lambda q, k, v: q.transpose(1, 2))
    except bh.NotFiniteError as error:
        assert (scale >= 1e4 and "65504" in str(error)) or scale >= 1e7
        return
    assert scale < 1e8
    for got, x in zip(unpack_tiles(layer.stores[0].heads()), (k, v), strict=True):
        if scale >= 1e-3:
            assert (got - x).norm() < 0.3 * x.norm()
        else:  # below the smallest step, numbers become their mean or zero
            assert (got - x).norm() < 1.5 * x.norm() + 1e-6


# -- the wrong model, the wrong attention, the wrong shape -----------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"head_dim": 128}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}], ids=str)
def test_cache_of_another_model(other: dict) -> None:
    model, cache = tm.make("llama"), bh.CompressedCache("balanced", tm.make("llama", **other))
    with pytest.raises(bh.ModelMismatchError, match=r"keys of shape .*this cache was made for .* Make the cache from the configuration"):
        model(tm.tokens(1, 5), past_key_values=cache)


def test_cache_of_a_model_with_other_layers() -> None:
    cache = bh.CompressedCache("bf16", tm.make("llama"))
    with pytest.raises(bh.ModelMismatchError, match=r"asks for layer 2; this cache was made for 2 layers\. Make the cache from"):
        tm.make("llama", num_hidden_layers=3)(tm.tokens(1, 5), past_key_values=cache)
    cache = bh.CompressedCache("bf16", tm.make("llama", num_hidden_layers=3), capacity=20)
    with pytest.raises(bh.ModelMismatchError, match=r"did not use the layers \[2\]"):
        tm.generate(tm.make("llama"), tm.left_padded([9, 5]), cache, new=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Qwen/Qwen2.5-7B", "str 'Qwen/Qwen2.5-7B' is no model or configuration of transformers"),
        (None, "is no model or configuration"),
        (transformers.MambaConfig(), "A mamba model has no attention heads"),
        (transformers.Gemma3nTextConfig(), "attend to the keys of other layers"),
    ],
    ids=["name", "none", "mamba", "gemma3n"],
)
def test_what_has_no_cache_to_compress(given, said: str) -> None:
    with pytest.raises(bh.PlanError, match=said):
        bh.CompressedCache("balanced", given)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"capacity": "64"}, "capacity='64' is not possible: a whole number"),
        ({"capacity": 1.5}, "a whole number"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not possible"),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is not possible"),
        ({"plan": None}, "The plan is None; give a preset's name"),
        ({"plan": ["balanced"]}, "The plan is"),
    ],
    ids=str,
)
def test_options_of_another_kind(options: dict, said: str) -> None:
    with pytest.raises(bh.PlanError, match=said):
        bh.CompressedCache(**({"plan": "bf16", "model": tm.make("llama")} | options))


def test_a_pass_that_was_cut_short() -> None:
    """Its layers hold different tokens: to go on would be wrong in silence."""
    model = tm.make("llama")
    cache = bh.CompressedCache(MIXED, model)
    model(tm.tokens(2, 50), past_key_values=cache)

    def stop(module, args) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(tm.tokens(2, 1), past_key_values=cache)
    hook.remove()
    with pytest.raises(bh.CacheStateError, match=r"Layer 1 holds 50 tokens and the first one held 51.*reset\(\)"):
        model(tm.tokens(2, 1), past_key_values=cache)
    works(model, cache)


@pytest.mark.parametrize("capacity", [None, 64])
def test_sequences_that_are_not_there(capacity: int | None) -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(MIXED, model, capacity=capacity)
    tm.generate(model, tm.left_padded([40, 30, 20]), cache, new=3)
    for wrong in (torch.tensor([3]), torch.tensor([0, -4])):
        with pytest.raises(bh.ShapeError, match="holds 3 sequences"):
            cache.batch_select_indices(wrong)
    cache.batch_select_indices([-1, 0])
    assert cache.compressed_layers()[1].real_tokens() == [22, 42]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("plan", ["bf16", "balanced"])
def test_attention_that_was_not_switched_on(implementation: str, plan: str) -> None:
    model = tm.make("llama")
    bh.disable(model)
    model.set_attn_implementation(implementation)
    cache = bh.CompressedCache(plan, model)
    for _ in range(2):
        with pytest.raises(bh.AttentionNotEnabledError, match=r"Call bitsandheads.enable\(model\)"):
            model(tm.tokens(2, 5), past_key_values=cache)
    bh.enable(model)
    logits = model(tm.tokens(2, 5), past_key_values=cache).logits  # the same cache, without reset
    assert torch.equal(logits, model(tm.tokens(2, 5), past_key_values=bh.CompressedCache(plan, model)).logits)


def test_attention_switched_off_half_way() -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache("bf16", model)
    first = model(tm.tokens(2, 5), past_key_values=cache).logits
    with pytest.raises(bh.AttentionNotEnabledError), torch.no_grad():
        bh.disable(model)
        model(tm.tokens(2, 1), past_key_values=cache)
    bh.enable(model)
    again = model(tm.tokens(2, 1), past_key_values=cache).logits
    assert first.shape[1] == 5 and cache.get_seq_length() == 6
    fresh = tm.dynamic(model)
    model(tm.tokens(2, 5), past_key_values=fresh)
    assert torch.equal(again, model(tm.tokens(2, 1), past_key_values=fresh).logits)


def test_flex_attention_is_refused() -> None:
    model = tm.make("llama")
    bh.disable(model)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(bh.PlanError, match='attn_implementation="sdpa"'):
        bh.enable(model)


def test_attention_extras_are_not_dropped() -> None:
    """Gemma2 caps its scores; the ops do not know that."""
    config = transformers.Gemma2Config(**tm.TEXT, head_dim=64, attn_logit_softcapping=20.0, layer_types=["full_attention"] * 2)
    model = transformers.Gemma2ForCausalLM(config).eval()
    bh.enable(model)
    cache = bh.CompressedCache("balanced", model)
    with pytest.raises(bh.PlanError, match=r"uses softcap.*Use DynamicCache"):
        model(tm.tokens(1, 5), past_key_values=cache)
    assert model(tm.tokens(1, 5), past_key_values=tm.dynamic(model)).logits.isfinite().all()


def test_attention_weights_are_refused() -> None:
    """Eager attention returns them; a compressed layer has none. Other attention functions never return them, with no cache."""
    model = tm.make("llama")
    bh.disable(model)
    model.set_attn_implementation("eager")
    bh.enable(model)
    cache = bh.CompressedCache("bf16", model)
    with pytest.raises(bh.PlanError, match="uses output_attentions, which compressed layers do not support"):
        model(tm.tokens(2, 5), past_key_values=cache, output_attentions=True)
    assert model(tm.tokens(2, 5), past_key_values=cache).attentions is None


def test_batch_mismatch() -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(MIXED, model)
    model(tm.tokens(2, 50), past_key_values=cache)
    with pytest.raises(bh.ShapeError, match=r"holds 2 sequences and was given 3.*batch_repeat_interleave.*reset"):
        model(tm.tokens(3, 1), past_key_values=cache)
    model(tm.tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 51


# -- token scores ----------------------------------------------------------------------------------------------------------------------

GIVEN = bh.CachePlan(
    "given", (bh.HeadGroup(quant=bh.KVQuant(SMALL.keys, SMALL.values, 16, 16, 16, 4, 0, 16, salience=bh.Salience(0.3, "given"))),)
)


@pytest.mark.parametrize("length", [5, 100])
def test_given_scores_are_missing(length: int) -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(GIVEN, model)
    with pytest.raises(bh.CacheStateError, match=r"none were given\. Call cache.set_token_scores\(scores\)"):
        model(tm.tokens(2, length), past_key_values=cache)
    cache.reset()
    cache.set_token_scores(torch.rand(2, length))
    tm.generate(model, tm.inputs_for(tm.tokens(2, length)), cache, new=40)
    assert cache.memory().in_use["codes"] > 0


@pytest.mark.parametrize("shape", [(2, 9), (1, 10), (3, 10)])
def test_given_scores_of_another_shape(shape: tuple[int, int]) -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(GIVEN, model)
    cache.set_token_scores(torch.rand(shape))
    with pytest.raises(bh.ShapeError, match=rf"shape \[{shape[0]}, {shape[1]}\].*Give \[2, 10\]"):
        model(tm.tokens(2, 10), past_key_values=cache)
    with pytest.raises(bh.ShapeError, match=r"Token scores have shape \[10\]; give \[batch"):
        cache.set_token_scores(torch.rand(10))


# -- crop and offload --------------------------------------------------------------------------------------------------------------------


def test_crop_too_deep() -> None:
    """The windowed head of the second layer refuses; the packed first layer must be as it was."""
    model = tm.make("llama")
    window = bh.HeadGroup(window=bh.Window(4, 8))
    cache = bh.CompressedCache(bh.CachePlan("x", (bh.HeadGroup(quant=SMALL),), {1: (window,)}), model)
    model(tm.tokens(2, 100), past_key_values=cache)
    with pytest.raises(bh.CacheStateError, match=r"crop removes 50 tokens.*at most 16 can be removed.*reset\(\)"):
        cache.crop(-50)
    assert {layer.tokens for layer in cache.compressed_layers()} == {100}
    cache.crop(-16)
    assert {layer.tokens for layer in cache.compressed_layers()} == {84}
    works(model, cache)


def test_crop_into_a_sorted_prompt() -> None:
    model = tm.make("llama")
    quant = dataclasses.replace(SMALL, residual=8, salience=bh.Salience(0.3))
    cache = bh.CompressedCache(bh.CachePlan("sorted", (bh.HeadGroup(quant=quant),)), model)
    model(tm.tokens(2, 204), past_key_values=cache)
    with pytest.raises(bh.CacheStateError, match=r"only the newest 8 lie in order.*Crop less, or reset\(\)"):
        cache.crop(-40)
    assert cache.get_seq_length() == 204


def test_crop_that_a_sliding_layer_refuses() -> None:
    model = tm.make("gemma3", layer_types=["full_attention", "sliding_attention"])
    cache = bh.CompressedCache("bf16", model)
    model(tm.tokens(1, 60), past_key_values=cache)
    with pytest.raises(RuntimeError):
        cache.crop(-5)
    assert [layer.get_seq_length() for layer in cache.layers] == [60, 60]


def test_crop_everything_is_a_reset() -> None:
    model = tm.make("llama")
    cache = bh.CompressedCache(MIXED, model)
    model(tm.tokens(2, 100), past_key_values=cache)
    cache.crop(-100)
    assert cache.get_seq_length() == 0
    works(model, cache)


def test_offloading_is_refused() -> None:
    cache = bh.CompressedCache("bf16", tm.make("llama"))
    with pytest.raises(bh.CacheStateError, match="cannot be offloaded"):
        cache.offload(0)


def test_scores_without_a_mask_are_not_mixed_up() -> None:
    """A mask of padding only, [batch, tokens], is read like the full one."""
    from bitsandheads.layer import read_mask

    padding = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    full = (torch.tril(torch.ones(5, 5)).bool() & padding.bool()[:, None])[:, None]
    additive = torch.zeros(full.shape).masked_fill(~full, torch.finfo(torch.float32).min)
    for mask in (padding, full, additive):
        chunk = read_mask(mask, 5)
        assert torch.equal(chunk.valid, padding.bool())
        assert chunk.hidden[0, 2:].tolist() == [2, 1, 0] and chunk.hidden[1].tolist() == [4, 3, 2, 1, 0]
    assert read_mask(None, 5) == read_mask(torch.ones(2, 5), 5)
