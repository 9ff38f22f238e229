"""What every store can do, and how memory is reported."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops.append import Growing, append
from ..ops.heads import HeadSet, numbers_on
from ..ops.step import Held
from .tail import Tail

NEVER = 2**31 - 1  # limit of a tail that gives no tokens away


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
        padded: whether a weight may be 0.
    """

    queries: Tensor
    weight: Tensor
    scale: float
    scores: list[Tensor] | None = None
    padded: bool = True


class Store(ABC):
    """The tokens of one head group of one layer.

    Counts are kept twice: as numbers on the host, and on the device, where the kernels read them. A step of a few real tokens advances both
    without a transfer (`growing`, `ops.append`, `advance`); whatever else changes counts writes them to the device (`_sync`).

    Attributes:
        counts: int32 [4, B] on the device: sink tokens, tiles, tail tokens, and the limit: tail tokens at which the oldest of them leave.
        leave: how many leave then, see ops.append.Growing.
        backend: who appends and packs, see ops.
    """

    tail: Tail
    leave: int = 0

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor, backend: str) -> None:
        """k, v: [B, h, any, D]; only batch, heads, head_dim, dtype and device count."""
        self.kv_heads, self.backend = kv_heads, backend
        self.tail = Tail(k, v)
        self.counts = torch.zeros(4, k.shape[0], dtype=torch.int32, device=k.device)
        self.counts[3] = NEVER

    @property
    def lengths(self) -> Tensor:
        """int32 [3, B] on the device: sink tokens, tiles, tail tokens."""
        return self.counts[:3]

    @abstractmethod
    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add a chunk [B, h, n, D]; valid bool [B, n] on the CPU, or None when all tokens are real."""

    @property
    def steady(self) -> bool:
        """Whether the next real tokens all go to the tail, so that `ops.append` can put them there."""
        return not self.tail.borrowed

    def growing(self, tokens: int) -> Growing:
        """What ops.append needs to add `tokens` tokens to every sequence. The caller appends them, then calls `advance`."""
        self.tail.reserve(max(self.tail.count) + tokens)
        return Growing(self.kv_heads, self.tail.k, self.tail.v, self.counts, self.leave)

    def advance(self, tokens: int) -> None:
        """Note on the host that `tokens` tokens were appended to every sequence."""
        self.tail.count = [c + tokens for c in self.tail.count]

    def _let_oldest_leave(self) -> None:
        """Apply the limits on the device; the caller counts along on the host."""
        empty = self.tail.k[:, :, :0], self.tail.v[:, :, :0]
        append(*empty, [self.growing(0)], self.backend)

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
        self.counts = self.counts.index_select(1, index.to(self.counts.device))

    @property
    def lossless(self) -> bool:
        """Whether every token that was appended is still held whole, in one piece, for all sequences alike."""
        return False

    @abstractmethod
    def fix(self, capacity: int) -> Held:
        """Move into buffers that hold `capacity` real tokens of each sequence and stay where they are while `ops.step` appends, attends and packs.

        The caller has seen that the store is `steady` and holds no more than that.
        """

    def adopt(self, counts: list[list[int]], tokens: int) -> None:
        """Take over the device's counts [4, B] after steps have added `tokens` tokens to every sequence."""
        self.tail.count = counts[2]

    @abstractmethod
    def _host_counts(self) -> list[list[int]]:
        """The rows of `counts`, from what the host knows."""

    def _sync(self) -> None:
        """Write the host's counts to the device."""
        self.counts.copy_(numbers_on(self.counts.device, self._host_counts()))
