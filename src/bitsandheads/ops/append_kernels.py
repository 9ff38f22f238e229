"""The Triton kernel of appending: new tokens into the tails of all stores of a layer, in one launch."""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl


@triton.jit
def _move_front(tail, left, dropped, head, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens dropped, dropped + 1, ... of a head to its front. The places overlap, so no thread may run ahead of the others."""
    a = tl.arange(0, DP)
    for first in range(0, left, BLOCK):
        t = first + tl.arange(0, BLOCK)
        there = (t < left)[:, None] & (a < D)[None]
        place = tail + head + t.to(tl.int64)[:, None] * D + a[None]
        block = tl.load(place + dropped.to(tl.int64) * D, mask=there, other=0.0)
        tl.debug_barrier()
        tl.store(place, block, mask=there)
        tl.debug_barrier()


@triton.jit
def _append_to_store(k, v, tail_k, tail_v, counts, heads, b, batch, k_b, k_h, k_t, v_b, v_h, v_t, tail_b, tail_h, capacity, H: tl.constexpr,
                     LEAVE: tl.constexpr, NEW: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    count = tl.load(counts + 2 * batch + b)
    if LEAVE != 0:  # noqa: SIM102 - the compiler decides this one
        if count >= tl.load(counts + 3 * batch + b):
            dropped = count * 0 + LEAVE if LEAVE > 0 else count + LEAVE
            for h in range(H):
                _move_front(tail_k, count - dropped, dropped, b * tail_b + h * tail_h, D, DP, 16)
                _move_front(tail_v, count - dropped, dropped, b * tail_b + h * tail_h, D, DP, 16)
            if LEAVE > 0:
                tiles = tl.load(counts + batch + b)
                tl.debug_barrier()
                tl.store(counts + batch + b, tiles + 1)
            count = count - dropped
    if NEW > 0:
        a = tl.arange(0, DP)
        t = tl.arange(0, PADDED)
        there = ((t < NEW) & (count + t < capacity))[:, None] & (a < D)[None]
        for h in range(H):
            head = tl.load(heads + h).to(tl.int64)
            place = b * tail_b + h * tail_h + (count + t).to(tl.int64)[:, None] * D + a[None]
            new_k = tl.load(k + b * k_b + head * k_h + t[:, None] * k_t + a[None], mask=there, other=0.0)
            new_v = tl.load(v + b * v_b + head * v_h + t[:, None] * v_t + a[None], mask=there, other=0.0)
            tl.store(tail_k + place, new_k.to(tail_k.dtype.element_ty), mask=there)
            tl.store(tail_v + place, new_v.to(tail_v.dtype.element_ty), mask=there)
    tl.debug_barrier()
    tl.store(counts + 2 * batch + b, count + NEW)


@triton.jit
def append_tokens(k, v, tail_k, tail_v, counts, heads, batch, k_b, k_h, k_t, v_b, v_h, v_t, tail_b, tail_h, capacity, H: tl.constexpr,
                  LEAVE: tl.constexpr, STORES: tl.constexpr, NEW: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
                  DP: tl.constexpr):  # fmt: skip
    """Program (sequence, store). What depends on the store is a tuple: tail_k, tail_v, counts, heads, tail_b, tail_h, capacity, H, LEAVE."""
    b = tl.program_id(0).to(tl.int64)
    for s in tl.static_range(STORES):
        if tl.program_id(1) == s:
            _append_to_store(k, v, tail_k[s], tail_v[s], counts[s], heads[s], b, batch, k_b, k_h, k_t, v_b, v_h, v_t, tail_b[s], tail_h[s],
                             capacity[s], H[s], LEAVE[s], NEW, PADDED, D, DP)  # fmt: skip
