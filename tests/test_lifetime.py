"""A cache frees its memory with its last reference, and copies are independent."""

import copy
import gc
import weakref

import torch
from tiny_models import TEXT
from transformers import LlamaConfig, LlamaForCausalLM

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
