"""What head scores are measured on: token sequences in two parts, as a cache meets them: a prompt, then tokens one by one."""

import collections.abc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import BitsAndHeadsError, PlanError
from ..eval import clips
from ..gates.attention import local_mask
from ..gates.rollout import RolloutEngine
from ..plan import Window
from ..seam import layer_shapes
from ..tasks import video
from ..tasks.video import VideoSample


class SequenceError(BitsAndHeadsError, ValueError):
    """Sequences from which nothing can be measured."""


@dataclass(frozen=True)
class Sequence:
    """Token ids. The first `prompt` of them are the prompt; the others are what the model reads or wrote after it.

    Attributes:
        answer: index of the first token that the model has to predict; None: all after the prompt. With a later turn in `ids` the
            question's own tokens, which nobody predicts, stand between both.
        inputs: what else the model is given, by the names of its arguments, without the batch's axis: pixels of a video, for example.
    """

    ids: tuple[int, ...]
    prompt: int
    answer: int | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.prompt < len(self.ids):
            raise SequenceError(
                f"A sequence of {len(self.ids)} tokens has a prompt of {self.prompt}; give at least one token to each part."
            )
        if not self.prompt <= self.predicted < len(self.ids):
            raise SequenceError(
                f"A sequence of {len(self.ids)} tokens with a prompt of {self.prompt} has an answer that begins at {self.answer}; "
                "it begins after the prompt and has at least one token."
            )

    @property
    def predicted(self) -> int:
        """Index of the first token that is predicted."""
        return self.prompt if self.answer is None else self.answer


@dataclass(frozen=True)
class Batch:
    """Sequences, padded on the left.

    Attributes:
        ids, real: int64 and bool [B, n].
        later: bool [B, n], the tokens after the prompt: their queries are the ones that a window would limit.
        predicts: bool [B, n], the places whose logits predict a token of the answer.
        inputs: what else the model is given, [B, ...].
    """

    ids: Tensor
    real: Tensor
    later: Tensor
    predicts: Tensor
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    def repeat(self, times: int) -> "Batch":
        """All sequences, `times` times."""
        ids, real, later, predicts = (t.repeat(times, 1) for t in (self.ids, self.real, self.later, self.predicts))
        return Batch(ids, real, later, predicts, {name: torch.cat([t] * times) for name, t in self.inputs.items()})

    def logits(self, model: Any) -> Tensor:
        """The model's logits [B, n, vocabulary], without a cache."""
        positions = (self.real.long().cumsum(1) - 1).clamp(min=0)
        return model(self.ids, attention_mask=self.real.long(), position_ids=positions, use_cache=False, **self.inputs).logits


def batches(sequences: collections.abc.Sequence[Sequence], size: int, device: torch.device) -> Iterator[Batch]:
    """The sequences in batches of at most `size`, the longest first. All bring the same inputs, of the same shapes."""
    rows = sorted(sequences, key=lambda s: -len(s.ids))
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        width = len(part[0].ids)
        ids = torch.tensor([[s.ids[0]] * (width - len(s.ids)) + list(s.ids) for s in part])
        place = torch.arange(width)[None]
        begin = torch.tensor([[width - len(s.ids)] for s in part])
        later = place >= begin + torch.tensor([[s.prompt] for s in part])
        predicts = place >= begin + torch.tensor([[s.predicted - 1] for s in part])
        predicts[:, -1] = False
        inputs = {name: torch.stack([s.inputs[name] for s in part]).to(device) for name in part[0].inputs}
        yield Batch(ids.to(device), (place >= begin).to(device), later.to(device), predicts.to(device), inputs)


def seen_locally(mask: Tensor, later: Tensor, window: Window) -> Tensor:
    """What a windowed head's queries see: the window after the prompt, everything in it. mask: bool [B, 1, n, n]; later: bool [B, n]."""
    return torch.where(later[:, None, :, None], local_mask(mask, window), mask)


def check_window(sequences: collections.abc.Sequence[Sequence], window: Window) -> None:
    """Raises SequenceError where no sequence is longer than the window, so that nothing can be told about any head."""
    longest = max((len(s.ids) for s in sequences), default=0)
    if longest <= window.sink + window.recent:
        raise SequenceError(
            f"The longest of {len(sequences)} sequences has {longest} tokens, and a window of {window.sink} + {window.recent} sees them all. "
            "Give longer texts or problems, or a smaller window."
        )


def text_sequences(ids: collections.abc.Sequence[int], length: int, prompt: int, count: int) -> list[Sequence]:
    """`count` pieces of `length` tokens, spread evenly over a text; the first `prompt` tokens of each are its prompt.

    Raises:
        SequenceError: the text is shorter than one piece.
    """
    if len(ids) < length:
        raise SequenceError(f"The text has {len(ids)} tokens; a piece needs {length}. Give a longer text, or a smaller length.")
    starts = [round(i * (len(ids) - length) / max(count - 1, 1)) for i in range(count)]
    return [Sequence(tuple(ids[s : s + length]), prompt) for s in starts]


def clip_sequences(
    config: Any, tokenizer: Any, samples: collections.abc.Sequence[VideoSample], dtype: torch.dtype = torch.float32
) -> list[Sequence]:
    """Questions about generated clips with their right answers, for a tiny video model: `<user> clip question <assistant> answer <end>` is the
    prompt, a further question follows, and its answer is what is predicted.

    Args:
        config: of the model. dtype: of the pixels, the model's own.
    """
    user, clip = tokenizer.convert_tokens_to_ids("<user>"), [config.video_token_id] * clips.video_tokens(config, samples[0].clip[1])
    found = []
    for s in samples:
        question, answer = s.before
        prompt = [user, *clip, *tokenizer(f"{question} <assistant> {answer} <end>").input_ids]
        asked = [*prompt, *tokenizer(f"<user> {s.prompt} <assistant>").input_ids]
        ids = (*asked, *tokenizer(f"{s.answer} <end>").input_ids)
        pixels = clips.pixels(video.frames_of([s])[0]).to(dtype)
        found.append(Sequence(ids, len(prompt), len(asked), {"pixel_values_videos": pixels}))
    return found


def read_prompts(model: Any, tokenizer: Any, source: str, count: int, chat: bool | None) -> tuple[list[list[int]], list[int]]:
    """Token ids of the first `count` prompts of problems (see gates.problems.read_problems), and the tokens that end an answer.

    chat: through the chat template; None: if the tokenizer has one.
    """
    from ..eval.runner import prompt_ids
    from ..eval.tasks import Task
    from ..gates.problems import read_problems

    use = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    task = Task(source, read_problems(source)[:count], lambda sample, output: 0.0, max_new_tokens=1, chat=use)
    ends = model.generation_config.eos_token_id
    return prompt_ids(tokenizer, task), ends if isinstance(ends, list) else [] if ends is None else [ends]


def solve(
    model: Any,
    prompts: collections.abc.Sequence[collections.abc.Sequence[int]],
    max_new_tokens: int,
    end: collections.abc.Sequence[int],
    batch: int = 64,
    tick: Callable[[int], None] = lambda n: None,
) -> list[Sequence]:
    """The model's own greedy answers to prompts (token ids), as sequences. end: end-of-sequence tokens.

    tick: called with the number of new answers.
    Raises:
        PlanError: a layer of the model is no plain full attention.
    """
    if not all(s.compressed for s in layer_shapes(model)):
        raise PlanError("Greedy answers are made for models with full attention in every layer only. Measure on a text instead.")
    engine, out = RolloutEngine(model, batch, end, pad=end[0] if end else 0), []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = engine.generate(part, max_new_tokens, temperature=0.0).tokens
        out += [Sequence((*p, *a), len(p)) for p, a in zip(part, answers, strict=True)]
        tick(len(part))
    return out
