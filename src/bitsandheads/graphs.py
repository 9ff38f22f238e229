"""The decode steps of one call of `generate`, captured in a CUDA graph and replayed without a look at the model.

A step that torch.compile captures by itself looks at every parameter and module of the model before each replay, and the GPU waits for that: about a
millisecond of nine for 28 layers on an H100. Within one call of `generate` all of it stays as it is. So the compiled step is called once, which looks
at everything; the next one is captured; the others are replayed.

A sequence packs a tile in one step of `tile`, and the host knows in which. There are two kinds of steps, captured each for itself: those in which a
tile becomes full, and all others, which do without two launches in each layer.

`generate` waits for every token, so the GPU waits for all that the host does from there to the next replay. Most of that is preparing the step's inputs,
which are the newest column of a few tensors: `refill` puts these where the captured steps read them.
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
COLUMNS = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")  # tensors of which a step is given the newest column


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
        clock: logical tokens after the newest step, as the host counts them.
        prepared: names that `generate` gave to the model for it to prepare a step, and of the inputs that came of them.
    """

    def __init__(self, compiled: Step, other: Step, capture: Callable[..., tuple[Replay, Any]] = capture) -> None:
        self.compiled, self.other, self.capture = compiled, other, capture
        self.works = True
        self.key: Any = None
        self.clock = 0
        self.captured: dict[bool, tuple[Replay, Any] | None] = {}
        self.inputs: dict[str, Any] = {}
        self.prepared: tuple[set[str], set[str]] = set(), set()
        self.pool: Any = None

    def __call__(self, **inputs: Any) -> Any:
        """The model's output. Its tensors are overwritten by the next call."""
        fixed = getattr(inputs.get("past_key_values"), "fixed", None)
        more = inputs.get("output_hidden_states") or inputs.get("output_attentions")
        if fixed is None or not fixed.running or more or not self.works:
            self.key = None
            return self.other(**inputs)
        key = self._key(fixed, inputs)
        if key != self.key:  # the first step, or buffers have moved since
            counted = self.counted(fixed)
            self.key, self.captured, self.clock = key, {}, int(fixed.clock) if counted is None else counted
            self.inputs = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
        self.clock += 1
        packs = fixed.packs_at(self.clock)
        if packs not in self.captured:
            self.captured[packs] = None
            return self.compiled(**inputs)
        for name, x in self.inputs.items():
            if isinstance(x, Tensor) and inputs[name] is not x:
                x.copy_(inputs[name])
        ready = self.captured[packs]
        if ready is None:
            try:
                ready = self.captured[packs] = self._capture(fixed, packs)
            except RuntimeError as e:
                log.warning(
                    "The decode step cannot be captured by bitsandheads (%s); the step of torch.compile is used.", str(e).split("\n")[0]
                )
                self.works, self.key = False, None
                return self.other(**inputs)
        replay, output = ready
        replay()
        return output

    def counted(self, fixed: FixedCapacity) -> int | None:
        """Logical tokens, where the steps of this call are all that ran since the cache was entered, or looked at the clock since; otherwise None."""
        known = self.key is not None and fixed.running and self.key[0] == fixed.entered and self.inputs["past_key_values"].fixed is fixed
        return self.clock if known else None

    def refill(self, input_ids: Tensor, given: dict[str, Any]) -> dict[str, Any] | None:
        """A step's inputs, in the tensors that captured steps read; None: the model must prepare them.

        Args:
            input_ids: all tokens [B, N].
            given: what `generate` gives to prepare_inputs_for_generation beside them.
        """
        names, inputs = self.prepared
        if self.key is None or given.keys() != names or not inputs <= self.inputs.keys():
            return None
        fixed = self.inputs["past_key_values"].fixed
        if self.counted(fixed) is None or fixed.wakes_at(self.clock):
            return None
        fixed.check_room(self.clock + 1)
        for name in inputs:
            x, new = self.inputs[name], input_ids if name == "input_ids" else given.get(name)
            if isinstance(x, Tensor) and isinstance(new, Tensor):
                new = new[..., -1:] if name in COLUMNS else new
                if (new.shape, new.dtype) != (x.shape, x.dtype):
                    return None
                x.copy_(new)
            elif new is not x:
                return None
        return {name: self.inputs[name] for name in inputs}

    def _capture(self, fixed: FixedCapacity, packs: bool) -> tuple[Replay, Any]:
        if self.pool is None and torch.cuda.is_available():
            self.pool = torch.cuda.graph_pool_handle()
        with fixed.packing(packs):
            return self.capture(lambda: self.compiled(**self.inputs), self.pool)

    @staticmethod
    def _key(fixed: FixedCapacity, inputs: dict[str, Any]) -> Any:
        """What must be as it was for a replay."""
        return fixed.entered, {name: (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else id(x) for name, x in inputs.items()}
