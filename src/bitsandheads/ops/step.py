"""One decode step of a layer as one operator: append the new token, attend, remember the query, pack a full tile. Nothing is read by the host.

`step` is the custom operator `torch.ops.bitsandheads.step` with a fake implementation, so that it can be traced and captured in a CUDA graph
(on a GPU with kernels for appending, attention and packing; the plain PyTorch reference reads the counts). What a layer holds is no argument of
the operator: a compiled step would have to look at some twenty tensors of each layer every time, and would be compiled anew for each plan and
capacity. The operator takes a *cell* instead, a tensor whose address stands for the places of all of them. A captured graph compares that address,
and is captured again where a cell is another. Shape letters: B sequences, Hq query heads, H KV heads of the layer, h KV heads of a store,
D head_dim, R remembered queries.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import CacheStateError, ShapeError
from ..quant.codec import Basis
from . import _describe, _dispatch
from .append import Growing, _head_index, append
from .heads import HeadSet
from .modes import plain
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

    def places(self) -> Hashable:
        """Where everything lies, and what it is: equal for two stores only if a captured step of one is a step of the other."""
        tensors = [self.counts, *(() if self.status is None else (self.status,))]
        if self.ring is not None:
            tensors += [self.ring.q, self.ring.weight, self.ring.place]
        shape = _describe(self.heads, tensors)
        return shape, self.leave, self.status is None, tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in tensors)


_CELLS: dict[Hashable, Tensor] = {}  # by places; never freed, so that no address stands for two
_STEPS: WeakValueDictionary[int, "LayerStep"] = WeakValueDictionary()  # by the address of the cell


class LayerStep:
    """A decode step of a layer, ready to be called any number of times, and traceable.

    Attributes:
        stores: of the layer.
        backend: who appends, attends and packs, see ops.
        cell: int64 [1] on the stores' device, see the head of this file.
        packs: whether the tile that becomes full is packed. Whoever knows that none does may capture a step without that.
    """

    def __init__(self, stores: list[Held], backend: str) -> None:
        self.stores, self.backend, self.packs = stores, backend, True
        device = stores[0].counts.device
        places = (device, backend, tuple(s.places() for s in stores))
        if places not in _CELLS:
            _CELLS[places] = torch.zeros(1, dtype=torch.int64, device=device)
        self.cell = _CELLS[places]
        _STEPS[self.cell.data_ptr()] = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Append k, v [B, H, 1, D], attend with q [B, Hq, 1, D] -> [B, 1, Hq, D], pack what is full."""
        return torch.ops.bitsandheads.step(q, k, v, self.cell, scale)

    def warm(self, q: Tensor, kv_heads: int) -> None:
        """Compile the kernels and upload their tables, which no graph may do while it is captured. q: [B, Hq, 1, D]. Nothing is appended."""
        nothing = q.new_empty(q.shape[0], kv_heads, 0, q.shape[3])
        self.run(q, nothing, nothing, 1.0)

    @plain
    def run(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """What the operator does, see `__call__`; k and v may hold no token. Raises ShapeError for another batch."""
        stores, batch = self.stores, self.stores[0].counts.shape[1]
        if q.shape[0] != batch:
            raise ShapeError(
                f"The cache holds {batch} sequences and was given {q.shape[0]}. Use batch_select_indices, or reset() to start anew."
            )
        append(k, v, [Growing(s.heads.kv_heads, s.heads.tail_k, s.heads.tail_v, s.counts, s.leave) for s in stores], self.backend)
        out = _dispatch(q, [s.heads for s in stores], scale, None, self.backend)[0]
        for s in stores:
            if s.ring is not None and k.shape[2]:
                _remember(s.ring, q, s.heads.kv_heads, k.shape[1])
            if self.packs and s.heads.tiles is not None and s.heads.layout is not None and s.status is not None:
                halves: list[tuple[Which, Tensor, Basis]]
                halves = [("keys", s.heads.tail_k, s.heads.key_basis), ("values", s.heads.tail_v, s.heads.value_basis)]
                for which, x, basis in halves:
                    pack(x, s.heads.tiles, s.counts, 1, s.heads.layout, which, basis, due=True, status=s.status, backend=self.backend)
        return out.transpose(1, 2).contiguous()


@torch.library.custom_op("bitsandheads::step", mutates_args=())
def _step(q: Tensor, k: Tensor, v: Tensor, cell: Tensor, scale: float) -> Tensor:
    step = _STEPS.get(cell.data_ptr())
    if step is None:
        raise CacheStateError(
            "A compiled decode step was given a copy of a cache's cell, or that of a cache that is gone. Compile the step with the cache that "
            "it is used with, and without options that copy inputs."
        )
    return step.run(q, k, v, scale)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cell: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _remember(ring: Ring, q: Tensor, kv_heads: tuple[int, ...], total: int) -> None:
    newest = q.unflatten(1, (total, -1)).index_select(1, _head_index(kv_heads, q.device))
    ring.q.index_copy_(3, ring.place, newest.to(ring.q.dtype))
    ring.weight.index_fill_(1, ring.place, 1.0)
    ring.place.add_(1).remainder_(ring.q.shape[3])
