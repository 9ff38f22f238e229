"""What a training run will need in memory, from the configuration alone."""

from dataclasses import dataclass
from typing import Any

import torch

from ..seam import layer_shapes, text_config
from .config import TrainConfig
from .rollout import PREFILL, columns_for

HEAD_CHUNK = 1024  # tokens whose logits TRL computes at once, with two float32 copies
OVERHEAD = 2**30  # CUDA context, graphs, allocator


@dataclass(frozen=True)
class Estimate:
    """Bytes in one process. Rollout cache and weights stay; prefill and training take turns.

    Attributes:
        weights: of the model, in its dtype.
        cache: keys and values of the rollouts.
        prefill: activations of one prefill pass.
        training: activations of one training pass and its backward pass.
    """

    weights: int
    cache: int
    prefill: int
    training: int

    @property
    def total(self) -> int:
        """The most at any time."""
        return self.weights + self.cache + max(self.prefill, self.training) + OVERHEAD

    def lines(self) -> list[str]:
        """For the reader."""
        rows = [(n, getattr(self, n)) for n in ("weights", "cache", "prefill", "training", "total")]
        return [f"{name:9} {size / 1e9:8.2f} GB" for name, size in rows]


def estimate(config: Any, train: TrainConfig, prompt: int, dtype_bytes: int = 2) -> Estimate:
    """Estimate the memory of a run.

    Args:
        config: configuration of the model.
        train: of the training.
        prompt: tokens of the longest prompt.
        dtype_bytes: of the weights, activations and cache.
    """
    import transformers

    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    text, shapes = text_config(config), layer_shapes(config)
    weights = sum(p.numel() for p in model.parameters()) * dtype_bytes
    columns = columns_for(prompt, train.max_new_tokens)
    cache = sum(2 * s.kv_heads * s.head_dim for s in shapes) * train.rollout_batch * columns * dtype_bytes

    hidden, wide, vocabulary = text.hidden_size, text.intermediate_size, text.vocab_size
    heads = max((s.q_heads + s.kv_heads) * s.head_dim for s in shapes)
    layer = 3 * hidden + 3 * wide + 6 * heads  # values for each token that a layer's pass holds, repeated keys and values included
    tokens = (prompt + train.max_new_tokens) * train.micro_batch
    square = (prompt + train.max_new_tokens) * tokens
    masks = 2 * square * (1 + dtype_bytes)  # full and local, as bool and as SDPA's bias
    kept = len(shapes) * tokens * (hidden if train.gradient_checkpointing else layer) * dtype_bytes
    head = HEAD_CHUNK * vocabulary * (dtype_bytes + 8)
    training = kept + 2 * tokens * layer * dtype_bytes + masks + head
    rows = min(train.rollout_batch, max(PREFILL // prompt, 1))
    prefill = rows * prompt * layer * dtype_bytes + rows * prompt**2 * 2 * (1 + dtype_bytes)
    return Estimate(weights, cache, prefill, training)
