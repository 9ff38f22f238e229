"""Attention with a gate for each KV head: out = alpha * full + (1 - alpha) * local, local = sink + recent tokens (RLKV, arXiv 2510.08525).

The query heads of a group share their KV head's gate. `seam.enable_gates` puts it into a transformers model.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..errors import ShapeError
from ..plan import LayerShape, Window


def local_mask(mask: Tensor, window: Window) -> Tensor:
    """Restrict a mask to the first `sink` real tokens and the `recent` newest ones of each query.

    Args:
        mask: bool [B, 1, Q, K], True = may be seen: causal, without the padding (on either side).
        window: a query at real position t sees j <= t with j < sink or j > t - recent.
    Returns:
        bool [B, 1, Q, K].
    """
    real = mask[:, :, -1:]  # the newest query sees every real token
    position = real.cumsum(-1) - 1  # [B, 1, 1, K]
    query = mask.sum(-1, keepdim=True) - 1  # [B, 1, Q, 1]
    return mask & ((position < window.sink) | (query - position < window.recent))


class HeadGates(nn.Module):
    """The gates of a model and the window of the local part.

    Memory of a pass over Q tokens beyond ordinary attention: the local mask, B * Q * K bytes (and twice or four times that inside SDPA),
    once for all layers; and one more attention output for each layer, which gradient checkpointing drops.

    Attributes:
        alpha: float32 [layers, KV heads], 1 at the start; stays float32 when the model is cast.
        window: the local part.
        whole_prompts: attention of several queries at once is full whatever the gates, as a cache with windowed heads reads its prompt.
    Raises:
        ShapeError: the layers do not all have the same number of KV heads.
    """

    def __init__(self, shapes: list[LayerShape], window: Window) -> None:
        super().__init__()
        heads = {shape.kv_heads for shape in shapes}
        if len(heads) != 1:
            raise ShapeError(f"The layers have {sorted(heads)} KV heads; gates need the same number in every layer.")
        self.alpha = nn.Parameter(torch.ones(len(shapes), heads.pop(), dtype=torch.float32))
        self.window = window
        self.whole_prompts = False
        self.former = "sdpa"  # the model's attention implementation before it had gates
        self._last: tuple[weakref.ref[Tensor] | None, tuple[int, ...], Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "HeadGates":
        super()._apply(lambda t: t.to(fn(t).device), recurse)
        return self

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring all gates back into [0, 1]."""
        self.alpha.clamp_(0, 1)

    def _masks(self, layer: int, mask: Tensor | None, q: Tensor, keys: int, groups: int) -> Tensor:
        """The local mask; of a single query: full and local masks of a group's query heads below each other, [B, 1, 2 groups, K].

        Computed by the first layer of a pass and kept for the others.
        """
        sizes, last = (q.shape[2], keys), self._last
        if layer and last is not None and last[1] == sizes and (mask is None if last[0] is None else last[0]() is mask):
            return last[2]
        causal = mask
        if causal is None:
            causal = torch.ones(1, 1, *sizes, dtype=torch.bool, device=q.device).tril(sizes[1] - sizes[0])
        out = local_mask(causal, self.window)
        if q.shape[2] == 1:
            out = torch.cat((causal.expand(-1, -1, groups, -1), out.expand(-1, -1, groups, -1)), 2)
        self._last = (None if mask is None else weakref.ref(mask), sizes, out)
        return out

    def forward(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Gated attention of one layer.

        A single query (decoding) is attended to twice in one call, with the full and with the local mask, so the cache is read once
        and the local part costs no read of its own.

        Args:
            layer: row of `alpha`.
            q: [B, H_q, Q, D].
            k, v: [B, H_kv, K, D].
            mask: bool [B, 1, Q, K]; None: causal, nothing padded.
            scale: factor of the scores.
        Returns:
            [B, H_q, Q, D].
        """
        batch, heads, queries, dim = q.shape
        groups = heads // k.shape[1]
        if mask is None and 1 < queries < k.shape[2]:  # SDPA's own causal flag is for as many keys as queries
            mask = torch.ones(1, 1, queries, k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - queries)
        if queries > 1 and self.whole_prompts:
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)
        masks = self._masks(layer, mask, q, k.shape[2], groups)
        alpha = self.alpha[layer].to(q.dtype)[None, :, None, None]
        if queries == 1:  # [B, H_kv, 2 groups, D]
            twice = q.reshape(batch, k.shape[1], groups, dim).repeat(1, 1, 2, 1)
            full, local = scaled_dot_product_attention(twice, k, v, attn_mask=masks, scale=scale).chunk(2, 2)
            return torch.lerp(local, full, alpha).reshape(q.shape)
        if mask is None:
            full = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
        k, v, alpha = (t.repeat_interleave(groups, 1) for t in (k, v, alpha))
        if mask is not None:
            full = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        local = scaled_dot_product_attention(q, k, v, attn_mask=masks, scale=scale)
        return torch.lerp(local, full, alpha)
