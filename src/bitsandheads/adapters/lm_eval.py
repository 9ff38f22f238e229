"""lm-evaluation-harness with a compressed cache: every task of the harness, with every plan.

    lm_eval --model bitsandheads --model_args pretrained=MODEL,plan=balanced --tasks gsm8k

Releases of the harness that look for entry points find the model by itself; before (up to 0.4.13) start the harness as
`python -m bitsandheads.adapters.lm_eval`, with the same arguments.

Generation tasks decode from the packed cache. Log-likelihood tasks too: the context without its last token is processed and
packed, then the last token and the continuation are teacher-forced against it, so that every scored probability comes from
attention over the cache.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from .. import enable
from ..errors import BitsAndHeadsError
from ..eval.fidelity import STEP
from ..eval.runner import left_padded, plan_cache
from ..methods import get_plan

NAME = "bitsandheads"
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, tokens of the continuation


class AdapterError(BitsAndHeadsError, ValueError):
    """A model or setting that the adapter cannot serve."""


class BitsAndHeadsLM(HFLM):
    """The harness's model of transformers, with a new cache of `plan` for every batch.

    Args:
        pretrained: see HFLM, which takes all further arguments.
        plan: a preset, a plan file, or a plan with head scores such as rlkv:SCORES@0.5.
        kernels: "auto", "reference", "triton" or "cuda" (HFLM has another argument "backend").
    Raises:
        AdapterError: an encoder-decoder model.
    """

    def __init__(self, pretrained: Any, plan: str = "balanced", kernels: str = "auto", **settings: Any) -> None:
        super().__init__(pretrained=pretrained, **settings)
        if self.backend != "causal":
            raise AdapterError(f"{pretrained} is an encoder-decoder model; compressed caches serve decoder-only models.")
        self.plan = plan
        self._make_cache = plan_cache(get_plan(plan, self.model), kernels)
        enable(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        return super().get_model_info() | {"plan": self.plan}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        cache = self._make_cache(self.model, len(context))
        return super()._model_generate(context, max_length, stop, past_key_values=cache, **settings)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(sum of the continuation's log-probabilities, whether each of its tokens is the most probable one) for each request."""
        size = override_bs or self.batch_size
        if not isinstance(size, int):
            raise AdapterError(f"The batch size is {size!r}; compressed caches need a number for log-likelihood tasks.")
        out: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc=f"log-likelihood, {self.plan}") as bar:
            for start in range(0, len(order), size):
                members = order[start : start + size]
                rows = [self._fit(requests[i]) for i in members]
                for i, answer in zip(members, self._score(rows), strict=True):
                    out[i] = answer
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], answer)
                bar.update(len(members))
        return [out[i] for i in range(len(requests))]

    def _fit(self, request: Request) -> tuple[list[int], list[int]]:
        """Context and continuation, the context cut on the left to the model's length."""
        _, context, continuation = request
        return context[-max(self.max_length + 1 - len(continuation), 1) :], continuation

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[float, bool]]:
        """Contexts are padded on the left, continuations on the right: a token sees none that is behind it."""
        cache = self._make_cache(self.model, len(rows))
        heads = [context[:-1] for context, _ in rows]
        forced = [context[-1:] + continuation[:-1] for context, continuation in rows]
        past = left_padded(heads, 0) if any(heads) else {"attention_mask": torch.zeros(len(rows), 0, dtype=torch.int64)}
        mask = past["attention_mask"].to(self.device)
        positions = mask.sum(1, keepdim=True)
        if any(heads):
            first = (mask.cumsum(1) - 1).clamp(min=0)
            self.model(past["input_ids"].to(self.device), attention_mask=mask, position_ids=first, past_key_values=cache, logits_to_keep=1)
        longest = max(map(len, forced))
        ids = torch.tensor([f + [0] * (longest - len(f)) for f in forced], device=self.device)
        targets = torch.tensor([c + [0] * (longest - len(c)) for _, c in rows], device=self.device)
        picked, best = [], []
        for start in range(0, longest, STEP):
            part = ids[:, start : start + STEP]
            mask = torch.cat([mask, mask.new_ones(part.shape)], 1)
            where = positions + torch.arange(start, start + part.shape[1], device=self.device)
            logits = self.model(part, attention_mask=mask, position_ids=where, past_key_values=cache).logits.float()
            target = targets[:, start : start + STEP]
            picked.append(logits.log_softmax(-1).gather(-1, target[..., None])[..., 0])
            best.append(logits.argmax(-1) == target)
        log_probs, hits = torch.cat(picked, 1).double().cpu(), torch.cat(best, 1).cpu()
        for i, (_, continuation) in enumerate(rows):
            n = len(continuation)
            yield float(log_probs[i, :n].sum()), bool(hits[i, :n].all())


def main() -> None:
    """The harness's own command line, which then knows `--model bitsandheads`."""
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target="bitsandheads.adapters.lm_eval:BitsAndHeadsLM")
    cli_evaluate()


if __name__ == "__main__":
    main()
