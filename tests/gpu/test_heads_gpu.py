"""Windowed heads on a GPU: memory by the allocator, and the same answers as on the reference backend."""

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

if torch.cuda.is_available():
    import heads_memory as hm

TOKENS = 32768
SLACK = 2 << 20  # the allocator rounds every tensor up to 512 bytes; lengths, positions


@pytest.mark.parametrize("which", range(6), ids=["bf16", "balanced", "extreme", "heads", "balanced+heads", "extreme+heads"])
def test_the_allocator_holds_what_the_plan_says(which: int) -> None:
    """A plan of four layers; whatever was dropped or packed is really free."""
    plan = hm.plans(4)[which]
    held, cache = hm.allocated(plan, TOKENS, 4)
    assert cache.memory_bytes() == cache.resolved.bytes_for(TOKENS)
    assert cache.memory_bytes() <= held <= cache.memory_bytes(allocated=True) + SLACK
    spare = cache.memory_bytes(allocated=True) - cache.memory_bytes()
    assert spare <= 0.1 * cache.memory_bytes() + SLACK


def test_the_composition_holds_a_sixteenth_at_32k_tokens_of_llama_8b() -> None:
    plan = hm.plans()[4]
    held, cache = hm.allocated(plan, TOKENS)
    whole = 2 * hm.LAYERS * hm.HEADS * hm.DIM * TOKENS * 2
    assert plan.sparsity(hm.config(), TOKENS).windowed == 0.5
    assert held <= whole / 16, f"{held} of {whole} bytes: 1/{whole / held:.2f}"
    assert cache.get_seq_length() == TOKENS
