"""Output error: how far the model's answer moves when this one head is windowed and all others see everything."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..plan import Window
from ..scores import HeadScores
from ..seam import AttentionCall, layer_shapes, probed
from . import sequences as seq


@torch.no_grad()
def ablation_scores(
    model: Any,
    sequences: Sequence[seq.Sequence],
    window: Window,
    batch_size: int = 8,
    tick: Callable[[int], None] = lambda n: None,
    **fields: Any,
) -> HeadScores:
    """Score every KV head by KL(all heads whole || this one windowed), in nats, averaged over the tokens after the prompt.

    As in generation, the prompt is read with full attention, and the head is windowed from the first token after it on. The
    heads of a layer are windowed side by side, each in its own copy of the batch.

    Args:
        model: a causal language model of transformers.
        sequences: see headfinding.sequences; on the model's own greedy answers (`solve`) this is the method's usual form.
        batch_size: sequences at once; each layer runs KV heads times as many.
        tick: called with the number of (sequence, layer) pairs that are done.
        fields: see HeadScores.of.
    Raises:
        SequenceError: no sequence is longer than the window.
    """
    seq.check_window(sequences, window)
    shapes = layer_shapes(model)
    layers = [i for i, s in enumerate(shapes) if s.compressed]
    heads = shapes[0].kv_heads
    total = torch.zeros(len(layers), heads, dtype=torch.float64)
    count = 0
    for batch in seq.batches(sequences, batch_size, model.device):
        full = batch.logits(model)[batch.predicts].float().log_softmax(-1)
        copies = batch.repeat(heads)
        for row, layer in enumerate(layers):
            with probed(model, _window_each_head(layer, copies.later, window)):
                logits = copies.logits(model).unflatten(0, (heads, -1))
            for head in range(heads):
                windowed = logits[head][batch.predicts].float().log_softmax(-1)
                total[row, head] += (full.exp() * (full - windowed)).sum(dtype=torch.float64).cpu()
            tick(len(batch.ids))
        count += len(full)
    return HeadScores.of(total / count, model, "ablation", sink=window.sink, recent=window.recent, **fields)


def _window_each_head(layer: int, later: Tensor, window: Window) -> Callable[[AttentionCall], Tensor]:
    """A probe: in this layer KV head i is windowed in the i-th of KV heads copies of a batch."""

    def probe(call: AttentionCall) -> Tensor:
        out = call.own()
        if call.layer != layer:
            return out
        heads, group = call.k.shape[1], call.q.shape[1] // call.k.shape[1]
        copy = len(out) // heads
        mask = seq.seen_locally(call.mask[:copy], later[:copy], window)
        for head in range(heads):
            rows, mine = slice(head * copy, (head + 1) * copy), slice(head * group, (head + 1) * group)
            k, v = (x[rows, head : head + 1].expand(-1, group, -1, -1) for x in (call.k, call.v))
            out[rows, :, mine] = scaled_dot_product_attention(call.q[rows, mine], k, v, attn_mask=mask, scale=call.scale).transpose(1, 2)
        return out

    return probe
