"""Heads that are stored as they are: every token, in the model's dtype."""

from torch import Tensor

from ..ops.heads import HeadSet
from ..ops.step import Held
from .base import NEVER, Memory, Prompt, Store


class WholeStore(Store):
    """All tokens whole. With keep_padding, padding tokens are stored too, as transformers' own cache does."""

    def __init__(self, kv_heads: tuple[int, ...], k: Tensor, v: Tensor, backend: str, keep_padding: bool = False) -> None:
        super().__init__(kv_heads, k, v, backend)
        self.keep_padding = keep_padding

    def append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """See Store.append."""
        self.tail.append(k, v, None if self.keep_padding else valid)
        self._sync()

    def _host_counts(self) -> list[list[int]]:
        zeros = [0] * len(self.tail.count)
        return [zeros, zeros, self.tail.count, [NEVER] * len(zeros)]

    def compress(self, prompt: Prompt | None) -> None:
        """Nothing to pack; only stop sharing memory with the caller's tensors."""
        self.tail.own()

    def crop(self, remove: list[int]) -> None:
        """See Store.crop."""
        self.tail.count = [c - r for c, r in zip(self.tail.count, remove, strict=True)]
        self._sync()

    def heads(self) -> HeadSet:
        """See Store.heads."""
        return HeadSet(self.kv_heads, self.tail.k, self.tail.v, self.lengths, known=self._host_counts()[:3])

    def fix(self, capacity: int) -> Held:
        """See Store.fix."""
        self.tail.fix(capacity)
        return Held(self.heads(), self.counts, self.leave)

    @property
    def lossless(self) -> bool:
        """True while all sequences have the same length."""
        return self.tail.uniform is not None

    def appended(self) -> list[int]:
        """See Store.appended."""
        return list(self.tail.count)

    def memory(self) -> Memory:
        """See Store.memory."""
        out = Memory()
        out.add("whole", sum(self.tail.count) * self.tail.token_bytes, self.tail.k.nbytes + self.tail.v.nbytes)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """See Store.tensors."""
        return self.tail.tensors("tail")

    def state(self) -> dict[str, object]:
        """See Store.state."""
        return self.tail.state("tail")

    def restore(self, tensors: dict[str, Tensor], state: dict[str, object]) -> None:
        """See Store.restore."""
        self.tail.restore("tail", tensors, state)
        self._sync()
