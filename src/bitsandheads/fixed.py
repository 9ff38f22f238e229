"""Fixed capacity: decode steps that the host takes no part in, so that they can be compiled and captured in a CUDA graph.

The cache is in one of two states. On the host's side every layer works as in layer.py, and the host knows all counts. While it is
*running*, buffers do not move, counts advance on the device alone, and a step of a layer is one operator (ops.step). `enter` and
`leave` go from one to the other; a prompt, crop, beams, saving and every report of memory happen on the host's side.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import CacheStateError, ModelMismatchError
from .layer import CompressedLayer
from .stores.packed import PackedStore


def no_room(capacity: int, tokens: int) -> CacheStateError:
    """The error of a cache that is too small."""
    return CacheStateError(
        f"The cache was made for {capacity} tokens of each sequence, padding included, and is to hold {tokens}. Make it with a larger "
        "capacity (prompt and new tokens together), generate less, or reset() it."
    )


class FixedCapacity:
    """The state of a cache of fixed capacity.

    Attributes:
        capacity: tokens of a sequence, padding included.
        layers: the compressed layers.
        running: whether steps advance on the device alone.
        entered: how often they have begun to; buffers and cells stay where they are in between.
        clock: int64 scalar on the device, logical tokens while running.
    """

    def __init__(self, capacity: int, layers: list[CompressedLayer]) -> None:
        self.capacity, self.layers = capacity, layers
        self.running, self.entered = False, 0
        self.clock = torch.zeros((), dtype=torch.int64)
        self.wakes: int | None = None  # the clock at which the next sequence finds its basis
        self.tiles: set[tuple[int, int]] = set()  # the clock at which a sequence's next tile is full, tokens from one to the next

    def before(self, tokens: int, clock: int | None = None) -> None:
        """Called on the host before each pass with `tokens` new tokens of every sequence. clock: what it shows, if the host knows."""
        if tokens != 1 or not self.layers[0].stores:
            self.leave()
            self.check_room(self.layers[0].tokens + tokens)
        elif not self.running:
            self.enter()
        elif self.wakes is not None and self.wakes_at(int(self.clock) if clock is None else clock):
            self.leave()
            for layer in self.layers:
                layer.start()
            self.enter()

    def check_room(self, tokens: int) -> None:
        """Raise CacheStateError where `tokens` tokens of a sequence do not fit."""
        if tokens > self.capacity:
            raise no_room(self.capacity, tokens)

    def enter(self) -> None:
        """Hand the counts over to the device."""
        tokens = self.layers[0].tokens
        self.check_room(tokens + 1)
        unused = [layer.index for layer in self.layers if not layer.stores]
        if unused:
            raise ModelMismatchError(
                f"The model did not use the layers {unused}, for which this cache was made. Make the cache from the configuration of the model "
                "that it is used with."
            )
        for layer in self.layers:
            layer.fix(self.capacity)
        if self.clock.device != self.layers[0].stores[0].counts.device:
            self.clock = self.clock.to(self.layers[0].stores[0].counts.device)
        self.clock.fill_(tokens)
        for t in (self.clock, *(layer.step.cell for layer in self.layers if layer.step)):
            torch._dynamo.mark_static_address(t)
        packed = [s for layer in self.layers for s in layer.stores if isinstance(s, PackedStore)]
        self.wakes = min((tokens + n for n in (s.steps_to_start() for s in packed) if n is not None), default=None)
        self.tiles = {(tokens + n, s.quant.tile) for s in packed for n in s.steps_to_pack()}
        self.running, self.entered = True, self.entered + 1

    def wakes_at(self, clock: int) -> bool:
        """Whether a sequence finds its basis before the step that follows when the clock shows this."""
        return self.wakes is not None and clock >= self.wakes

    def packs_at(self, clock: int) -> bool:
        """Whether a tile of some sequence becomes full in the step after which the clock shows this."""
        return any(clock >= first and (clock - first) % tile == 0 for first, tile in self.tiles)

    @contextmanager
    def packing(self, packs: bool) -> Iterator[None]:
        """Steps that are captured inside pack full tiles, or do without the launches for that."""
        steps = [layer.step for layer in self.layers if layer.step is not None]
        for step in steps:
            step.packs = packs
        try:
            yield
        finally:
            for step in steps:
                step.packs = True

    def leave(self) -> None:
        """Take the counts back, with one transfer."""
        if not self.running:
            return
        self.running = False
        tokens = int(self.clock)
        self.check_room(tokens)
        for layer in self.layers:
            layer.settle()
        counts: list[Tensor] = [torch.stack([store.counts for store in layer.stores]).to(self.clock.device) for layer in self.layers]
        steps = tokens - self.layers[0].stored_tokens
        at = 0
        every = torch.cat(counts).tolist()
        for layer in self.layers:
            layer.adopt(every[at : at + len(layer.stores)], steps)
            at += len(layer.stores)

    def reset(self) -> None:
        """Forget everything."""
        self.running, self.wakes = False, None
