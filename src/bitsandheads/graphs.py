"""The decode steps of one call of `generate`, captured in a CUDA graph and replayed without a look at the model.

A step that torch.compile captures by itself looks at every parameter and module of the model before each replay, and the GPU waits for that: about a
millisecond of nine for 28 layers on an H100. Within one call of `generate` all of it stays as it is. So the compiled step is called once, which looks
at everything; the next one is captured; the others are replayed.

A sequence packs a tile in one step of `tile`, and the host knows in which. There are two kinds of steps, captured each for itself: those in which a
tile becomes full, and all others, which do without two launches in each layer.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .fixed import FixedCapacity

log = logging.getLogger(__name__)
Step = Callable[..., Any]
Replay = Callable[[], None]


def capture(step: Callable[[], Any], pool: Any) -> tuple[Replay, Any]:
    """Capture a call on the GPU. Returns how to replay it, and its output, whose tensors every replay writes.

    pool: of memory, which graphs share that are replayed one after the other, see torch.cuda.graph_pool_handle.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):  # other threads may allocate meanwhile
        output = step()
    return graph.replay, output


class CapturedSteps:
    """A model's step for one call of `generate`.

    Args:
        compiled: the step, compiled without CUDA graphs.
        other: the step for whatever is no step of fixed capacity, or asks for more than logits.
        capture: see `capture`.
    Attributes:
        captured: by whether tiles are packed, how to replay such a step, and its output; None: one was called, but not captured.
    """

    def __init__(self, compiled: Step, other: Step, capture: Callable[..., tuple[Replay, Any]] = capture) -> None:
        self.compiled, self.other, self.capture = compiled, other, capture
        self.works = True
        self.key: Any = None
        self.clock = 0
        self.captured: dict[bool, tuple[Replay, Any] | None] = {}
        self.inputs: dict[str, Any] = {}
        self.pool: Any = None

    def __call__(self, **inputs: Any) -> Any:
        """The model's output. Its tensors are overwritten by the next call."""
        fixed = getattr(inputs.get("past_key_values"), "fixed", None)
        more = inputs.get("output_hidden_states") or inputs.get("output_attentions")
        if fixed is None or not fixed.running or more or not self.works:
            return self.other(**inputs)
        key = self._key(fixed, inputs)
        if key != self.key:  # the first step, or buffers have moved since
            self.key, self.captured, self.clock = key, {}, int(fixed.clock)
            self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.clock += 1
        packs = fixed.packs_at(self.clock)
        if packs not in self.captured:
            self.captured[packs] = None
            return self.compiled(**inputs)
        for name, x in self.inputs.items():
            if isinstance(x, Tensor):
                x.copy_(inputs[name])
        ready = self.captured[packs]
        if ready is None:
            try:
                ready = self.captured[packs] = self._capture(fixed, packs)
            except RuntimeError as e:
                log.warning(
                    "The decode step cannot be captured by bitsandheads (%s); the step of torch.compile is used.", str(e).split("\n")[0]
                )
                self.works = False
                return self.other(**inputs)
        replay, output = ready
        replay()
        return output

    def _capture(self, fixed: FixedCapacity, packs: bool) -> tuple[Replay, Any]:
        if self.pool is None and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()
        with fixed.packing(packs):
            return self.capture(lambda: self.compiled(**self.inputs), self.pool)

    @staticmethod
    def _key(fixed: FixedCapacity, inputs: dict[str, Any]) -> Any:
        """What must be as it was for a replay."""
        return fixed.entered, {name: (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else id(x) for name, x in inputs.items()}
