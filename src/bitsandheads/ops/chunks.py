"""Attention of a chunk of new tokens: pieces of a few sizes, so that a turn of any length finds its kernels compiled.

The kernels read the packed tiles themselves and are compiled for a number of queries. Long chunks go through blocks of restored tiles
instead, where `long_chunks` covers them. Shape letters as in ops.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import decode_attention, resolve_backend
from .heads import HeadSet
from .long_chunks import attend_long_chunk, covers

MOST = 64  # queries of a piece


def attend_chunk(q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None, backend: str, most: int | None = None) -> Tensor:
    """`ops.decode_attention` of any number of queries, without the sums.

    Args:
        q: [B, Hq, Q, D], the newest Q tokens, which the sets hold already.
        hidden: see ops.decode_attention.
        most: queries of a piece, a power of two; None: MOST for the kernels, all of them for the reference.
    Returns:
        [B, Hq, Q, D].
    """
    n = q.shape[2]
    if hidden is None and most is None and covers(q, backend) and (out := attend_long_chunk(q, sets, scale)) is not None:
        return out
    if most is None:
        most = n if resolve_backend(backend, q.device) == "reference" else MOST
    if n == 1 or (n == most and hidden is None):
        return decode_attention(q, sets, scale, hidden, backend=backend)[0]
    if hidden is None:
        hidden = torch.arange(n - 1, -1, -1, device=q.device).expand(q.shape[0], -1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, n, most):
        part, unseen = q[:, :, first : first + most], hidden[:, first : first + most]
        size = part.shape[2]
        more = min(most, 1 << (size - 1).bit_length()) - size  # queries nobody asked for, up to a size that has its kernels
        piece = decode_attention(pad(part, (0, 0, 0, more)), sets, scale, pad(unseen, (0, more)), backend=backend)[0]
        out[:, :, first : first + most] = piece[:, :, :size]
    return out
