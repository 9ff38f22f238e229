"""What every store can do, and how memory is reported."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.heads import HeadSet
from .tail import Tail


@dataclass
class Memory:
    """Bytes by part. in_use: what tokens occupy; allocated: what the tensors hold, spare capacity included.

    Parts: "sink", "codes", "metadata" (steps, centres, factors and padding of tiles), "residual" (the whole-precision tail of
    quantized heads), "window", "whole" (heads that are stored as they are), "basis" (rotations, means, ranks, positions of heavy tokens),
    "statistics" (the newest queries, held until packing starts).
    """

    in_use: dict[str, int] = field(default_factory=dict)
    allocated: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, in_use: int, allocated: int) -> None:
        """Count a part."""
        self.in_use[part] = self.in_use.get(part, 0) + in_use
        self.allocated[part] = self.allocated.get(part, 0) + allocated

    def merge(self, other: "Memory") -> None:
        """Add another report's parts."""
        for part, n in other.in_use.items():
            self.add(part, n, other.allocated[part])


@dataclass
class Prompt:
    """What a store may look at when it packs: the chunk's queries and scores.

    Attributes:
        queries: [B, h, group, n, D], the newest queries of the chunk, grouped by KV head of the store.
        weight: float [B, n], 0 for padding rows.
        scale: the factor of the model's attention scores.
        scores: per sequence, float [all its real tokens so far], or None.
    """

    queries: Tensor
    weight: Tensor
    scale: float
    scores: list[Tensor] | None = None


class Store(ABC):
    """The tokens of one head group of one layer."""

    tail: Tail
    lengths: Tensor  # int32 [3, B]: sink tokens, tiles, tail tokens

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor) -> None:
        """k, v: [B, h, any, D]; only batch, heads, head_dim, dtype and device count."""
        self.kv_heads = kv_heads
        self.tail = Tail(k, v)
        self.lengths = torch.zeros(3, k.shape[0], dtype=torch.int32, device=k.device)

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add a chunk [B, h, n, D]; valid bool [B, n] on the CPU, or None when all tokens are real."""

    @abstractmethod
    def compress(self, prompt: Prompt | None) -> None:
        """Pack or drop what is due. Called after the chunk was attended to."""

    def check_crop(self, remove: list[int]) -> None:  # noqa: B027 - most stores can always crop
        """Raise CacheStateError where `crop(remove)` is impossible; change nothing."""

    @abstractmethod
    def crop(self, remove: list[int]) -> None:
        """Forget the newest remove[b] real tokens of each sequence. The caller has called `check_crop`."""

    @abstractmethod
    def heads(self) -> HeadSet:
        """The view that the ops read. Valid until the store changes."""

    @abstractmethod
    def appended(self) -> list[int]:
        """Tokens of each sequence that were appended and not cropped, held or not."""

    @abstractmethod
    def memory(self) -> Memory:
        """Bytes by part."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that must be saved, by name."""

    @abstractmethod
    def state(self) -> dict[str, object]:
        """Counts that must be saved, as JSON values."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """Inverse of `tensors` and `state`. KeyError or ValueError where something is missing or does not fit together."""

    def select(self, index: Tensor) -> None:
        """Keep these sequences, in this order. index: int64 [B'] on the CPU."""
        self.tail.select(index)
        self.lengths = self.lengths.index_select(1, index.to(self.lengths.device))

    @property
    def lossless(self) -> bool:
        """Whether every token that was appended is still held whole, in one piece, for all sequences alike."""
        return False

    def _sync_lengths(self, sinks: list[int], tiles: list[int]) -> None:
        new = torch.tensor([sinks, tiles, self.tail.count], dtype=torch.int32)
        self.lengths = new.to(self.lengths.device)
