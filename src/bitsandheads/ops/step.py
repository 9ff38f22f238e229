"""One decode step of a layer as one operator: append the new token, attend, remember the query, pack a full tile. Nothing is read by the host.

`step` is the custom operator `torch.ops.bitsandheads.step` with a fake implementation, so that it can be traced and captured in a CUDA graph
(on a GPU with kernels for appending, attention and packing; the plain PyTorch reference reads the counts). Shape letters: B sequences,
Hq query heads, H KV heads of the layer, h KV heads of a store, D head_dim, R remembered queries.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from ..quant.codec import Basis
from . import _describe, _dispatch, _rebuild
from .append import Growing, _head_index, append
from .heads import HeadSet
from .pack import Which, pack


@dataclass
class Ring:
    """The newest queries. q: [B, h, Hq / H, R, D]; weight: float32 [B, R], 0 for places without a query; place: int64 [1], the oldest, written next."""

    q: Tensor
    weight: Tensor
    place: Tensor


@dataclass
class Held:
    """One store of a layer, in buffers that do not move.

    Attributes:
        heads: what decode attention reads.
        counts: int32 [4, B], see ops.append.Growing.
        leave: see ops.append.Growing.
        status: see ops.pack.pack; None for heads that are never packed.
        ring: the newest queries, while a sequence waits for its basis; None: none are remembered.
    """

    heads: HeadSet
    counts: Tensor
    leave: int
    status: Tensor | None = None
    ring: Ring | None = None


_DESCRIPTIONS: list[tuple[Any, ...]] = []


@lru_cache(maxsize=1024)
def _number(description: tuple[Any, ...]) -> int:
    _DESCRIPTIONS.append(description)
    return len(_DESCRIPTIONS) - 1


@dataclass
class LayerStep:
    """A decode step of a layer, ready to be called any number of times, and traceable.

    Attributes:
        written: the tensors that a step writes. read: those that it only reads.
        number: of the description of everything that is no tensor.
    """

    written: list[Tensor]
    read: list[Tensor]
    number: int

    @classmethod
    def of(cls, stores: list[Held]) -> "LayerStep":
        """From the stores of a layer."""
        written: list[Tensor] = []
        read: list[Tensor] = []
        descriptions = []
        for s in stores:
            packs = s.status is not None and s.heads.tiles is not None
            tensors: list[Tensor] = []
            shape = _describe(replace(s.heads, tiles=None), tensors)  # begins with tail_k, tail_v, lengths
            written += [*tensors[:2], s.counts]
            if packs:
                written += [cast(Tensor, s.heads.tiles), cast(Tensor, s.status)]
            if s.ring is not None:
                written += [s.ring.q, s.ring.weight, s.ring.place]
            read += tensors[3:]
            descriptions.append((shape, len(tensors) - 3, s.leave, packs, s.ring is not None))
        return cls(written, read, _number(tuple(descriptions)))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
        """Append k, v [B, H, 1, D], attend with q [B, Hq, 1, D] -> [B, 1, Hq, D], pack what is full."""
        return torch.ops.bitsandheads.step(q, k, v, self.written, self.read, self.number, scale, backend)

    def warm(self, q: Tensor, kv_heads: int, backend: str) -> None:
        """Compile the kernels and upload their tables, which no graph may do while it is captured. q: [B, Hq, 1, D]. Nothing is appended."""
        nothing = q.new_empty(q.shape[0], kv_heads, 0, q.shape[3])
        _run(_held(self.number, self.written, self.read), q, nothing, nothing, 1.0, backend)


def _held(number: int, written: list[Tensor], read: list[Tensor]) -> list[Held]:
    """Inverse of LayerStep.of."""
    written, read = list(written), list(read)
    out = []
    for shape, others, leave, packs, remembers in _DESCRIPTIONS[number]:
        tail_k, tail_v, counts = (written.pop(0) for _ in range(3))
        tiles, status = (written.pop(0), written.pop(0)) if packs else (None, None)
        ring = Ring(*(written.pop(0) for _ in range(3))) if remembers else None
        own = [tail_k, tail_v, counts[:3], *(read.pop(0) for _ in range(others))]
        out.append(Held(replace(_rebuild(shape, own), tiles=tiles), counts, leave, status, ring))
    return out


@torch.library.custom_op("bitsandheads::step", mutates_args=("written",))
def _step(q: Tensor, k: Tensor, v: Tensor, written: list[Tensor], read: list[Tensor], number: int, scale: float, backend: str) -> Tensor:
    return _run(_held(number, written, read), q, k, v, scale, backend)


def _run(stores: list[Held], q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str) -> Tensor:
    append(k, v, [Growing(s.heads.kv_heads, s.heads.tail_k, s.heads.tail_v, s.counts, s.leave) for s in stores], backend)
    out = _dispatch(q, [s.heads for s in stores], scale, None, backend)[0]
    for s in stores:
        if s.ring is not None and k.shape[2]:
            _remember(s.ring, q, s.heads.kv_heads, k.shape[1])
        if s.heads.tiles is not None and s.heads.layout is not None and s.status is not None:
            halves: list[tuple[Which, Tensor, Basis]]
            halves = [("keys", s.heads.tail_k, s.heads.key_basis), ("values", s.heads.tail_v, s.heads.value_basis)]
            for which, x, basis in halves:
                pack(x, s.heads.tiles, s.counts, 1, s.heads.layout, which, basis, due=True, status=s.status, backend=backend)
    return out.transpose(1, 2).contiguous()


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, written: list[Tensor], read: list[Tensor], number: int, scale: float, backend: str) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _remember(ring: Ring, q: Tensor, kv_heads: tuple[int, ...], total: int) -> None:
    newest = q.unflatten(1, (total, -1)).index_select(1, _head_index(kv_heads, q.device))
    ring.q.index_copy_(3, ring.place, newest.to(ring.q.dtype))
    ring.weight.index_fill_(1, ring.place, 1.0)
    ring.place.add_(1).remainder_(ring.q.shape[3])
