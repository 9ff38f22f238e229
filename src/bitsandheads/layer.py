"""One compressed layer: stages a chunk, attends over what it holds, then packs. Knows nothing of transformers."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .errors import AttentionNotEnabledError, CacheStateError, ModelMismatchError, ShapeError
from .ops.append import MAX_NEW
from .ops.chunks import attend_chunk
from .ops.heads import HeadSet
from .ops.modes import plain
from .ops.step import LayerStep
from .plan import HeadGroup, LayerShape
from .stores.base import Memory, Prompt, Store
from .stores.packed import RECENT_QUERIES, PackedStore
from .stores.whole import WholeStore
from .stores.window import WindowStore

BaseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Segment:
    """A run of logical tokens. valid: bool [B, tokens] on the CPU, or None when all are real."""

    tokens: int
    valid: Tensor | None


@dataclass
class ChunkMask:
    """What the model's mask says of the newest n tokens.

    Attributes:
        valid: bool [B, n] on the CPU, or None when all are real.
        hidden: int64 [B, n], how many of the newest stored tokens each query does not see, or None for plain causal.
    """

    valid: Tensor | None
    hidden: Tensor | None


def read_mask(mask: Tensor | None, n: int) -> ChunkMask:
    """Understand a mask of transformers: None, bool or additive [B, 1, n, all tokens], or padding [B, all tokens]."""
    if mask is None or (n == 1 and mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        return ChunkMask(None, None)
    if mask.ndim == 2:
        valid = mask[:, -n:].bool().cpu()
        if bool(valid.all()):
            return ChunkMask(None, None)
        count = valid.cumsum(1)
    else:
        visible = mask[:, 0, -n:, -n:]
        visible = visible if visible.dtype == torch.bool else visible > torch.finfo(visible.dtype).min / 2
        count = (visible & visible[:, -1:]).sum(-1).cpu()  # where the mask is: that of a long chunk is large
        valid = visible[:, -1].cpu()
    total = valid.sum(1, keepdim=True)
    hidden = torch.where(valid, total - count, torch.zeros_like(total))
    causal = torch.arange(n - 1, -1, -1)
    if bool(valid.all()):
        return ChunkMask(None, None if bool((hidden == causal).all()) else hidden)
    return ChunkMask(valid, hidden)


class CompressedLayer:
    """The stores of one layer and the chunk that is being processed.

    Life of a chunk: `stage(k, v)` (from Cache.update), then `attend(...)` (from the attention function), which appends the
    chunk to the stores, attends, and lets the stores pack what is due.
    """

    def __init__(
        self,
        index: int,
        groups: tuple[HeadGroup, ...],
        shape: LayerShape,
        backend: str,
        dtype: torch.dtype | None = None,
        real_only: bool = False,
    ) -> None:
        """dtype: of tokens that are kept whole; None: the model's. real_only: never store padding."""
        self.index, self.groups, self.shape, self.backend, self.dtype = index, groups, shape, backend, dtype
        self.real_only = real_only
        self.step: LayerStep | None = None
        self.scale = 0.0
        self.stores: list[Store] = []
        self.segments: list[Segment] = []
        self.staged: tuple[Tensor, Tensor] | None = None
        self.token_scores: Tensor | None = None
        self.scores: list[Tensor] | None = None

    # -- lengths ----------------------------------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Logical tokens, padding and the staged chunk included."""
        return self.stored_tokens + (self.staged[0].shape[2] if self.staged is not None else 0)

    @property
    def stored_tokens(self) -> int:
        """Logical tokens without the staged chunk."""
        return sum(s.tokens for s in self.segments)

    @property
    def batch(self) -> int:
        """Number of sequences; 0 before the first chunk."""
        return len(self.stores[0].tail.count) if self.stores else 0

    def real_tokens(self) -> list[int]:
        """Real tokens of each sequence."""
        out = [0] * self.batch
        for s in self.segments:
            real = [s.tokens] * self.batch if s.valid is None else s.valid.sum(1).tolist()
            out = [a + b for a, b in zip(out, real, strict=True)]
        return out

    # -- a chunk ----------------------------------------------------------------------------------------------------------------

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Take the chunk's keys and values [B, H_kv, n, D].

        Raises:
            AttentionNotEnabledError: the chunk before this one was never attended to.
            ModelMismatchError, ShapeError: see `check`.
        """
        if self.staged is not None:
            raise AttentionNotEnabledError(
                f"Layer {self.index} was given new tokens before it attended to the last ones: this model does not use the attention "
                "function of bitsandheads. Call bitsandheads.enable(model) first."
            )
        self.check(k, v)
        if not self.stores:
            self.make_stores(k, v)
        self.staged = k, v

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raise ModelMismatchError or ShapeError where a chunk does not belong to this layer."""
        expected = (self.shape.kv_heads, self.shape.head_dim)
        for name, x in (("keys", k), ("values", v)):
            if x.ndim != 4 or (x.shape[1], x.shape[3]) != expected:
                raise ModelMismatchError(
                    f"Layer {self.index} was given {name} of shape {list(x.shape)}; this cache was made for {expected[0]} KV heads with "
                    f"head_dim {expected[1]}. Make the cache from the configuration of the model that it is used with."
                )
        if self.stores and k.shape[0] != self.batch:
            raise ShapeError(
                f"Layer {self.index} holds {self.batch} sequences and was given {k.shape[0]}. Use batch_repeat_interleave or "
                "batch_select_indices to change the batch, or reset() to start anew."
            )

    @plain
    def make_stores(self, k: Tensor, v: Tensor) -> None:
        """Make empty stores for tensors like k and v [B, H_kv, any, D]."""
        k, v = k.to(self.dtype or k.dtype), v.to(self.dtype or v.dtype)
        whole = all(g.window is None and g.quant is None for g in self.groups)
        for g in self.groups:
            heads = g.kv_heads or ()
            kg, vg = self._pick(k, heads), self._pick(v, heads)
            if g.quant is not None:
                self.stores.append(PackedStore(heads, kg, vg, g.quant, self.backend))
            elif g.window is not None:
                self.stores.append(WindowStore(heads, kg, vg, g.window.sink, g.window.recent, self.backend))
            else:
                keep = whole and not self.real_only and ops.resolve_backend(self.backend, k.device) == "reference"
                self.stores.append(WholeStore(heads, kg, vg, self.backend, keep_padding=keep))

    def _pick(self, x: Tensor, heads: tuple[int, ...]) -> Tensor:
        return x if len(heads) == x.shape[1] and heads == tuple(range(x.shape[1])) else x[:, list(heads)]

    @plain
    def attend(self, q: Tensor, chunk: ChunkMask, scale: float, base: BaseAttention) -> Tensor:
        """Attention of the staged chunk over everything, then packing.

        Args:
            q: [B, H_q, n, D] after RoPE.
            chunk: what the model's mask says of its tokens.
            base: (q, k, v) -> [B, n, H_q, D], the model's own attention with its mask; used while nothing is compressed.
        Returns:
            [B, n, H_q, D].
        Raises:
            CacheStateError: nothing is staged, or salient tokens must be scored and were not.
            NotFiniteError: tokens that cannot be packed.
        """
        if self.staged is None:
            raise CacheStateError(f"Layer {self.index} has no staged tokens; call update() before the attention function.")
        k, v = self.staged
        self.staged = None
        self.scale = scale
        n = k.shape[2]
        first = not self.segments
        self._take_scores(n, chunk)
        exact = first or self._whole_so_far(chunk, n)
        if exact:
            keys, values = (k, v) if first else self._with_history(k, v)
            out = base(q, keys, values)
            del keys, values
        self._append(k, v, chunk.valid)
        self._record(n, chunk.valid)
        if not exact:
            hidden = None if chunk.hidden is None else chunk.hidden.to(q.device)
            sets: list[HeadSet] = [store.heads() for store in self.stores]
            out = attend_chunk(q, sets, scale, hidden, self.backend).transpose(1, 2).contiguous()
        del k, v
        for store in self.stores:
            store.compress(self._prompt(q, store, chunk, scale))
        return out

    def _append(self, k: Tensor, v: Tensor, valid: Tensor | None) -> None:
        """Add the chunk to the stores; a few real tokens in one launch and without a transfer."""
        n = k.shape[2]
        if valid is None and n <= MAX_NEW and all(store.steady for store in self.stores):
            ops.append(k, v, [store.growing(n) for store in self.stores], self.backend)
            for store in self.stores:
                store.advance(n)
            return
        for store in self.stores:
            kept_k, kept_v = (self._pick(x, store.kv_heads).to(self.dtype or x.dtype) for x in (k, v))
            store.append(kept_k, kept_v, valid)
            del kept_k, kept_v

    def _take_scores(self, n: int, chunk: ChunkMask) -> None:
        """Note the chunk's token scores; tokens that come without are the least salient."""
        given, self.token_scores = self.token_scores, None
        if not self.scored_by:
            return
        if given is None and not self.segments:
            raise CacheStateError(
                f'The plan protects salient tokens by scores (Salience.by="{self.scored_by}"), but none were given. '
                "Call cache.set_token_scores(scores) with float scores [batch, prompt tokens] before the prompt, or use "
                'by="attention". (by="embedding" scores prompts that the whole model is given as input_ids with pixels.)'
            )
        if given is None:
            given = torch.full((self.batch, n), -torch.inf)
        if list(given.shape) != [self.batch, n]:
            raise ShapeError(
                f"Token scores have shape {list(given.shape)}; the prompt has {self.batch} sequences of {n} tokens. Give [{self.batch}, {n}]."
            )
        new = [r if chunk.valid is None else r[chunk.valid[b].to(r.device)] for b, r in enumerate(given)]
        self.scores = new if self.scores is None else [torch.cat([s, r.to(s)]) for s, r in zip(self.scores, new, strict=True)]

    @property
    def scored_by(self) -> str:
        """How tokens of this layer are scored from outside: "embedding", "given", or "" if not at all."""
        return next((g.quant.salience.by for g in self.groups if g.quant and g.quant.salience and g.quant.salience.scored), "")

    def _whole_so_far(self, chunk: ChunkMask, n: int) -> bool:
        """n: tokens of the chunk. Whether the model's own attention over the tokens held gives what DynamicCache would give, bit for bit."""
        if any(isinstance(s, WholeStore) and s.keep_padding for s in self.stores):
            return True
        if ops.resolve_backend(self.backend, self.stores[0].tail.k.device) != "reference":
            return False
        padded = chunk.valid is not None or any(s.valid is not None for s in self.segments)
        return not padded and all(s.lossless for s in self.stores) and self._windows_open(n)

    def _windows_open(self, n: int) -> bool:
        """No window hides a token from the newest query of the chunk of n tokens."""
        total = self.stored_tokens + n
        return all(not isinstance(s, WindowStore) or total <= s.sink + s.recent for s in self.stores)

    def _with_history(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = self.stored_tokens
        keys = k.new_empty(k.shape[0], k.shape[1], n + k.shape[2], k.shape[3])
        values = v.new_empty(keys.shape)
        for store in self.stores:
            heads, at = list(store.kv_heads), 0
            for tail in (store.first, store.tail) if isinstance(store, WindowStore) else (store.tail,):
                count = tail.count[0]
                keys[:, heads, at : at + count] = tail.k[:, :, :count].to(k.dtype)
                values[:, heads, at : at + count] = tail.v[:, :, :count].to(v.dtype)
                at += count
        keys[:, :, n:], values[:, :, n:] = k, v
        return keys, values

    def _record(self, n: int, valid: Tensor | None) -> None:
        if valid is None and self.segments and self.segments[-1].valid is None:
            self.segments[-1].tokens += n
        else:
            self.segments.append(Segment(n, valid))

    def _prompt(self, q: Tensor, store: Store, chunk: ChunkMask, scale: float) -> Prompt | None:
        if not isinstance(store, PackedStore) or not store.wants_prompt:
            return None
        group = self.shape.q_heads // self.shape.kv_heads
        newest = q[:, :, -RECENT_QUERIES:].unflatten(1, (self.shape.kv_heads, group))
        queries = self._pick(newest, store.kv_heads)
        n = queries.shape[3]
        real = torch.ones(q.shape[0], n) if chunk.valid is None else chunk.valid[:, -n:]
        weight = real.float().to(q.device, non_blocking=True)
        return Prompt(queries, weight, scale, self.scores, padded=chunk.valid is not None)

    # -- fixed capacity (see fixed.py) ------------------------------------------------------------------------------------------------

    @plain
    def fix(self, capacity: int) -> None:
        """Put everything into buffers for `capacity` tokens of each sequence, and make `step`, which works on them without the host.

        Raises:
            CacheStateError: the sink of a windowed head is not full.
        """
        if not all(store.steady for store in self.stores):
            raise CacheStateError(
                f"Layer {self.index} has windowed heads whose sinks are not full, because a prompt is shorter than a sink. A cache of fixed "
                "capacity cannot go on from there: give longer prompts, or make the cache without capacity."
            )
        self.step = LayerStep([store.fix(capacity) for store in self.stores], self.backend)
        like = self.stores[0].tail.k
        if like.is_cuda:
            self.step.warm(like.new_zeros(self.batch, self.shape.q_heads, 1, self.shape.head_dim), self.shape.kv_heads)

    @plain
    def settle(self) -> None:
        """After steps: let packed tiles leave the tails, on the device."""
        like = self.stores[0].tail.k
        nothing = like.new_empty(like.shape[0], self.shape.kv_heads, 0, like.shape[3])
        ops.append(nothing, nothing, [store.growing(0) for store in self.stores], self.backend)

    @plain
    def adopt(self, counts: list[list[list[int]]], tokens: int) -> None:
        """Take over the device's counts [stores, 4, B] after `tokens` steps."""
        for store, own in zip(self.stores, counts, strict=True):
            store.adopt(own, tokens)
        if tokens:
            self._record(tokens, None)
        if self.scores is not None:
            self.scores = [torch.cat([s, s.new_full((tokens,), -torch.inf)]) for s in self.scores]

    @plain
    def start(self) -> None:
        """Pack the sequences that have become long enough for it, as `attend` does after a chunk."""
        for store in self.stores:
            if isinstance(store, PackedStore):
                queries = store.tail.k.new_empty(self.batch, len(store.kv_heads), store.query_group, 0, self.shape.head_dim)
                store.compress(Prompt(queries, queries.new_empty(self.batch, 0, dtype=torch.float32), self.scale, self.scores))

    # -- the rest of the cache contract -------------------------------------------------------------------------------------------

    def check_crop(self, remove: int) -> None:
        """Raise CacheStateError, and change nothing, where `crop(remove)` is impossible."""
        if 0 < remove < self.tokens:
            self._crop(remove, check=True)

    @plain
    def crop(self, remove: int) -> None:
        """Forget the newest `remove` logical tokens. Raises CacheStateError, and changes nothing, where that is impossible."""
        if remove <= 0:
            return
        if remove >= self.tokens:
            self.reset()
            return
        self._crop(remove, check=True)
        self._crop(remove, check=False)

    def _crop(self, remove: int, check: bool) -> None:
        real = [0] * self.batch
        left, segments = remove, [replace(s) for s in self.segments]
        while left:
            last = segments.pop()
            cut = min(left, last.tokens)
            valid = None if last.valid is None else last.valid[:, last.tokens - cut :]
            real = [a + (cut if valid is None else int(valid[b].sum())) for b, a in enumerate(real)]
            if cut < last.tokens:
                kept = None if last.valid is None else last.valid[:, : last.tokens - cut]
                segments.append(Segment(last.tokens - cut, kept))
            left -= cut
        for store in self.stores:
            keeps = isinstance(store, WholeStore) and store.keep_padding
            count = [remove] * self.batch if keeps else real
            if check:
                store.check_crop(count)
            else:
                store.crop(count)
        if check:
            return
        self.segments = segments
        if self.scores is not None:
            self.scores = [s[: len(s) - r] for s, r in zip(self.scores, real, strict=True)]

    def reset(self) -> None:
        """Forget everything."""
        self.stores, self.segments, self.staged, self.token_scores, self.scores, self.step = [], [], None, None, None, None

    @plain
    def select(self, index: Tensor) -> None:
        """Keep these sequences, in this order."""
        if not self.stores:
            return
        rows = torch.as_tensor(index).cpu().long()
        if rows.numel() and not -self.batch <= int(rows.min()) <= int(rows.max()) < self.batch:
            raise ShapeError(f"The cache holds {self.batch} sequences; {rows.tolist()} are not all among them.")
        rows = rows.remainder(max(self.batch, 1))
        for store in self.stores:
            store.select(rows)
        for s in self.segments:
            s.valid = None if s.valid is None else s.valid[rows]
        if self.scores is not None:
            self.scores = [self.scores[i] for i in rows.tolist()]

    def residual_tokens(self) -> int:
        """Tokens times KV heads that quantized heads hold whole in their residual, over all sequences."""
        packed = [s for s in self.stores if isinstance(s, PackedStore)]
        return sum(sum(s.tail.count) * len(s.kv_heads) for s in packed)

    def memory(self) -> Memory:
        """Bytes by part."""
        out = Memory()
        for store in self.stores:
            out.merge(store.memory())
        return out
