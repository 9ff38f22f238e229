"""Attention of a long chunk of new tokens on a GPU: flash attention over one block of the history at a time.

Blocks are merged by the logsumexp of their scores (as FlashAttention merges its own, arXiv 2205.14135), so packed tiles are restored block by
block and never all at once. The decode kernels, made for a few queries, would read all tiles again for every 64 of a chunk's queries.
Shape letters as in ops.reference; n new tokens, T tokens of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant.codec import HalfCodec
from ..quant.tile import HalfLayout
from .backends import resolve_backend, why_not
from .heads import HeadSet

FEWEST = 256  # queries from which on restoring tiles once costs less than reading them again for every piece
RESTORED = 1 << 23  # elements of the keys (and of the values) that are restored at once: 16,384 tokens of 4 heads of 128


def covers(q: Tensor, backend: str) -> bool:
    """Whether these queries [B, Hq, n, D] can take this road: long enough, on a GPU that has flash attention for them, without gradients."""
    return (
        q.is_cuda
        and q.shape[2] >= FEWEST
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 256
        and torch.version.cuda is not None
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and not (torch.is_grad_enabled() and q.requires_grad)
        and resolve_backend(backend, q.device) != "reference"
    )


def attend_block(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention over one block.

    On a GPU this is PyTorch's FlashAttention operator itself: `scaled_dot_product_attention` returns no logsumexp, and `varlen_attn` takes
    sequences only end to end and, from release to release, other arguments for fewer KV heads than query heads.

    Args:
        q: [B, H, n, D]; k, v: [B, h, T, D], H a multiple of h; all with D contiguous.
        causal: the queries are those of the newest n of the T tokens and see what is not newer than they are; otherwise all see everything.
        window: newest tokens that a causal query sees, itself included; None: all.
    Returns:
        out [B, H, n, D] in q's dtype and lse [B, H, n] in float32 (float64 for float64 on a CPU).
    """
    n, total = q.shape[2], k.shape[2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1  # on a CPU too: its tests watch over what the operator needs
    if q.is_cuda:
        left, right = -1 if window is None else window - 1, 0 if causal else -1
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, None, n, total, 0.0, causal and window is None, False,
            scale=scale, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out.transpose(1, 2), lse
    work = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("bhgqd,bhtd->bhgqt", q.unflatten(1, (k.shape[1], -1)).to(work), k.to(work)) * scale
    if causal:
        ahead = torch.arange(total) - torch.arange(total - n, total)[:, None]  # of the query, in tokens
        scores = scores.masked_fill((ahead > 0) | (ahead <= -(window or total)), -torch.inf)
    out = torch.einsum("bhgqt,bhtd->bhgqd", scores.softmax(-1), v.to(work))
    return out.flatten(1, 2).to(q.dtype), scores.logsumexp(-1).flatten(1, 2)


def attend_long_chunk(q: Tensor, sets: list[HeadSet], scale: float, restored: int = RESTORED) -> Tensor | None:
    """`ops.decode_attention` of the newest n tokens, causal and without padding, without the sums.

    Args:
        q: [B, Hq, n, D], the newest n tokens, which the sets hold already.
        restored: see RESTORED.
    Returns:
        [B, Hq, n, D], or None where some of the new tokens have filled up a sink, so that the tail does not hold them all.
    """
    batch, q_heads, n, _ = q.shape
    q = q if q.stride(-1) == 1 else q.contiguous()
    group = q_heads // sum(len(s.kv_heads) for s in sets)
    parts = [part for s in sets for part in (s, *s.extra)]
    lengths = [part.known for part in parts if part.known is not None]  # [parts][3][B]
    if len(lengths) < len(parts):
        lengths = torch.stack([part.lengths for part in parts]).tolist()  # one transfer, for which the host waits
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for s in sets:
        own, lengths = lengths[: 1 + len(s.extra)], lengths[1 + len(s.extra) :]
        if min(own[0][2]) < n:
            return None
        heads = [h * group + g for h in s.kv_heads for g in range(group)]
        mine = q if heads == list(range(q_heads)) else q[:, heads]
        alike = all(len(set(row)) == 1 for part in own for row in part)
        for first in (0,) if alike else range(batch):
            rows = slice(None) if alike else slice(first, first + 1)
            got = _attend_set(mine[rows], s.rows(rows), [[row[first] for row in part] for part in own], scale, restored)
            if mine is q:
                out[rows] = got
            else:
                out[rows, heads] = got
    return out


def _attend_set(q: Tensor, s: HeadSet, lengths: list[list[int]], scale: float, restored: int) -> Tensor:
    """Sequences of equal lengths: sinks, tiles and tail tokens of the set, then of its extra parts. [B, H, n, D] in q's dtype."""
    sinks, _, tail = lengths[0]
    k, v = (x[:, :, :tail].to(q.dtype) for x in (s.tail_k, s.tail_v))
    if s.window is None and sinks:
        assert s.sink_k is not None and s.sink_v is not None
        k, v = (torch.cat([first[:, :, :sinks].to(x), x], 2) for first, x in ((s.sink_k, k), (s.sink_v, v)))
    out, lse = attend_block(q, k, v, scale, causal=True, window=s.window)
    work = torch.promote_types(q.dtype, torch.float32)
    out = out.to(work)
    for queries, k, v, raised in _history(q, s, lengths, scale, restored):
        part, more = attend_block(queries, k, v, scale)
        more = more + raised
        out.lerp_(part.to(work), torch.sigmoid(more - lse)[..., None])
        lse = torch.logaddexp(lse, more)
    return out.to(q.dtype)


def _history(
    q: Tensor, s: HeadSet, lengths: list[list[int]], scale: float, restored: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | float]]:
    """Blocks that every query sees as a whole: queries [B, H, n, D], keys and values [B, h, T, D], what is added to the scores [B, H, n]."""
    sinks = lengths[0][0]
    if s.window is not None and sinks:
        assert s.sink_k is not None and s.sink_v is not None
        yield q, s.sink_k[:, :, :sinks].to(q.dtype), s.sink_v[:, :, :sinks].to(q.dtype), 0.0
    if not any(tiles for _, tiles, _ in lengths):
        return
    assert s.layout is not None
    batch, heads, tokens = q.shape[0], len(s.kv_heads), s.layout.tokens
    rows = q.unflatten(1, (heads, -1)).flatten(2, 3).float()
    codec = HalfCodec(s.layout.keys)
    turned, constant = codec.query(rows, s.key_basis)  # queries are turned once, so keys stay along their axes
    raised = (scale * constant + codec.correction(rows, s.key_basis, scale, turned)).view(q.shape[:3])
    turned = turned.to(q.dtype).view(q.shape)
    del rows
    for part, (_, tiles, _) in zip((s, *s.extra), lengths, strict=True):
        if tiles and part.tiles is not None and part.layout is not None:
            blocks = -(-tiles * batch * heads * tokens * q.shape[3] // restored)
            for block in part.tiles[:, :, :tiles].chunk(blocks, 2):
                k = _axes(block, part.layout.keys, 0, q.dtype)
                v = HalfCodec(part.layout.values).decode(_axes(block, part.layout.values, part.layout.keys.nbytes), part.value_basis)
                yield turned, k, v.to(q.dtype).contiguous(), raised  # without a rotation codes come token by token for each axis


def _axes(tiles: Tensor, half: HalfLayout, base: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A half of tiles uint8 [B, h, N, bytes], which begins at byte `base`, along its axes: [B, h, tokens, D]."""
    if tiles.is_cuda and why_not("triton", tiles.device) is None:
        from .triton_restore import restore_tiles

        return restore_tiles(tiles, half, base, dtype)
    return half.read(tiles[..., base : base + half.nbytes]).flatten(2, 3).to(dtype).contiguous()
