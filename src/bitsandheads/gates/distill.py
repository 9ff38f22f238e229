"""DuoAttention-style scores: gates trained so that the last hidden states stay what they are with full attention (arXiv 2410.10819).

No rewards and no sampling. The tokens that count are either passkeys, random tokens hidden in a long text and repeated at its end (as in
DuoAttention), or worked solutions of problems.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CacheStateError
from ..plan import Window
from ..scores import HeadScores
from ..seam import disable_gates, enable_gates
from .config import check

Batch = tuple[Tensor, Tensor, Tensor]  # input_ids, attention_mask, tokens that count (bool), each [B, T]


@dataclass(frozen=True)
class DistillConfig:
    """How gates are distilled. Defaults: DuoAttention's, but for `l1`, which weighs a relative error here.

    Attributes:
        sink, recent: window of the local part.
        steps, batch: optimizer steps, sequences in each.
        length: tokens of a passkey text, the repetition at its end included.
        passkeys, passkey_tokens, cue: passkeys in a text, their tokens, and how many of them are the question and do not count.
        learning_rate: of AdamW; a tenth of it at both ends, reached over a fifth of the steps.
        l1: weight of the mean gate beside the squared distance of the hidden states over their squared length.
        gradient_checkpointing: recompute activations in the backward pass.
        seed: of the texts.
    Raises:
        PlanError: a value out of range.
    """

    sink: int = 128
    recent: int = 256
    steps: int = 2000
    batch: int = 1
    length: int = 8192
    passkeys: int = 10
    passkey_tokens: int = 32
    cue: int = 4
    learning_rate: float = 0.02
    l1: float = 0.05
    gradient_checkpointing: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        _ = Window(self.sink, self.recent)
        for name in ("steps", "batch", "passkeys", "cue"):
            check(getattr(self, name) >= 1, name, getattr(self, name), "a whole number of at least 1")
        check(self.passkey_tokens > self.cue, "passkey_tokens", self.passkey_tokens, "more than cue")
        check(self.length >= 3 * self.passkeys * self.passkey_tokens, "length", self.length, "at least three times all passkeys")


def passkey_batches(text: Sequence[int], config: DistillConfig) -> Iterator[Batch]:
    """Endless texts with passkeys.

    Args:
        text: token ids of some text, longer than config.length; passkeys are drawn from its tokens.
    Raises:
        CacheStateError: the text is too short.
    """
    keys = config.passkeys * config.passkey_tokens
    hay = config.length - 2 * keys
    if len(text) <= hay:
        raise CacheStateError(
            f"The text has {len(text)} tokens; passkey texts of {config.length} need more than {hay}. Give a longer text."
        )
    source = torch.tensor(list(text))
    draw = torch.Generator().manual_seed(config.seed)
    alphabet = source.unique()
    counts = torch.zeros(config.length, dtype=torch.bool)
    counts[-keys:] = torch.arange(keys) % config.passkey_tokens >= config.cue
    while True:
        rows = []
        for _ in range(config.batch):
            start = int(torch.randint(len(source) - hay, (), generator=draw))
            passkeys = alphabet[torch.randint(len(alphabet), (config.passkeys, config.passkey_tokens), generator=draw)]
            cuts = torch.randint(0, hay + 1, (config.passkeys,), generator=draw).sort().values.tolist()
            pieces = torch.tensor_split(source[start : start + hay], cuts)
            woven = [t for piece, key in zip(pieces, passkeys, strict=False) for t in (piece, key)]
            rows.append(torch.cat((*woven, pieces[-1], passkeys.flatten())))
        ids = torch.stack(rows)
        yield ids, torch.ones_like(ids), counts.expand(config.batch, -1)


def solution_batches(solutions: Sequence[tuple[list[int], list[int]]], config: DistillConfig) -> Iterator[Batch]:
    """Endless batches of (prompt tokens, solution tokens), drawn at random; the solutions' tokens count."""
    draw = torch.Generator().manual_seed(config.seed)
    while True:
        rows = [solutions[i] for i in torch.randint(len(solutions), (config.batch,), generator=draw).tolist()]
        width = max(len(p) + len(s) for p, s in rows)
        ids = torch.zeros(config.batch, width, dtype=torch.long)
        mask, counts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (prompt, solution) in enumerate(rows):
            n = len(prompt) + len(solution)
            ids[i, :n] = torch.tensor(prompt + solution)
            mask[i, :n] = 1
            counts[i, len(prompt) : n] = True
        yield ids, mask, counts


def distill(
    model: Any, batches: Iterator[Batch], config: DistillConfig, progress: Callable[[int, float, float], None] | None = None, **header: Any
) -> HeadScores:
    """Train the gates of a model on batches; the model comes back without them.

    Args:
        model: of transformers, on its device; its parameters are frozen.
        batches: see passkey_batches and solution_batches.
        progress: called with (step, relative error, mean gate).
        header: further fields of the scores' header.
    """
    gates = enable_gates(model, Window(config.sink, config.recent))
    device = gates.alpha.device
    optimizer = torch.optim.AdamW([gates.alpha], config.learning_rate, weight_decay=0.0)
    ramp = max(config.steps // 5, 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, 0.1 + 0.9 * min(i, config.steps - i) / ramp))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers checkpoints in training mode only
    try:
        for step in range(1, config.steps + 1):
            ids, mask, counts = (t.to(device) for t in next(batches))
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            learned = gates.alpha.detach().clone()
            with torch.no_grad():
                gates.alpha.fill_(1)
                full = model.base_model(**inputs).last_hidden_state[counts].float()
                gates.alpha.copy_(learned)
            mixed = model.base_model(**inputs).last_hidden_state[counts].float()
            error = (full - mixed).square().sum() / full.square().sum()
            (error + config.l1 * gates.alpha.abs().mean()).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            gates.clamp_()
            if progress is not None:
                progress(step, error.item(), gates.alpha.mean().item())
        fields = {"sink": config.sink, "recent": config.recent, "seed": config.seed, "extra": {"config": asdict(config)}}
        return HeadScores.of(gates.alpha, model, "duo", **(fields | header))
    finally:
        if config.gradient_checkpointing:
            model.gradient_checkpointing_disable()
            model.eval()
        disable_gates(model)
