"""The specification of the ops, in plain PyTorch: unpack, then attend. Any dtype, any device; slow and exact.

Shape letters: B sequences, Hq query heads, H KV heads of the layer, h KV heads of a set, Q query tokens, D head_dim.
"""

import torch
from torch import Tensor

from ..quant.codec import HalfCodec
from .heads import HeadSet

TAIL, SINK, PACKED = 0, 1, 2
FAR = torch.iinfo(torch.int64).max  # the age of a token that every query sees


def unpack_tiles(heads: HeadSet) -> tuple[Tensor, Tensor]:
    """Restored keys and values of all tiles in use, float32 [B, h, N * tile, D], N the largest tile count."""
    assert heads.tiles is not None and heads.layout is not None
    n = int(heads.lengths[1].max())
    keys, values = heads.layout.split(heads.tiles[:, :, :n])
    return (
        HalfCodec(heads.layout.keys).unpack(keys, heads.key_basis),
        HalfCodec(heads.layout.values).unpack(values, heads.value_basis),
    )


def gather_tokens(heads: HeadSet, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Everything a head set holds, in one piece.

    Returns:
        keys, values [B, h, T, D] in `dtype` (T includes unused places); valid bool [B, T]; age int64 [B, T]: how many real
        tokens are newer than this one (FAR for tiles); kind [T]: which places are TAIL, SINK or PACKED.
    """
    device = heads.tail_k.device
    sinks, _, tails = heads.lengths[:, :, None]
    keys, values, valid, age, kind = [], [], [], [], []

    def add(k: Tensor, v: Tensor, count: Tensor, newer: Tensor | None = None) -> None:
        index = torch.arange(k.shape[2], device=device)[None]
        keys.append(k.to(dtype))
        values.append(v.to(dtype))
        valid.append(index < count)
        age.append(torch.full_like(valid[-1], FAR, dtype=torch.int64) if newer is None else newer + count - 1 - index)
        kind.append(torch.full_like(index[0], SINK if k is heads.sink_k else PACKED if newer is None else TAIL))

    if heads.sink_k is not None and heads.sink_v is not None:
        add(heads.sink_k, heads.sink_v, sinks, tails)
    for part in (heads, *heads.extra):
        if part.tiles is not None and part.layout is not None and part.tiles.shape[2] > 0:
            k, v = unpack_tiles(part)
            add(k, v, part.lengths[1][:, None] * part.layout.tokens)
    add(heads.tail_k, heads.tail_v, tails, torch.zeros_like(tails))
    return torch.cat(keys, 2), torch.cat(values, 2), torch.cat(valid, 1), torch.cat(age, 1), torch.cat(kind)


def decode_attention(
    q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None = None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the newest Q tokens over everything that a layer holds. The Q tokens are already in the tails.

    Args:
        q: [B, Hq, Q, D] after RoPE.
        sets: partition of the layer's KV heads.
        scale: factor of the scores, usually D ** -0.5.
        hidden: int64 [B, Q], how many of the newest stored tokens query i does not see; None: Q - 1 - i (causal).
        dtype: precision of the arithmetic; None: q's.
    Returns:
        out [B, Hq, Q, D] in q's dtype and lse float32 [B, Hq, Q], natural logarithm of the sum of exp(scores).
    """
    work = dtype or q.dtype
    batch, q_heads, n_query, dim = q.shape
    group = q_heads // sum(len(s.kv_heads) for s in sets)
    out = torch.empty(batch, q_heads, n_query, dim, dtype=work, device=q.device)
    lse = torch.empty(batch, q_heads, n_query, dtype=work, device=q.device)
    if hidden is None:
        hidden = torch.arange(n_query - 1, -1, -1, device=q.device).expand(batch, -1)
    back = hidden[:, :, None]
    for s in sets:
        heads = torch.tensor([h * group + g for h in s.kv_heads for g in range(group)], device=q.device)
        k, v, valid, age, kind = gather_tokens(s, work)
        seen = age[:, None] >= back
        if s.window is not None:
            seen = seen & ((age[:, None] - back < s.window) | (kind == SINK))
        seen = seen & valid[:, None]  # [B, Q, T]
        qs = q[:, heads].to(work).view(batch, len(s.kv_heads), group, n_query, dim)
        scores = torch.einsum("bhgqd,bhtd->bhgqt", qs, k) * scale
        if s.layout is not None and s.layout.keys.spec.noise_correction and s.key_basis:
            raised = HalfCodec(s.layout.keys).correction(qs.flatten(2, 3), s.key_basis, scale).to(work)
            scores = scores + raised.view(batch, len(s.kv_heads), group, n_query, 1) * (kind == PACKED)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        lse[:, heads] = scores.logsumexp(-1).flatten(1, 2)
        out[:, heads] = torch.einsum("bhgqt,bhtd->bhgqd", scores.softmax(-1), v).flatten(1, 2)
    return out.to(q.dtype), lse.float()
