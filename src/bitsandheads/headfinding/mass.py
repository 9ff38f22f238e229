"""Attention mass beyond the window: how much of its attention a head gives to tokens that a window would have dropped.

The retrieval-head score of DuoAttention's and RLKV's comparisons, without training: no statement about what the output needs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..gates.attention import local_mask
from ..plan import Window
from ..scores import HeadScores
from ..seam import AttentionCall, layer_shapes, probed
from . import sequences as seq

SCORES = 1 << 26  # attention weights that are held at once


def beyond(call: AttentionCall, later: Tensor, window: Window) -> tuple[Tensor, int]:
    """Of one layer and batch: the summed mass beyond the window [query heads], and the number of queries that count.

    Only queries after the prompt count that have something beyond their window. later: bool [B, n].
    """
    batch, heads, n, _ = call.q.shape
    far = call.mask & ~local_mask(call.mask, window) & later[:, None, :, None]
    total = torch.zeros(heads, dtype=torch.float64, device=call.q.device)
    groups = call.q.unflatten(1, (call.k.shape[1], -1))  # [B, H_kv, group, n, D]
    step = max(1, SCORES // (batch * heads * call.k.shape[2]))
    for start in range(0, n, step):
        part = slice(start, start + step)
        scores = torch.einsum("bhgnd,bhtd->bhgnt", groups[:, :, :, part], call.k).float() * call.scale
        mask = call.mask[:, :, None, part]
        weights = scores.masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
        total += (weights * far[:, :, None, part]).sum((0, 3, 4), dtype=torch.float64).flatten()
    return total, int(far.any(-1).sum())


@torch.no_grad()
def mass_scores(
    model: Any,
    sequences: Sequence[seq.Sequence],
    window: Window,
    batch_size: int = 8,
    tick: Callable[[int], None] = lambda n: None,
    **fields: Any,
) -> HeadScores:
    """Score every KV head by the mean attention mass beyond the window; of a group's query heads the largest counts.

    Args:
        model: a causal language model of transformers.
        sequences: see headfinding.sequences.
        window: tokens inside of it do not count.
        tick: called with the number of sequences that are done.
        fields: see HeadScores.of.
    Raises:
        SequenceError: no sequence is longer than the window.
    """
    seq.check_window(sequences, window)
    shapes = layer_shapes(model)
    rows = {i: r for r, i in enumerate(i for i, s in enumerate(shapes) if s.compressed)}
    total = torch.zeros(len(rows), shapes[0].q_heads, dtype=torch.float64)
    count = 0
    for batch in seq.batches(sequences, batch_size, model.device):
        queries = 0

        def probe(call: AttentionCall) -> Tensor:
            nonlocal queries
            mass, queries = beyond(call, batch.later, window)  # noqa: B023 - called within this turn
            total[rows[call.layer]] += mass.cpu()
            return call.own()

        with probed(model, probe):
            batch.logits(model)
        count += queries
        tick(len(batch.ids))
    values = (total / count).unflatten(1, (shapes[0].kv_heads, -1)).amax(2)
    return HeadScores.of(values, model, "mass", sink=window.sink, recent=window.recent, **fields)
