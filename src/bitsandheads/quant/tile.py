"""The tile: the contiguous bytes of `tile` tokens of one (sequence, KV head), the same for every backend.

    +--------------------- keys ----------------------+--------------------- values ---------------------+
    | two | one | trits | steps | centres | factors   | two | one | trits | steps | centres | factors    |
    +-------------------------------------------------+--------------------------------------------------+
    two, one: the two-bit and the one-bit plane; every section starts at a multiple of 16 bytes

Axes are sorted by class, most bits first. An axis of b bits takes b // 2 two-bit slots (weights 1, 4, 16) and b % 2
one-bit slots (weight 4^(b // 2)): code = sum of weight * slot. Two-bit slots are numbered class by class, within a class
weight by weight, within a weight in the order of the axes (so a *run* of 8 slots belongs to 8 neighbouring axes); one-bit
slots likewise.

steps [groups, axes that have bits] and centres [groups, axes that have a centre] are fp16 or e4m3, one group for every
group_size tokens; factors [groups, 2] (fp8 only) are fp16: what the group's steps and centres are multiplied by. With
per="token" there is one group with steps [tokens * blocks of 32 channels] and centres alike.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from . import metadata as meta
from . import planes
from .spec import TERNARY, KVQuant, TensorQuant, channel_block, class_sizes

ALIGN = 16


def _aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _neighbours(axes: list[int]) -> slice | list[int]:
    """The same axes as a slice where they follow each other: a list has to be copied to the device, which the host waits for."""
    return slice(axes[0], axes[-1] + 1) if axes and axes[-1] - axes[0] == len(axes) - 1 else axes


@dataclass(frozen=True)
class Slot:
    """A run of slots in one plane: `count` slots from `first` that belong to the axes from `axis`, with this weight."""

    bits: int
    first: int
    axis: int
    count: int
    weight: int


@dataclass(frozen=True)
class HalfLayout:
    """Layout of the keys' or the values' half of a tile. Offsets are in bytes from the start of the half."""

    kind: Literal["keys", "values"]
    spec: TensorQuant
    head_dim: int
    tokens: int
    group_size: int
    fmt: meta.MetadataFormat

    @cached_property
    def sizes(self) -> list[int]:
        """Axes of each class."""
        return class_sizes(self.spec.classes, self.head_dim)

    @cached_property
    def slots(self) -> list[Slot]:
        """All runs of slots, two-bit ones first."""
        runs: dict[int, list[Slot]] = {2: [], 1: []}
        used = {2: 0, 1: 0}
        axis = 0
        for c, n in zip(self.spec.classes, self.sizes, strict=True):
            if c.bits != TERNARY and n:
                pairs, single = divmod(int(c.bits), 2)
                for bits, weight in [(2, 4**j) for j in range(pairs)] + [(1, 4**pairs)] * single:
                    runs[bits].append(Slot(bits, used[bits], axis, n, weight))
                    used[bits] += n
            axis += n
        return runs[2] + runs[1]

    def plane_slots(self, bits: int) -> int:
        """Slots of the plane with `bits` bits."""
        return sum(s.count for s in self.slots if s.bits == bits)

    @cached_property
    def trit_axes(self) -> tuple[int, int]:
        """First axis and number of axes of the ternary classes (they are neighbours)."""
        axis, first, count = 0, 0, 0
        for c, n in zip(self.spec.classes, self.sizes, strict=True):
            if c.bits == TERNARY:
                first, count = (axis if not count else first), count + n
            axis += n
        return first, count

    def _axis_index(self, keep: list[bool]) -> list[int]:
        axes: list[int] = []
        axis = 0
        for k, n in zip(keep, self.sizes, strict=True):
            axes += range(axis, axis + n) if k else []
            axis += n
        return axes

    @cached_property
    def step_axes(self) -> list[int]:
        """Axes that have a step."""
        return self._axis_index([c.bits != 0 for c in self.spec.classes])

    @cached_property
    def centre_axes(self) -> list[int]:
        """Axes that have a centre."""
        return self._axis_index([c.centre for c in self.spec.classes])

    @cached_property
    def top(self) -> list[int]:
        """Largest code of every axis."""
        return [
            2 if c.bits == TERNARY else 2 ** int(c.bits) - 1 for c, n in zip(self.spec.classes, self.sizes, strict=True) for _ in range(n)
        ]

    @property
    def groups(self) -> int:
        """Metadata groups in a tile (1 with per="token": all its numbers form one array)."""
        return self.tokens // self.group_size if self.spec.per == "channel" else 1

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of steps and of centres in one metadata group."""
        if self.spec.per == "token":
            n = self.tokens * (self.head_dim // channel_block(self.head_dim))
            return n, n if self.spec.classes[0].centre else 0
        return len(self.step_axes), len(self.centre_axes)

    @cached_property
    def sections(self) -> dict[str, tuple[int, int]]:
        """Section name -> (offset, bytes), alignment not counted in the bytes."""
        size = meta.itemsize(self.fmt)
        sizes = {
            "two": planes.plane_bytes(self.plane_slots(2), 2, self.tokens),
            "one": planes.plane_bytes(self.plane_slots(1), 1, self.tokens),
            "trits": planes.trit_bytes(self.trit_axes[1], self.tokens),
            "steps": self.groups * self.counts[0] * size,
            "centres": self.groups * self.counts[1] * size,
            "factors": self.groups * 4 if self.fmt == "fp8" else 0,
        }
        out, offset = {}, 0
        for name, n in sizes.items():
            out[name] = (offset, n)
            offset += _aligned(n)
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of this half, a multiple of 16."""
        offset, n = self.sections["factors"]
        return offset + _aligned(n)

    def write(self, codes: Tensor, steps: Tensor, centres: Tensor, factors: Tensor) -> Tensor:
        """Lay codes and already encoded metadata into bytes.

        Args:
            codes: uint8 [..., axes, tokens].
            steps, centres: encoded metadata, uint8 [..., groups, bytes].
            factors: float16 [..., groups, 2] (not stored when the metadata are fp16).
        Returns:
            uint8 [..., nbytes].
        """
        pack = planes.pack_key_plane if self.kind == "keys" else planes.pack_value_plane
        out = torch.zeros(*codes.shape[:-2], self.nbytes, dtype=torch.uint8, device=codes.device)

        def put(name: str, data: Tensor) -> None:
            offset, n = self.sections[name]
            out[..., offset : offset + n] = data

        for name, bits in (("two", 2), ("one", 1)):
            parts = []
            for s in (s for s in self.slots if s.bits == bits):
                shift = s.weight.bit_length() - 1
                parts.append((codes[..., s.axis : s.axis + s.count, :] >> shift) & ((1 << bits) - 1))
            if parts:
                put(name, pack(torch.cat(parts, -2), bits))
        first, count = self.trit_axes
        if count:
            put("trits", planes.pack_trits(codes[..., first : first + count, :]))
        put("steps", steps.flatten(-2))
        put("centres", centres.flatten(-2))
        if self.fmt == "fp8":
            put("factors", factors.contiguous().view(torch.uint8).flatten(-2))
        return out

    def read_codes(self, data: Tensor) -> Tensor:
        """uint8 [..., nbytes] -> codes uint8 [..., axes, tokens] (0 for 0-bit axes)."""
        unpack = planes.unpack_key_plane if self.kind == "keys" else planes.unpack_value_plane
        codes = torch.zeros(*data.shape[:-1], self.head_dim, self.tokens, dtype=torch.uint8, device=data.device)
        for name, bits in (("two", 2), ("one", 1)):
            if not self.plane_slots(bits):
                continue
            offset, n = self.sections[name]
            slot_codes = unpack(data[..., offset : offset + n], bits, self.tokens)
            for s in (s for s in self.slots if s.bits == bits):
                codes[..., s.axis : s.axis + s.count, :] += slot_codes[..., s.first : s.first + s.count, :] * s.weight
        first, count = self.trit_axes
        if count:
            offset, n = self.sections["trits"]
            codes[..., first : first + count, :] = planes.unpack_trits(data[..., offset : offset + n], count, self.tokens)
        return codes

    def read_metadata(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [..., nbytes] -> steps, centres float32 [..., groups, count]."""

        def get(name: str, size: int) -> Tensor:
            offset, _ = self.sections[name]
            part = data[..., offset : offset + self.groups * size]
            return part.reshape(*data.shape[:-1], self.groups, size)

        size = meta.itemsize(self.fmt)
        stored = get("factors", 4).view(torch.float16) if self.fmt == "fp8" else None
        steps, centres = (get(n, c * size) for n, c in zip(("steps", "centres"), self.counts, strict=True))
        if stored is None:
            one = torch.ones(1, dtype=torch.float16, device=data.device)
            return meta.decode(steps, one, self.fmt), meta.decode(centres, one, self.fmt)
        return meta.decode(steps, stored[..., :1], self.fmt), meta.decode(centres, stored[..., 1:], self.fmt)

    def read(self, data: Tensor) -> Tensor:
        """uint8 [..., nbytes] -> restored axes, float32 [..., tokens, axes] (before any rotation back)."""
        codes = self.read_codes(data).transpose(-1, -2).float()  # [..., tokens, axes]
        half = torch.tensor(self.top, dtype=torch.float32).to(data.device, non_blocking=True) / 2  # the host waits for nothing
        steps, centres = self.read_metadata(data)
        lead = data.shape[:-1]
        if self.spec.per == "token":
            block = channel_block(self.head_dim)
            blocks = self.head_dim // block
            step = steps.view(*lead, self.tokens, blocks, 1)
            out = step * (codes - half).unflatten(-1, (blocks, block))
            if centres.shape[-1]:
                out = out + centres.view(*lead, self.tokens, blocks, 1)
            return out.flatten(-2)
        y = (codes - half).unflatten(-2, (self.groups, self.group_size))  # [..., groups, G, axes]
        step = torch.zeros(*lead, self.groups, self.head_dim, device=data.device)
        centre = torch.zeros_like(step)
        step[..., _neighbours(self.step_axes)] = steps
        centre[..., _neighbours(self.centre_axes)] = centres
        return torch.addcmul(centre[..., None, :], y, step[..., None, :]).flatten(-3, -2)


_LAYOUTS: list["TileLayout"] = []
_NUMBERS: dict[tuple[HalfLayout, HalfLayout], int] = {}


@dataclass(frozen=True)
class TileLayout:
    """The whole tile of a quantizer at one head_dim.

    Attributes:
        number: of this layout in this process, for operators, which take numbers but no layouts. See `numbered`.
    """

    keys: HalfLayout
    values: HalfLayout
    number: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        number = _NUMBERS.setdefault((self.keys, self.values), len(_NUMBERS))
        object.__setattr__(self, "number", number)
        if number == len(_LAYOUTS):
            _LAYOUTS.append(self)

    def __reduce__(self) -> tuple[type["TileLayout"], tuple[HalfLayout, HalfLayout]]:
        return TileLayout, (self.keys, self.values)  # another process has other numbers

    @staticmethod
    def numbered(number: int) -> "TileLayout":
        """The layout with this number."""
        return _LAYOUTS[number]

    @classmethod
    def of(cls, quant: KVQuant, head_dim: int, values: TensorQuant | None = None) -> "TileLayout":
        """The tile of `quant` for heads of `head_dim` channels. values: in place of quant.values, for salient tokens."""
        half = lambda kind, spec: HalfLayout(kind, spec, head_dim, quant.tile, quant.group_size, quant.metadata)  # noqa: E731
        return cls(half("keys", quant.keys), half("values", values or quant.values))

    @property
    def tokens(self) -> int:
        """Tokens of a tile."""
        return self.keys.tokens

    @property
    def nbytes(self) -> int:
        """Bytes of a tile, a multiple of 16."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def code_bytes(self) -> int:
        """Bytes of the code planes alone; the rest is metadata and alignment."""
        return sum(half.sections[name][1] for half in (self.keys, self.values) for name in ("two", "one", "trits"))

    def split(self, tiles: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [..., nbytes] -> the keys' bytes and the values' bytes (views)."""
        return tiles[..., : self.keys.nbytes], tiles[..., self.keys.nbytes :]
