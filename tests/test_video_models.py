"""Video language models of transformers' own classes, tiny and random, through compressed caches: several videos and images, batches,
left padding, several turns; semantic token protection from the embeddings."""

import dataclasses

import pytest
import tiny_models as tm
import torch

import bitsandheads as bh
from bitsandheads.methods.vidkv import semantic_scores
from bitsandheads.quant.codec import HalfCodec
from bitsandheads.quant.spec import AxisClass, KVQuant, Salience, TensorQuant
from bitsandheads.stores.packed import PackedStore

TRITS = TensorQuant((AxisClass("ternary", 1.0, "ternary", centre=False),))
TWO = TensorQuant((AxisClass(2, 1.0, "minmax"),))
PROTECT = KVQuant(TWO, TRITS, group_size=16, tile=16, residual=16, sink=0, basis_tokens=16, salience=Salience(0.3, "embedding"))
STP = bh.CachePlan("stp", (bh.HeadGroup(quant=PROTECT),))
NEW = {"image": 90, "video": 91, "start": 92, "end": 93}


def features(model, count: int, size: int, videos: bool) -> dict[str, torch.Tensor]:
    """What a processor would make of `count` images or videos of 4 frames, size x size patches of 14 pixels."""
    frames = 4 if videos else 1
    random = torch.Generator().manual_seed(size + 10 * videos)
    if "Llava" in type(model).__name__:
        if videos:
            return {"pixel_values_videos": torch.randn(count, frames, 3, 28, 28, generator=random)}
        return {"pixel_values": torch.randn(count, 2, 3, 28, 28, generator=random), "image_sizes": torch.tensor([[28, 28]] * count)}
    steps = frames // 2 if videos else 1
    pixels = torch.randn(count * steps * size * size, 3 * 2 * 14 * 14, generator=random)
    names = ("pixel_values_videos", "video_grid_thw") if videos else ("pixel_values", "image_grid_thw")
    out = {names[0]: pixels, names[1]: torch.tensor([[steps, size, size]] * count)}
    return out


def visual_tokens(model, size: int, videos: bool) -> list[int]:
    """The placeholders of one image or video, as the model's processor lays them out."""
    kind = NEW["video" if videos else "image"]
    if "Llava" in type(model).__name__:
        return [kind] * (4 * 1 + 1 if videos else 4 + 4 + 2)
    each = [kind] * (size // 2) ** 2
    if "Qwen3" in type(model).__name__ and videos:  # a time stamp before each pair of frames
        return [t for i in range(2) for t in (20 + i, NEW["start"], *each, NEW["end"])]
    return [NEW["start"], *each * (2 if videos else 1), NEW["end"]]


def prompt(model, batch: int, videos: int = 1, images: int = 0, text: int = 9, pad: int = 3, size: int = 8) -> dict[str, torch.Tensor]:
    """A batch whose row b has b * pad more text tokens than row 0, so that the others are padded on the left."""
    rows = []
    for b in range(batch):
        row = tm.tokens(1, 4, seed=b)[0].tolist()
        for _ in range(videos):
            row += [*visual_tokens(model, size, True), 12]
        for _ in range(images):
            row += [*visual_tokens(model, size, False), 13]
        rows.append(row + tm.tokens(1, text + b * pad, seed=9 + b)[0].tolist())
    width = max(map(len, rows))
    out = {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
    }
    if videos:
        out |= features(model, batch * videos, size, True)
    if images:
        out |= features(model, batch * images, size, False)
    if "Qwen" in type(model).__name__:
        ids = out["input_ids"]
        out["mm_token_type_ids"] = (ids == NEW["image"]).int() + 2 * (ids == NEW["video"]).int()
    return {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in out.items()}


@pytest.mark.parametrize("name", tm.VISION)
@pytest.mark.parametrize("videos, images, batch", [(1, 0, 1), (1, 0, 3), (2, 0, 2), (0, 2, 2), (1, 1, 2)])
def test_whole_plan_equals_dynamic_cache(name: str, videos: int, images: int, batch: int) -> None:
    model = tm.make(name)
    tm.same(model, prompt(model, batch, videos, images), "bf16")


@pytest.mark.parametrize("name", tm.VISION)
def test_whole_plan_equals_dynamic_cache_in_bfloat16(name: str) -> None:
    model = tm.make(name, dtype=torch.bfloat16)
    tm.same(model, prompt(model, 2), "bf16")


def frame_prompt(name: str, batch: int, frames: int, text: int = 9) -> dict[str, torch.Tensor]:
    """A clip as a row of images, for models without videos of their own; row 0 has a token less, so it is padded on the left."""
    clip = torch.cat([torch.tensor([[12] + [NEW["image"]] * 4]).repeat(batch, 1) for _ in range(frames)], 1)
    ids = torch.cat([tm.tokens(batch, 3), clip, tm.tokens(batch, text, seed=2)], 1)
    mask = torch.ones_like(ids)
    ids[0, 0] = mask[0, 0] = 0
    pixels = torch.randn(batch, frames, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels if name == "smolvlm" else pixels.flatten(0, 1)}


@pytest.mark.parametrize("name", tm.FRAMES)
def test_models_that_see_videos_as_images(name: str) -> None:
    model = tm.make(name)
    inputs = frame_prompt(name, 2, 8)
    tm.same(model, inputs, "bf16")
    cache = bh.CompressedCache(STP, model)
    model(**inputs, past_key_values=cache)
    assert cache.memory().in_use["codes"] > 0
    visual = inputs["input_ids"][1] == NEW["image"]
    assert torch.equal(cache.compressed_layers()[0].scores[1].isfinite(), visual)


# -- several turns -------------------------------------------------------------------------------------------------------------


def turns(model, cache, inputs: dict[str, torch.Tensor], follow: list[torch.Tensor]) -> torch.Tensor:
    """Answers to the prompt and to further turns of text [B, n], all with one cache."""
    settings = dict(do_sample=False, max_new_tokens=4, pad_token_id=0, suppress_tokens=list(NEW.values()))
    out = model.generate(**inputs, past_key_values=cache, **settings)
    mask = inputs["attention_mask"]
    for more in follow:
        ids = torch.cat([out, more], 1)
        mask = torch.cat([mask, torch.ones(len(ids), ids.shape[1] - mask.shape[1], dtype=torch.long)], 1)
        extra = (
            {"mm_token_type_ids": (ids == NEW["image"]).int() + 2 * (ids == NEW["video"]).int()} if "mm_token_type_ids" in inputs else {}
        )
        grids = {k: v for k, v in inputs.items() if k.endswith("grid_thw")}
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **settings, **extra, **grids)
    return out


@pytest.mark.parametrize("name", tm.VISION)
@pytest.mark.parametrize("batch", [1, 2])
def test_several_turns_equal_dynamic_cache(name: str, batch: int) -> None:
    model = tm.make(name)
    inputs, follow = prompt(model, batch), [tm.tokens(batch, 5, seed=s) for s in (3, 4)]
    got = turns(model, bh.CompressedCache("bf16", model), inputs, follow)
    bh.disable(model)
    assert torch.equal(got, turns(model, tm.dynamic(model), inputs, follow))


@pytest.mark.parametrize("name", tm.VISION)
def test_several_turns_from_packed_heads(name: str) -> None:
    """At six bits every turn's answer keeps to full precision's for a while, and the clip really is packed."""
    fine = TensorQuant((AxisClass(6, 1.0, "minmax"),))
    plan = bh.CachePlan("fine", (bh.HeadGroup(quant=KVQuant(fine, fine, group_size=16, tile=16, residual=16, sink=4, basis_tokens=16)),))
    model = tm.make(name)
    inputs = prompt(model, 2, videos=3)
    cache = bh.CompressedCache(plan, model)
    turns(model, cache, inputs, [tm.tokens(2, 20, seed=3)])
    assert cache.memory().in_use["codes"] > 0
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 4 + 20 + 3
    ids, mask = (inputs[k] for k in ("input_ids", "attention_mask"))
    compressed, whole = bh.CompressedCache(plan, model), bh.CompressedCache("bf16", model)
    more = tm.tokens(2, 6, seed=5)
    logits = []
    for c in (compressed, whole):
        model(**inputs, past_key_values=c)
        places = torch.arange(6) + mask.sum(1, keepdim=True)
        logits.append(
            model(more, attention_mask=torch.cat([mask, torch.ones(2, 6)], 1).long(), position_ids=places, past_key_values=c).logits
        )
    assert 0 < (logits[0] - logits[1]).norm() < 0.1 * logits[1].norm()
    assert ids.shape[1] + 6 == compressed.get_seq_length()


# -- semantic token protection -----------------------------------------------------------------------------------------------------


def test_semantic_scores_are_sums_of_inner_products() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 5, generator=random)
    visual = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0]]).bool()
    real = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]).bool()
    got = semantic_scores(x, visual, real)
    for b in range(2):
        for i in range(7):
            text = [j for j in range(7) if real[b, j] and not visual[b, j]]
            expected = sum(float(x[b, i] @ x[b, j]) for j in text) if visual[b, i] and real[b, i] else float("-inf")
            assert float(got[b, i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", tm.VISION)
def test_embeddings_score_the_visual_tokens(name: str) -> None:
    """The scores that reach the layers are those of the embeddings that really enter the language model, padding left out."""
    model = tm.make(name)
    inputs = prompt(model, 2, videos=1, images=1)
    seen = []
    language = model.model.language_model
    hook = language.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    cache = bh.CompressedCache(STP, model)
    model(**inputs, past_key_values=cache)
    hook.remove()
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    expected = semantic_scores(seen[0], (ids == NEW["image"]) | (ids == NEW["video"]), real)
    for layer in cache.compressed_layers():
        for b in range(2):
            torch.testing.assert_close(layer.scores[b], expected[b, real[b]])


def test_protected_tokens_come_back_better() -> None:
    """With the values of the protected tokens at 6 bits, those of the highest scores are restored almost exactly, the others are not."""
    model = tm.make("llava-onevision")
    better = dataclasses.replace(PROTECT, residual=0, salience=Salience(0.3, "embedding", (AxisClass(6, 1.0, "minmax"),)))
    inputs = prompt(model, 1, videos=8, text=12)
    assert inputs["input_ids"].shape[1] == 64
    whole, cache = bh.CompressedCache("bf16", model), bh.CompressedCache(bh.CachePlan("b", (bh.HeadGroup(quant=better),)), model)
    for c in (whole, cache):
        model(**inputs, past_key_values=c)
    layer = cache.compressed_layers()[0]
    store = layer.stores[0]
    assert isinstance(store, PackedStore) and store.salient.count == [1]  # 0.3 of four tiles of 16
    chosen = layer.scores[0].topk(16)[1].sort()[0]
    values = whole.compressed_layers()[0].stores[0].tail.v[0]
    halves = store.salient.layout.split(store.salient.tiles[:1])
    restored = HalfCodec(store.salient.layout.values).unpack(halves[1], {})[0]
    assert (restored - values[:, chosen]).abs().max() < 0.05 * values.abs().max()


def test_embedding_scores_need_the_prompts_ids() -> None:
    model = tm.make("llava-onevision")
    embeddings = model.get_input_embeddings()(tm.tokens(1, 40))
    cache = bh.CompressedCache(STP, model)
    with pytest.raises(bh.CacheStateError, match=r'by="embedding".*none were given.*set_token_scores.*input_ids'):
        model(inputs_embeds=embeddings, past_key_values=cache)


def test_scores_given_by_hand_serve_too() -> None:
    """A caller that has only embeddings may score them itself."""
    model = tm.make("llava-onevision")
    ids = tm.tokens(1, 80)
    cache = bh.CompressedCache(STP, model)
    cache.set_token_scores(torch.rand(1, 80))
    model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
    assert cache.memory().in_use["codes"] > 0


@pytest.mark.parametrize("name", [*tm.VISION, "llama"])
def test_stp_preset_generates(name: str) -> None:
    """The preset itself, on a text model too (there the first tokens are protected)."""
    model = tm.make(name)
    inputs = prompt(model, 2, videos=14) if name in tm.VISION else tm.left_padded([240, 230])
    cache = bh.CompressedCache("vidkv-1.5/1.66-stp", model)
    _, logits = tm.generate(model, inputs, cache, new=4)
    assert logits.isfinite().all() and cache.get_seq_length() == inputs["input_ids"].shape[1] + 3


def test_disable_removes_what_enable_added() -> None:
    model = tm.make("llava-onevision")
    part = model.model.language_model
    assert model._forward_pre_hooks and part._forward_pre_hooks
    bh.enable(model)
    assert len(model._forward_pre_hooks) == len(part._forward_pre_hooks) == 1
    bh.disable(model)
    assert not model._forward_pre_hooks and not part._forward_pre_hooks
