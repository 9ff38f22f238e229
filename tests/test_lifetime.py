"""A cache frees its memory with its last reference, and copies are independent."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from tiny_models import TEXT
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import bitsandheads as bh


def prompt(plan: str):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, head_dim=64)).eval()
    bh.enable(model)
    cache = bh.CompressedCache(plan, model)
    ids = torch.randint(0, 90, (2, 700))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return model, cache, mask


def test_memory_goes_with_the_last_reference() -> None:
    gc.disable()
    try:
        for plan in ("bf16", "balanced"):
            _, cache, _ = prompt(plan)
            tail = weakref.ref(cache.compressed_layers()[0].stores[0].tail.k)
            gone = weakref.ref(cache)
            del cache
            assert gone() is None and tail() is None
    finally:
        gc.enable()


def test_a_deep_copy_lives_on_its_own() -> None:
    model, cache, mask = prompt("kivi-2")
    other = copy.deepcopy(cache)
    step = torch.ones(2, 1, dtype=torch.int64)
    longer = torch.cat([mask, step], 1)
    with torch.no_grad():
        want = model(step, attention_mask=longer, past_key_values=cache).logits
        cache.reset()
        got = model(step, attention_mask=longer, past_key_values=other).logits
    assert torch.equal(got, want) and other.get_seq_length() == 701


@pytest.mark.parametrize("capacity", [None, 720])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_in_the_middle_of_an_answer(copied, capacity: int | None) -> None:
    """Of a cache of fixed capacity too, while only the device knows its counts."""
    model, _, _ = prompt("kivi-2")
    ids, step = torch.randint(0, 90, (2, 700)), torch.ones(2, 1, dtype=torch.int64)
    cache = bh.CompressedCache("kivi-2", model, capacity=capacity)
    with torch.no_grad():
        for new in (ids, step):
            model(new, past_key_values=cache)
        assert cache.running == (capacity is not None)
        other = copied(cache)
        want = [model(step, past_key_values=cache).logits for _ in range(3)]
        assert all(torch.equal(model(step, past_key_values=other).logits, w) for w in want)
    assert other.get_seq_length() == cache.get_seq_length() == 704


def test_copies_of_a_model_are_their_own() -> None:
    """What `enable` leaves on a model is copied and pickled with it, and points to the copy."""
    model, _, _ = prompt("bf16")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        owners = [hook.args[0] for hook in other._forward_pre_hooks.values() if hasattr(hook, "args")]
        assert owners == [other] and other.create_masks_for_generate.args[0] is other
        bh.disable(other)
        assert not other._forward_pre_hooks and model._forward_pre_hooks
        assert model.config._attn_implementation == "bitsandheads_sdpa" != other.config._attn_implementation


def test_a_pickled_model_is_enabled_in_another_process() -> None:
    """Where nothing is registered yet."""
    model, _, _ = prompt("bf16")
    for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
        registry._global_mapping.pop("bitsandheads_sdpa")
    bh.enable(model)
    with torch.no_grad():
        model(torch.ones(1, 5, dtype=torch.int64), past_key_values=bh.CompressedCache("bf16", model))
    assert len(model._forward_pre_hooks) == 2


def test_a_mask_that_was_changed_in_place_is_read_again() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TEXT, head_dim=64)).eval()
    bh.enable(model)
    cache = bh.CompressedCache("balanced", model)
    ids = torch.randint(0, 90, (1, 6))
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        assert cache.compressed_layers()[0].real_tokens() == [6]
        cache.crop(-6)
        mask[..., :2] = False
        mask[..., :2, :] = torch.eye(6, dtype=torch.bool)[:2]
        model(ids, attention_mask=mask, past_key_values=cache)
    assert [layer.real_tokens() for layer in cache.compressed_layers()] == [[4], [4]]
