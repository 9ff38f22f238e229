"""Appending new tokens to what a layer holds, in one launch, without a transfer between host and device.

`append` is also the custom operator `torch.ops.bitsandheads.append`. Shape letters: B sequences, H KV heads of the layer, h KV heads of a store,
n new tokens, C capacity, D head_dim.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .backends import resolve_packing

MAX_NEW = 8  # tokens that are appended in one launch; more take the road of a prompt


@dataclass
class Growing:
    """What a store shows of itself to `append`.

    Attributes:
        kv_heads: indices of the store's heads within the layer.
        tail_k, tail_v: [B, h, C, D], contiguous.
        counts: int32 [4, B]: sink tokens, tiles, tail tokens, and the limit: a tail that has grown to it gives its oldest tokens away first.
        leave: how: `leave` tokens > 0 leave, and there is one tile more (which has just been packed); or all but -leave tokens leave; 0: never.
    """

    kv_heads: tuple[int, ...]
    tail_k: Tensor
    tail_v: Tensor
    counts: Tensor
    leave: int


def append(k: Tensor, v: Tensor, stores: list[Growing], backend: str = "auto") -> None:
    """Let the oldest tokens of full tails leave, then add the new tokens, and advance the counts on the device.

    Args:
        k, v: [B, H, n, D] with n from 0 to MAX_NEW, real tokens of every sequence. With n = 0 only full tails are emptied.
        stores: the stores of the layer. Their tails must have room (the caller counts along on the host, or has fixed the capacity).
        backend: "auto" or a backend's name, as for decode attention; "cuda" takes the Triton kernel.
    Raises:
        BackendError: a backend was named that cannot run here.
    """
    tails = [t for s in stores for t in (s.tail_k, s.tail_v)]
    heads = [h for s in stores for h in s.kv_heads]
    sizes, leave = [len(s.kv_heads) for s in stores], [s.leave for s in stores]
    torch.ops.bitsandheads.append(k, v, tails, [s.counts for s in stores], heads, sizes, leave, backend)


@torch.library.custom_op("bitsandheads::append", mutates_args=("tails", "counts"))
def _append(
    k: Tensor, v: Tensor, tails: list[Tensor], counts: list[Tensor], heads: list[int], sizes: list[int], leave: list[int], backend: str
) -> None:
    pairs = list(zip(tails[::2], tails[1::2], strict=True))
    chosen = _launch if resolve_packing(backend, k.device) == "triton" else _reference
    chosen(k, v, pairs, counts, _split(tuple(heads), tuple(sizes)), leave)


@_append.register_fake
def _(
    k: Tensor, v: Tensor, tails: list[Tensor], counts: list[Tensor], heads: list[int], sizes: list[int], leave: list[int], backend: str
) -> None:
    return None


@lru_cache(maxsize=256)
def _split(heads: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    left = iter(heads)
    return tuple(tuple(next(left) for _ in range(n)) for n in sizes)


@lru_cache(maxsize=256)
def _head_index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(heads, dtype=torch.int32, device=device)


Pairs = list[tuple[Tensor, Tensor]]


def _reference(k: Tensor, v: Tensor, tails: Pairs, counts: list[Tensor], heads: tuple[tuple[int, ...], ...], leave: list[int]) -> None:
    n = k.shape[2]
    for tail, count, own, leaving in zip(tails, counts, heads, leave, strict=True):
        held = count.tolist()
        for b, (used, limit) in enumerate(zip(held[2], held[3], strict=True)):
            if leaving and used >= limit:
                dropped = leaving if leaving > 0 else used + leaving
                for buffer in tail:
                    buffer[b, :, : used - dropped] = buffer[b, :, dropped:used].clone()
                held[1][b] += int(leaving > 0)
                held[2][b] = used = used - dropped
            for buffer, new in zip(tail, (k, v), strict=True) if n else ():
                buffer[b, :, used : used + n] = new[b, list(own)]
            held[2][b] = used + n
        count.copy_(torch.tensor(held, dtype=torch.int32))


def _launch(k: Tensor, v: Tensor, tails: Pairs, counts: list[Tensor], heads: tuple[tuple[int, ...], ...], leave: list[int]) -> None:
    import triton

    from .append_kernels import append_tokens

    batch, _, n, dim = k.shape
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    first = [tail[0] for tail in tails]
    append_tokens[(batch, len(tails))](
        k, v, tuple(first), tuple(tail[1] for tail in tails), tuple(counts), tuple(_head_index(own, k.device) for own in heads), batch,
        *k.stride()[:3], *v.stride()[:3], tuple(t.stride(0) for t in first), tuple(t.stride(1) for t in first),
        tuple(t.shape[2] for t in first), H=tuple(len(own) for own in heads), LEAVE=tuple(leave), STORES=len(tails), NEW=n,
        PADDED=triton.next_power_of_2(max(n, 1)), D=dim, DP=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip
