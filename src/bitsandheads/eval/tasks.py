"""What the runner runs: a task is a list of samples with a score and a length limit."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..tasks import Sample


@dataclass(frozen=True)
class Task:
    """Questions, how answers are scored, and how they are asked.

    Attributes:
        name: stands in every record.
        samples: their ids differ.
        score: (sample, output text) -> number; 1 right, 0 wrong.
        max_new_tokens: an output without an end-of-sequence token after so many tokens counts as truncated.
        chat: prompts go through the tokenizer's chat template as one user message.
        encode: for images and videos: (processor, samples) -> inputs of `model.generate`, with `input_ids` and `attention_mask`
            int64 [B, n] padded on the left. None: the prompts as text.
    """

    name: str
    samples: Sequence[Sample]
    score: Callable[[Sample, str], float]
    max_new_tokens: int
    chat: bool = False
    encode: Callable[[Any, Sequence[Sample]], Mapping[str, Tensor]] | None = None
