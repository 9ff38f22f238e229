"""Whole-precision tokens of a head group, oldest first, each sequence with its own count."""

from typing import Any

import torch
from torch import Tensor

SLACK = 64  # tokens that a new buffer has room for beyond what is needed now


def check_counts(name: str, counts: Any, batch: int) -> list[int]:
    """Saved counts as a list; ValueError when they are not `batch` whole numbers."""
    if not isinstance(counts, list) or len(counts) != batch or not all(isinstance(c, int) and c >= 0 for c in counts):
        raise ValueError(f"{name} says {counts!r} for {batch} sequences")
    return [int(c) for c in counts]


def check_tensor(name: str, t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A saved tensor; ValueError when it has another shape or dtype."""
    if tuple(t.shape) != shape or t.dtype != dtype:
        raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, but {dtype} {list(shape)} belongs there")
    return t


class Tail:
    """A growing buffer of keys and values [B, h, capacity, D]; count[b] tokens of sequence b are in use."""

    def __init__(self, k: Tensor, v: Tensor) -> None:
        """An empty tail with the batch, heads, head_dim, dtype and device of k and v [B, h, any, D]."""
        self.k = k.new_zeros(*k.shape[:2], 0, k.shape[3])  # not a slice, which would keep all of k alive
        self.v = v.new_zeros(*v.shape[:2], 0, v.shape[3])
        self.count = [0] * k.shape[0]
        self.borrowed = False
        self.keep = 0  # least capacity that `trim` leaves

    @property
    def uniform(self) -> int | None:
        """The common count, or None when sequences differ."""
        return self.count[0] if self.count and len(set(self.count)) == 1 else None

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens of every sequence; growth is geometric."""
        if self.borrowed or tokens > self.k.shape[2]:
            grown = tokens if self.k.shape[2] == 0 and not self.borrowed else max(tokens + SLACK, tokens * 9 // 8)
            self.resize(grown)

    def resize(self, capacity: int) -> None:
        """Move what is in use to a buffer of this capacity."""
        used = max(self.count, default=0)

        def move(old: Tensor) -> Tensor:
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :used] = old[:, :, :used]
            return new

        self.k, self.v, self.borrowed = move(self.k), move(self.v), False

    def fix(self, capacity: int) -> None:
        """Move to a buffer of exactly this capacity, unless it is there already, and stay in it."""
        self.keep = capacity
        if self.borrowed or self.k.shape[2] != capacity:
            self.resize(capacity)

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add tokens k, v [B, h, n, D]; valid: bool [B, n] on the CPU, or None when all are real.

        A first, long, unpadded chunk is borrowed, not copied: the caller packs it and then calls `shrink`.
        """
        n = k.shape[2]
        start = self.uniform
        if valid is None and start == 0 and n > SLACK:
            self.k, self.v, self.borrowed = k, v, True
            self.count = [n] * len(self.count)
            return
        if valid is None and start is not None:
            self.reserve(start + n)
            self.k[:, :, start : start + n] = k
            self.v[:, :, start : start + n] = v
            self.count = [start + n] * len(self.count)
            return
        if valid is None:  # each sequence at its own place
            self.reserve(max(self.count) + n)
            place = torch.tensor(self.count, device=k.device)[:, None] + torch.arange(n, device=k.device)
            rows = torch.arange(len(self.count), device=k.device)[:, None]
            self.k[rows, :, place] = k.transpose(1, 2)
            self.v[rows, :, place] = v.transpose(1, 2)
            self.count = [c + n for c in self.count]
            return
        added = valid.sum(1).tolist()
        self.reserve(max(c + a for c, a in zip(self.count, added, strict=True)))
        for b, (c, a) in enumerate(zip(self.count, added, strict=True)):
            keep = valid[b].nonzero().squeeze(1).to(k.device)
            self.k[b, :, c : c + a] = k[b, :, keep]
            self.v[b, :, c : c + a] = v[b, :, keep]
            self.count[b] = c + a

    def drop_front(self, tokens: list[int], capacity: int) -> None:
        """Forget the oldest tokens[b] tokens of each sequence. What is left of a borrowed buffer is copied to one of at least `capacity`."""
        left = [c - t for c, t in zip(self.count, tokens, strict=True)]
        source = self.k, self.v
        if self.borrowed:
            self.k, self.v = (x.new_zeros(*x.shape[:2], max(capacity, *left), x.shape[3]) for x in source)
        for old, new in zip(source, (self.k, self.v), strict=True):
            for b, (t, n) in enumerate(zip(tokens, left, strict=True)):
                if t or self.borrowed:
                    left_over = old[b, :, t : t + n]
                    new[b, :, :n] = left_over if self.borrowed else left_over.clone()
        self.count, self.borrowed = left, False

    def trim(self, capacity: int) -> None:
        """Fall back to `capacity`, or what is in use, if the buffer is far larger."""
        capacity = max(capacity, self.keep, *self.count)
        if not self.borrowed and self.k.shape[2] > 2 * capacity:
            self.resize(capacity)

    def put_front(self, b: int, k: Tensor, v: Tensor) -> None:
        """Insert tokens [h, n, D] before the oldest token of sequence b."""
        n, c = k.shape[1], self.count[b]
        self.reserve(max(max(self.count), n + c))
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer[b, :, n : n + c] = buffer[b, :, :c].clone()
            buffer[b, :, :n] = new.to(buffer.dtype)
        self.count[b] = n + c

    def own(self) -> None:
        """Copy a borrowed buffer, so that later appends do not write into the caller's tensors."""
        if self.borrowed:
            self.resize(max(self.count))

    def select(self, index: Tensor) -> None:
        """Keep these sequences, in this order (beams, batch selection)."""
        rows = index.tolist()
        self.k, self.v = self.k.index_select(0, index.to(self.k.device)), self.v.index_select(0, index.to(self.v.device))
        self.borrowed = False
        self.count = [self.count[r] for r in rows]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What must be saved: the places in use."""
        used = max(self.count, default=0)
        return {f"{name}_k": self.k[:, :, :used], f"{name}_v": self.v[:, :, :used]}

    def state(self, name: str) -> dict[str, object]:
        """Counts that must be saved. The capacity belongs to them: sums over a longer buffer may be rounded otherwise."""
        return {name: self.count, f"{name}_capacity": self.k.shape[2]}

    def restore(self, name: str, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Inverse of `tensors` and `state`. ValueError where they do not fit together."""
        capacity, count = state[f"{name}_capacity"], check_counts(name, state[name], len(self.count))
        used = max(count, default=0)
        for buffer in ("k", "v"):
            data, like = tensors[f"{name}_{buffer}"], getattr(self, buffer)
            check_tensor(f"{name}_{buffer}", data, (*like.shape[:2], used, like.shape[3]), like.dtype)
            room = like.new_zeros(*like.shape[:2], max(capacity, used), like.shape[3])
            room[:, :, :used] = data
            setattr(self, buffer, room)
        self.count, self.borrowed = count, False

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of one sequence, keys and values, all heads."""
        return self.k.shape[1] * (self.k.shape[3] * self.k.element_size() + self.v.shape[3] * self.v.element_size())
