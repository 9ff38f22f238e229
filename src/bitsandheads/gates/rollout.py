"""Sampling many solutions at once: fixed buffers, one CUDA graph for each size, the same arithmetic without graphs on a CPU.

A decode step of a small model is nearly all launch overhead, and training is nearly all decode steps. So one step (forward pass,
sampling, bookkeeping) is captured as a graph for a number of rows and of cache columns; the rows halve when half of them are done,
the columns grow in steps. Random numbers belong to the prompt and the step, so they depend neither on the sizes nor on the machine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheStateError, PlanError
from ..seam import layer_shapes, text_config

COLUMNS = 128  # a graph for every so many columns of the cache
CHECK = 16  # steps between two looks at how many rows are done
PREFILL = 32768  # tokens of one prefill pass


def columns_for(prompt: int, new: int) -> int:
    """Columns of the cache for prompts of at most `prompt` tokens and `new` more: SDPA's kernels like multiples of 8."""
    return _up(_up(prompt, 8) + new, COLUMNS)


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


class RolloutCache:
    """Keys and values of all rows in fixed buffers; the model sees the part that a step works on. Duck-typed transformers cache.

    Attributes:
        keys, values: for each layer [rows, H_kv, columns, D].
        at: int64 [1], the column of the next token, on the device.
        part: rows and columns of the current pass, and whether it fills the columns from the first on (a prompt).
    """

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        parameter = next(model.parameters())
        sizes = [(rows, s.kv_heads, columns, s.head_dim) for s in layer_shapes(model)]
        self.keys, self.values = ([parameter.new_zeros(size) for size in sizes] for _ in range(2))
        self.at = torch.zeros(1, dtype=torch.long, device=parameter.device)
        self.part: tuple[slice, int, bool] = (slice(0, rows), columns, True)

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; returns all keys and values that the pass works on."""
        rows, columns, prompt = self.part
        out = []
        for buffer, new in ((self.keys[layer_idx], k), (self.values[layer_idx], v)):
            if prompt:
                buffer[rows, :, :columns] = new
            else:
                buffer[rows].index_copy_(2, self.at, new)
            out.append(buffer[rows, :, :columns])
        return out[0], out[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Unused: positions and masks are given to the model."""
        return 0

    def select(self, rows: Tensor) -> None:
        """Row i becomes row rows[i]."""
        for buffer in (*self.keys, *self.values):
            buffer[: len(rows)] = buffer[rows]


@dataclass(frozen=True)
class Rollouts:
    """What `RolloutEngine.generate` returns.

    Attributes:
        tokens: for each prompt the generated tokens, the end token included if there is one.
        logprobs: their log-probabilities at the temperature used, natural logarithm.
        seconds: wall-clock time.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    seconds: float

    @property
    def count(self) -> int:
        """Tokens generated."""
        return sum(map(len, self.tokens))


class _State:
    """What a decode step reads and writes, all on the device. rows: R, columns: C, new tokens: N."""

    def __init__(self, model: Any, rows: int, columns: int, new: int) -> None:
        device = next(model.parameters()).device
        long = {"dtype": torch.long, "device": device}
        self.cache = RolloutCache(model, rows, columns)
        self.seen = torch.zeros(rows, columns, dtype=torch.bool, device=device)  # real tokens
        self.token, self.position, self.origin = (torch.zeros(rows, **long) for _ in range(3))
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.step = torch.zeros(1, **long)
        self.noise, self.logprobs = (torch.zeros(new, rows, device=device) for _ in range(2))  # by step and origin
        self.tokens = torch.zeros(new, rows, **long)
        self.rows, self.columns, self.new = rows, columns, new

    def select(self, keep: Tensor) -> None:
        self.cache.select(keep)
        for tensor in (self.seen, self.token, self.position, self.origin, self.done):
            tensor[: len(keep)] = tensor[keep]


class RolloutEngine:
    """Generates with one model again and again; buffers and graphs are kept between calls.

    Args:
        model: a causal language model of transformers, full attention in every layer, gated or not.
        batch: rows that are decoded at once; more prompts are done in turns.
        eos: tokens that end a sequence.
        pad: any token, for rows that are done.
        graphs: None: where the model is on a CUDA device.
    Raises:
        PlanError: a layer is no plain full attention.
    """

    def __init__(self, model: Any, batch: int, eos: Sequence[int], pad: int, graphs: bool | None = None) -> None:
        if not all(shape.compressed for shape in layer_shapes(model)):
            raise PlanError(f"{type(model).__name__} has layers without plain full attention; rollouts need full attention in all of them.")
        self.model, self.batch, self.pad = model, batch, pad
        self.device = next(model.parameters()).device
        self.eos = torch.tensor(list(eos), device=self.device)
        self.graphs = self.device.type == "cuda" if graphs is None else graphs
        self.state: _State | None = None
        self._captured: dict[tuple[int, int, float], torch.cuda.CUDAGraph] = {}

    def release(self) -> None:
        """Free buffers and graphs; the next call makes new ones."""
        self.state, self._captured = None, {}

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        temperature: float = 1.0,
        seed: int | Sequence[int] = 0,
        progress: Callable[[int], None] | None = None,
    ) -> Rollouts:
        """Continue every prompt until an end token or `new` tokens.

        Args:
            prompts: token ids, none empty.
            new: the most tokens to generate.
            temperature: 0 takes the likeliest token.
            seed: a whole number or several; the same ones give the same random numbers.
            progress: called with the number of prompts that are done, after each batch.
        Raises:
            CacheStateError: an empty prompt, or more tokens than the model has positions.
        """
        longest = max(map(len, prompts), default=0)
        limit = getattr(text_config(self.model), "max_position_embeddings", None) or longest + new
        if not all(map(len, prompts)) or longest + new > limit:
            raise CacheStateError(
                f"The longest of {len(prompts)} prompts has {longest} tokens (the shortest {min(map(len, prompts), default=0)}) and {new} "
                f"may follow; the model has {limit} positions, and no prompt may be empty."
            )
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(_mix([seed] if isinstance(seed, int) else seed))
        noise = torch.rand(len(prompts), new, generator=generator).T
        was_training = self.model.training
        self.model.eval()  # no dropout, and gradient checkpointing would switch the cache off
        tokens: list[list[int]] = []
        logprobs: list[list[float]] = []
        try:
            with torch.no_grad():
                for start in range(0, len(prompts), self.batch):
                    part = slice(start, start + self.batch)
                    for row, scores in self._run(prompts[part], noise[:, part], new, temperature):
                        tokens.append(row)
                        logprobs.append(scores)
                    if progress is not None:
                        progress(len(tokens))
        finally:
            self.model.train(was_training)
        return Rollouts(tokens, logprobs, time.perf_counter() - started)

    # -- one batch --------------------------------------------------------------------------------------------------------------

    def _run(self, prompts: Sequence[Sequence[int]], noise: Tensor, new: int, temperature: float) -> list[tuple[list[int], list[float]]]:
        width = _up(max(map(len, prompts)), 8)
        state = self._prepare(columns_for(width, new), new)
        count = len(prompts)
        rows = next(r for r in reversed(self._ladder()) if r >= count)
        mask = torch.zeros(rows, width, dtype=torch.bool)
        ids = torch.full((rows, width), self.pad)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.tensor(prompt)
            mask[i, width - len(prompt) :] = True
        mask[count:, -1] = True  # rows without a prompt
        ids, mask = ids.to(self.device), mask.to(self.device)
        state.seen.zero_()
        state.seen[:rows, :width] = mask
        state.position[:rows] = mask.sum(1) - 1
        state.origin.copy_(torch.arange(state.rows))
        state.done[:rows] = torch.arange(rows, device=self.device) >= count
        state.step.zero_()
        state.cache.at.fill_(width - 1)
        state.noise[:new, :count] = noise.to(self.device)
        for start in range(0, rows, max(PREFILL // width, 1)):
            part = slice(start, min(start + max(PREFILL // width, 1), rows))
            self._prefill(ids[part], mask[part], part, temperature)
        self._advance()

        for step in range(1, new):
            if step % CHECK == 1:
                active = (~state.done[:rows]).nonzero().squeeze(1)
                if not len(active):
                    break
                smaller = next(r for r in reversed(self._ladder()) if r >= len(active))
                if smaller < rows:
                    keep = torch.cat((active, state.done[:rows].nonzero().squeeze(1)))[:smaller]
                    state.select(keep)
                    rows = smaller
            self._decode(rows, _up(width + step, COLUMNS), temperature)

        done = int(state.step)
        tokens, logprobs = state.tokens[:done, :count].T.cpu(), state.logprobs[:done, :count].T.cpu()
        ended = torch.isin(tokens, self.eos.cpu())
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, done).tolist()
        return [(t[:n], p[:n]) for t, p, n in zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)]

    def _ladder(self) -> list[int]:
        """Numbers of rows that are decoded at once, the largest first."""
        out = [self.batch]
        while out[-1] >= 16:
            out.append((out[-1] + 1) // 2)
        return out

    def _prepare(self, columns: int, new: int) -> _State:
        state = self.state
        if state is None or state.columns < columns or state.new < new:
            self.release()
            columns, new = (columns, new) if state is None else (max(columns, state.columns), max(new, state.new))
            del state
            self.state = state = _State(self.model, self.batch, columns, new)
        return state

    def _prefill(self, ids: Tensor, mask: Tensor, rows: slice, temperature: float) -> None:
        state = self._state
        width = ids.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        state.cache.part = (rows, width, True)
        self._forward(ids, (mask.cumsum(1) - 1).clamp(min=0), mask[:, None, None] & causal, rows, temperature)

    def _decode(self, rows: int, columns: int, temperature: float) -> None:
        key = (rows, columns, temperature)
        if not self.graphs:
            self._decode_step(*key)
            return
        if key not in self._captured:
            self._captured[key] = self._capture(*key)
        self._captured[key].replay()

    def _capture(self, rows: int, columns: int, temperature: float) -> torch.cuda.CUDAGraph:
        """A graph of one step. The step that warms up runs on a copy of the small tensors, so it leaves no trace but in its own column."""
        state = self._state
        small = (state.seen, state.token, state.position, state.done, state.step, state.tokens, state.logprobs, state.cache.at)
        saved = [t.clone() for t in small]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._decode_step(rows, columns, temperature)
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(small, saved, strict=True):
            tensor.copy_(value)
        graph = torch.cuda.CUDAGraph()
        pool = next((g.pool() for g in self._captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            self._decode_step(rows, columns, temperature)
        return graph

    def _decode_step(self, rows: int, columns: int, temperature: float) -> None:
        state = self._state
        part = slice(0, rows)
        state.seen.index_fill_(1, state.cache.at, True)
        state.cache.part = (part, columns, False)
        mask = state.seen[part, None, None, :columns]
        self._forward(state.token[part, None], state.position[part, None], mask, part, temperature)
        self._advance()

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, rows: slice, temperature: float) -> None:
        """One pass of the model, and the next token of each row."""
        state = self._state
        out = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=state.cache, use_cache=True, logits_to_keep=1
        )
        logits = out.logits[:, -1].float()
        logprobs = (logits / temperature if temperature else logits).log_softmax(-1)
        origin = state.origin[rows]
        if temperature:
            total = logprobs.exp().cumsum(-1)
            point = state.noise.index_select(0, state.step)[0, origin][:, None] * total[:, -1:]
            token = torch.searchsorted(total, point, right=True).clamp(max=logits.shape[1] - 1)
        else:
            token = logprobs.argmax(-1, keepdim=True)
        place = state.step * state.rows + origin
        token, chosen = token.squeeze(1), logprobs.gather(1, token).squeeze(1)
        token = token.masked_fill(state.done[rows], self.pad)
        state.tokens.view(-1).index_copy_(0, place, token)
        state.logprobs.view(-1).index_copy_(0, place, chosen)
        state.token[rows] = token
        state.position[rows] += 1
        state.done[rows] |= (token[:, None] == self.eos).any(1)

    def _advance(self) -> None:
        self._state.step += 1
        self._state.cache.at += 1

    @property
    def _state(self) -> _State:
        assert self.state is not None
        return self.state


def _mix(numbers: Sequence[int]) -> int:
    """One seed of several numbers."""
    out = 0
    for n in numbers:
        out = (out * 6364136223846793005 + n + 1442695040888963407) % 2**63
    return out
