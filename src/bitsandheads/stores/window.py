"""Windowed heads: the first real tokens and the most recent ones, whole; everything between is dropped (StreamingLLM, RLKV)."""

import torch
from torch import Tensor

from ..errors import CacheStateError
from ..ops.heads import HeadSet
from ..ops.step import Held
from .base import Memory, Prompt, Store
from .tail import Tail, check_counts

ROLLBACK = 16  # tokens beyond the window that are kept so that `crop` (assisted decoding) can step back


class WindowStore(Store):
    """sink + recent tokens in fixed memory: recent + ROLLBACK to recent + 2 ROLLBACK tokens of the tail are held."""

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor, sink: int, recent: int, backend: str) -> None:
        super().__init__(kv_heads, k, v, backend)
        self.sink, self.recent = sink, recent
        self.first = Tail(k, v)
        self.dropped = [0] * k.shape[0]
        self.fresh = True
        self.leave = -(recent + ROLLBACK)

    @property
    def steady(self) -> bool:
        """See Store.steady. Not while the sink is filled."""
        return super().steady and not self.fresh and min(self.first.count) == self.sink

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """See Store.append. The first real tokens go to the sink, the others to the tail.

        Of the first chunk, to which attention was full, only what a later query can see is copied; of a later chunk everything,
        for its own queries see it yet.
        """
        fresh, self.fresh = self.fresh, False
        if not fresh and min(self.first.count) == self.sink:
            self.tail.append(k, v, valid)
        else:
            real = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if valid is None else valid
            room = torch.tensor([self.sink - c for c in self.first.count])[:, None]
            early = real & (real.cumsum(1) <= room)
            last = max((int(row.nonzero().max()) + 1 for row in early if row.any()), default=0)
            self.first.reserve(self.sink)
            self.first.append(k[:, :, :last], v[:, :, :last], early[:, :last])
            late = real & ~early
            start = self._skip(late) if fresh else 0
            late = late[:, start:]
            self.tail.append(k[:, :, start:], v[:, :, start:], None if bool(late.all()) else late)
        self._sync()

    def _skip(self, late: Tensor) -> int:
        """First column of a prompt that must be stored: earlier ones would be dropped at once. Counts them as dropped."""
        keep = self.recent + ROLLBACK
        columns = [row.nonzero().squeeze(1) for row in late]
        start = min(int(c[-min(keep, len(c))]) if len(c) else late.shape[1] for c in columns)
        for b, n in enumerate(late[:, :start].sum(1).tolist()):
            self.dropped[b] += n
        return start

    def _host_counts(self) -> list[list[int]]:
        batch = len(self.tail.count)
        return [self.first.count, [0] * batch, self.tail.count, [self._limit] * batch]

    @property
    def _limit(self) -> int:
        return self.recent + 2 * ROLLBACK

    def compress(self, prompt: Prompt | None) -> None:
        """Drop what no later query can see, once it is worth a move."""
        keep, before = self.recent + ROLLBACK, self.tail.count
        if max(before) >= self._limit:
            self._let_oldest_leave()
            self.tail.count = [keep if c >= self._limit else c for c in before]
            self.dropped = [d + c - left for d, c, left in zip(self.dropped, before, self.tail.count, strict=True)]
            self.tail.trim(self._limit)
        self.tail.own()

    def check_crop(self, remove: list[int]) -> None:
        """See Store.check_crop. Impossible once tokens of the window before the crop have been dropped."""
        for b, r in enumerate(remove):
            if self.dropped[b] and self.tail.count[b] - r < self.recent:
                raise CacheStateError(
                    f"crop removes {r} tokens, but a windowed head holds only its newest {self.tail.count[b]} tokens and its window of "
                    f"{self.recent} would be incomplete; at most {max(self.tail.count[b] - self.recent, 0)} can be removed now. "
                    "Start again with reset(), or use a plan without windowed heads."
                )

    def crop(self, remove: list[int]) -> None:
        """See Store.crop."""
        for b, r in enumerate(remove):
            beyond = max(r - self.tail.count[b], 0)
            self.tail.count[b] -= r - beyond
            self.first.count[b] -= beyond
        self._sync()

    def heads(self) -> HeadSet:
        """See Store.heads."""
        return HeadSet(
            self.kv_heads,
            self.tail.k,
            self.tail.v,
            self.lengths,
            self.first.k,
            self.first.v,
            window=self.recent,
            known=self._host_counts()[:3],
        )

    def fix(self, capacity: int) -> Held:
        """See Store.fix."""
        self.first.fix(self.sink)
        self.tail.fix(max(min(self._limit, capacity - self.sink), 1))
        return Held(self.heads(), self.counts, self.leave)

    def adopt(self, counts: list[list[int]], tokens: int) -> None:
        """See Store.adopt."""
        total = [n + tokens for n in self.appended()]
        super().adopt(counts, tokens)
        self.dropped = [n - first - tail for n, first, tail in zip(total, self.first.count, self.tail.count, strict=True)]

    def select(self, index: Tensor) -> None:
        """See Store.select."""
        super().select(index)
        self.first.select(index)
        self.dropped = [self.dropped[i] for i in index.tolist()]

    @property
    def lossless(self) -> bool:
        """True while nothing was dropped and all sequences have the same length."""
        return not any(self.dropped) and self.tail.uniform is not None and self.first.uniform is not None

    def appended(self) -> list[int]:
        """See Store.appended."""
        return [a + b + c for a, b, c in zip(self.first.count, self.dropped, self.tail.count, strict=True)]

    def memory(self) -> Memory:
        """See Store.memory."""
        out = Memory()
        for tail in (self.first, self.tail):
            out.add("window", sum(tail.count) * tail.token_bytes, tail.k.nbytes + tail.v.nbytes)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """See Store.tensors."""
        return self.first.tensors("sink") | self.tail.tensors("tail")

    def state(self) -> dict[str, object]:
        """See Store.state."""
        return self.first.state("sink") | self.tail.state("tail") | {"dropped": self.dropped}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """See Store.restore."""
        self.first.restore("sink", tensors, state)
        self.tail.restore("tail", tensors, state)
        self.dropped = check_counts("dropped", state["dropped"], len(self.dropped))
        self.fresh = False
        self._sync()
