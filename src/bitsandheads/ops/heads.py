"""What one head group of one layer holds, as every backend sees it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..quant.codec import Basis
from ..quant.tile import TileLayout


def numbers_on(device: torch.device, values: list[int] | list[list[int]]) -> Tensor:
    """int32 numbers [n] or [rows, n] on a device. The copy is queued behind what runs there, and the host does not wait."""
    return torch.tensor(values, dtype=torch.int32).to(device, non_blocking=True)


@dataclass
class HeadSet:
    """KV heads of a layer that are stored alike: sink, packed tiles and tail, with its own lengths for each sequence.

    Quantized heads have all three; windowed heads have a sink and a tail (their recent window); whole heads a tail only.
    Lengths count real tokens (padding is never stored in a sink, a tile or the tail of a quantized or windowed head).
    Shape letters: B sequences, h KV heads of this set, D head_dim.

    Attributes:
        kv_heads: indices of the heads within the layer, in the order of dimension h.
        sink_k, sink_v: [B, h, S, D], the model's dtype; the first sink_len[b] tokens count.
        tail_k, tail_v: [B, h, C, D], the model's dtype; the first tail_len[b] tokens count, oldest first.
        lengths: int32 [3, B] on the device: sink tokens, tiles, tail tokens.
        tiles: uint8 [B, h, capacity, layout.nbytes], the first tile count tiles of each sequence count.
        layout: the tile's layout, or None without tiles.
        key_basis, value_basis: see quant.codec.
        window: recent tokens that a query sees beside the sink, itself included; None: all.
        known: the lengths [3][B] where the host knows them too, so that whoever needs them there does not wait for the device.
        extra: further packed parts with other codes of the values (salient tokens); each a HeadSet with tiles only.
    """

    kv_heads: tuple[int, ...]
    tail_k: Tensor
    tail_v: Tensor
    lengths: Tensor
    sink_k: Tensor | None = None
    sink_v: Tensor | None = None
    tiles: Tensor | None = None
    layout: TileLayout | None = None
    key_basis: Basis = field(default_factory=dict)
    value_basis: Basis = field(default_factory=dict)
    window: int | None = None
    extra: "tuple[HeadSet, ...]" = ()
    known: list[list[int]] | None = None

    def rows(self, rows: slice) -> "HeadSet":
        """These sequences."""

        def cut(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[rows]

        key, value = ({name: t[rows] for name, t in basis.items()} for basis in (self.key_basis, self.value_basis))
        return HeadSet(
            self.kv_heads, self.tail_k[rows], self.tail_v[rows], self.lengths[:, rows].contiguous(), cut(self.sink_k), cut(self.sink_v),
            cut(self.tiles), self.layout, key, value, self.window, tuple(part.rows(rows) for part in self.extra),
            None if self.known is None else [row[rows] for row in self.known],
        )  # fmt: skip
