"""A transformers cache from which whole tokens are evicted, head by head, under a budget of bytes that grows with the length.

The comparators drop tokens of every head; a plan with head scores drops them of some heads only. To compare them at equal memory
each method gets, at every length, as many tokens for each KV head as the plan holds on average over its heads, with whatever the
method must store beside them (accumulated scores, queries) taken off. While the plan drops nothing they drop nothing. The prompt is
read with full attention by all of them, then cut down to the budget.

    plan = bitsandheads.rlkv(scores, 0.5)
    cache = EvictionCache(H2O(), plan, model)            # as much memory as the plan
    with bitsandheads.enabled(model):
        model.generate(**inputs, past_key_values=cache)

Tokens lie in slots: an evicted token's slot is taken by the next one. Attention does not care for their order, since RoPE is in the
keys. Shape letters: B sequences, H KV heads, G query heads of a KV head, n new tokens, C slots, D head_dim.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from bitsandheads import CachePlan, HeadGroup
from bitsandheads.layer import ChunkMask
from bitsandheads.plan import LayerShape
from bitsandheads.seam import CompressedCacheLayer, MaskReader, layer_shapes, text_config
from bitsandheads.stores.window import ROLLBACK

WEIGHTS = 1 << 26  # attention weights of a prompt that are held at once


class Method(ABC):
    """How tokens are chosen. One object serves any number of caches: what it remembers lies in the EvictionLayer."""

    name: str
    sums_attention = False  # whether the layer accumulates the attention that every token draws (float32 for each token and head)
    queries = 0  # newest queries that the layer keeps
    slack = 0  # tokens below the budget that an eviction goes, so that the next one is not due at once

    @abstractmethod
    def keep_scores(self, layer: "EvictionLayer", budget: Tensor) -> Tensor:
        """float32 [B, H, C]: the lowest are evicted first. budget: int64 [B] tokens. Tokens that must stay score infinity."""


class Budget:
    """Tokens for each KV head under a plan's bytes.

    Attributes:
        fixed: bytes of one KV head that do not depend on the length.
        token: bytes of one token of one KV head, with what is stored beside it.
    """

    def __init__(self, plan: CachePlan, shapes: list[LayerShape], itemsize: int, method: Method) -> None:
        self.plan, self.full, self.itemsize = plan.resolve(shapes), CachePlan("", (HeadGroup(),)).resolve(shapes), itemsize
        self.heads = sum(s.kv_heads for s in shapes)
        shape = shapes[0]
        self.fixed = method.queries * (shape.q_heads // shape.kv_heads) * shape.head_dim * itemsize
        self.token = 2 * shape.head_dim * itemsize + 4 * method.sums_attention
        self._known: list[int] = []

    def tokens(self, length: int) -> int:
        """Tokens that each head may hold of a sequence of so many; at least 1, at most all; all where the plan drops nothing yet.

        A windowed head holds ROLLBACK tokens more or less as it grows; the most that it holds counts.
        """
        while len(self._known) <= length:
            t = len(self._known)
            most = max(self.plan.bytes_for(t, 1, self.itemsize, generated) for generated in (0, min(ROLLBACK - 1, t)))
            whole = most == self.full.bytes_for(t, 1, self.itemsize)
            self._known.append(t if whole else min(t, max(1, (most // self.heads - self.fixed) // self.token)))
        return self._known[length]

    def bytes_for(self, length: int) -> int:
        """Bytes held of a sequence of so many tokens, at most."""
        return self.heads * (self.tokens(length) * self.token + self.fixed)


class EvictionLayer:
    """The tokens of one layer: what CompressedLayer is to a plan. Only left padding of the first chunk is known."""

    groups = ()  # no heads that a plan names

    def __init__(self, index: int, shape: LayerShape, method: Method, budget: Budget, dtype: torch.dtype | None) -> None:
        self.index, self.shape, self.method, self.budget, self.dtype = index, shape, method, budget, dtype
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.tokens = self.batch = 0
        self.staged: tuple[Tensor, Tensor] | None = None
        self.seen: list[int] = []  # real tokens of each sequence so far
        self.held: list[int] = []  # of these still there
        self.k = self.v = self.place = self.sums = self.recent = None

    @property
    def stored_tokens(self) -> int:
        """Tokens of each sequence so far, padding included, without those of a chunk that is staged."""
        return self.tokens - (0 if self.staged is None else self.staged[0].shape[2])

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Take the chunk's keys and values [B, H, n, D]."""
        self.staged = k, v
        self.tokens += k.shape[2]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        rows = rows.cpu()
        self.seen, self.held = ([x[i] for i in rows.tolist()] for x in (self.seen, self.held))
        for name in ("k", "v", "place", "sums", "recent"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.index_select(0, rows.to(value.device)))
        self.batch = len(rows)

    # -- a chunk --------------------------------------------------------------------------------------------------------------

    def attend(self, q: Tensor, chunk: ChunkMask, scale: float, base: Any) -> Tensor:
        """Attention of the staged chunk, then eviction. See CompressedLayer.attend."""
        assert self.staged is not None
        (k, v), self.staged = self.staged, None
        first = self.k is None
        if first:
            real = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if chunk.valid is None else chunk.valid
            out = base(q, k, v)
            self._take_prompt(q, k, v, real, scale)
        else:
            assert chunk.valid is None and chunk.hidden is None, "new tokens must be real and causal"
            out = self._decode(q, k, v, scale)
        self._evict()
        return out

    def _take_prompt(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor, scale: float) -> None:
        self.batch = real.shape[0]
        self.seen = real.sum(1).tolist()
        self.held = list(self.seen)
        heads, device = k.shape[1], k.device
        real = real.to(device)
        place = torch.where(real, real.long().cumsum(1) - 1, -1)
        self.k, self.v = (x.to(self.dtype or x.dtype, copy=True) for x in (k, v))
        self.place = place[:, None].expand(-1, heads, -1).clone()
        if self.method.sums_attention:
            self.sums = self._prompt_sums(q, real, scale)
        if self.method.queries:
            self.recent = q[:, :, -self.method.queries :].to(self.k.dtype)

    def _prompt_sums(self, q: Tensor, real: Tensor, scale: float) -> Tensor:
        """Attention that each prompt token draws from all real queries, summed over the group. float32 [B, H, n]."""
        grouped = q.unflatten(1, (self.shape.kv_heads, -1))
        n = q.shape[2]
        total = torch.zeros(self.place.shape, device=q.device)
        column = torch.arange(n, device=q.device)
        step = max(1, WEIGHTS // (q.shape[0] * q.shape[1] * n))
        for start in range(0, n, step):
            rows = column[start : start + step]
            seen = real[:, None] & (column <= rows[:, None])  # [B, rows, n]
            scores = torch.einsum("bhgnd,bhtd->bhgnt", grouped[:, :, :, start : start + step].float(), self.k.float()) * scale
            weights = scores.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min).softmax(-1)
            total += torch.einsum("bhgnt,bn->bht", weights, real[:, rows].float())
        return total

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        n = k.shape[2]
        self._reserve(max(self.held) + n)
        slots = self.place.argsort(dim=-1, stable=True)[..., :n] if n > 1 else self.place.argmin(-1, keepdim=True)  # empty ones are -1
        new = torch.tensor(self.seen, device=k.device)[:, None, None] + torch.arange(n, device=k.device)
        self.place.scatter_(2, slots, new.expand(-1, self.place.shape[1], -1))
        wide = slots[..., None].expand(-1, -1, -1, k.shape[3])
        self.k.scatter_(2, wide, k.to(self.k.dtype))
        self.v.scatter_(2, wide, v.to(self.v.dtype))
        if self.sums is not None:
            self.sums.scatter_(2, slots, 0.0)
        self.seen, self.held = ([x + n for x in counts] for counts in (self.seen, self.held))
        visible = (self.place[:, :, None] >= 0) & (self.place[:, :, None] <= new[..., None])  # [B, H, n, C]
        grouped = q.unflatten(1, (self.shape.kv_heads, -1))
        work = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bhgnd,bhtd->bhgnt", grouped, self.k.to(q.dtype)).to(work) * scale
        weights = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1)
        if self.sums is not None:
            self.sums += weights.sum((2, 3))
        if self.recent is not None:
            self.recent = torch.cat([self.recent, q.to(self.recent.dtype)], 2)[:, :, -self.method.queries :]
        out = torch.einsum("bhgnt,bhtd->bhgnd", weights.to(q.dtype), self.v.to(q.dtype))
        return out.flatten(1, 2).transpose(1, 2).contiguous()

    def _reserve(self, slots: int) -> None:
        """Room for so many tokens of every sequence."""
        more = slots - self.place.shape[2]
        if more <= 0:
            return
        more += 32
        self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, more)) for x in (self.k, self.v))
        self.place = torch.nn.functional.pad(self.place, (0, more), value=-1)
        if self.sums is not None:
            self.sums = torch.nn.functional.pad(self.sums, (0, more))

    def _evict(self) -> None:
        allowed = [self.budget.tokens(t) for t in self.seen]
        target = [max(a - self.method.slack, min(a, self.method.queries + 1)) for a in allowed]
        surplus = [h - t if h > a else 0 for h, a, t in zip(self.held, allowed, target, strict=True)]
        if not any(surplus):
            return
        device = self.place.device
        score = self.method.keep_scores(self, torch.tensor(allowed, device=device))
        score = score.clamp(max=torch.finfo(score.dtype).max).masked_fill(self.place < 0, torch.inf)  # empty slots come last of all
        most = max(surplus)
        worst = score.topk(most, dim=-1, largest=False, sorted=True).indices
        due = torch.arange(most, device=device) < torch.tensor(surplus, device=device)[:, None, None]
        old = self.place.gather(2, worst)
        self.place.scatter_(2, worst, torch.where(due, -1, old))
        self.held = [h - s for h, s in zip(self.held, surplus, strict=True)]
        self._shrink()

    def _shrink(self) -> None:
        """Move the tokens together where most slots are empty (after a prompt), so that the memory is really given back."""
        used = max(self.held)
        if self.place.shape[2] <= used + 64:
            return
        order = self.place.argsort(dim=-1, descending=True, stable=True)[..., :used]
        wide = order[..., None].expand(-1, -1, -1, self.k.shape[3])
        self.k, self.v, self.place = self.k.gather(2, wide), self.v.gather(2, wide), self.place.gather(2, order)
        if self.sums is not None:
            self.sums = self.sums.gather(2, order)

    def in_use(self) -> int:
        """Bytes of the tokens held and of what is stored beside them."""
        return self.shape.kv_heads * (sum(self.held) * self.budget.token + self.batch * self.budget.fixed)


class EvictionCacheLayer(CompressedCacheLayer):
    """An EvictionLayer in the clothes of a transformers cache layer."""

    is_compileable = False


class EvictionCache(Cache):
    """A transformers cache that evicts tokens by a method under the bytes of a plan.

    Args:
        method: see comparators.methods.
        plan: whose memory it may use.
        model: the model or its configuration; all layers with full attention.
        dtype: of the tokens; None: the model's.
    """

    def __init__(self, method: Method, plan: CachePlan, model: Any, dtype: torch.dtype | None = None) -> None:
        config = text_config(model)
        shapes = layer_shapes(config)
        assert all(s.compressed for s in shapes), "only models with full attention in every layer"
        self.method = method
        self.budget = Budget(plan, shapes, (dtype or config.dtype or torch.float32).itemsize, method)
        masks = MaskReader(0)
        layers = [EvictionCacheLayer(masks, EvictionLayer(i, s, method, self.budget, dtype)) for i, s in enumerate(shapes)]
        super().__init__(layers=layers)

    def memory_bytes(self) -> int:
        """Bytes in use, counted as CompressedCache counts them."""
        return sum(layer.layer.in_use() for layer in self.layers)

    def bytes_for(self, tokens: int, generated: int) -> int:
        """Bytes of one sequence of so many tokens, at most."""
        return self.budget.bytes_for(tokens)
