"""The hyper-parameters of gate training, with the paper's as defaults, from YAML or JSON files."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import PlanError
from ..plan import Window

C = TypeVar("C")


def load_config(kind: type[C], path: str | Path | None, **changes: Any) -> C:
    """A configuration from a file, with single fields changed.

    Args:
        kind: a dataclass whose fields all have defaults.
        path: YAML or JSON, one object; None: the defaults.
        changes: fields to set; None leaves a field as it is.
    Raises:
        PlanError: no such file, no object, unknown fields, or values that the dataclass refuses.
    """
    import yaml

    given: Any = {}
    if path is not None:
        try:
            given = yaml.safe_load(Path(path).read_text("utf-8"))  # JSON is YAML
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise PlanError(f"{path} is no configuration ({error}); give a YAML or JSON file.") from error
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(given, dict) or set(given) - set(known):
        unknown = sorted(set(given) - set(known)) if isinstance(given, dict) else [given]
        raise PlanError(f"{path} sets {', '.join(map(repr, unknown))}; a configuration may set {', '.join(known)}.")
    return kind(**(given | {k: v for k, v in changes.items() if v is not None}))


def check(ok: bool, name: str, value: Any, allowed: str) -> None:
    """Raise PlanError where a field is not ok."""
    if not ok:
        raise PlanError(f"{name} is {value!r}; give {allowed}.")


@dataclass(frozen=True)
class TrainConfig:
    """How gates are trained by reinforcement learning. Defaults: RLKV's settings for DeepSeek-R1-Distill-Llama-8B (arXiv 2510.08525).

    Attributes:
        sink, recent: window of the local part.
        steps: optimizer steps.
        questions, samples: per step, and solutions sampled for each question.
        learning_rate, adam_beta1, adam_beta2, weight_decay: of AdamW; the rate is constant.
        beta: weight of the L1 penalty.
        tau: mean reward above which a question is penalised.
        penalty: "group": 1[r > tau] * beta * (exp(r) - 1), r the mean reward of the question's samples (the paper);
            "micro_batch": the same with the mean over a micro-batch (its release); "constant": beta * (e - 1), whatever the reward.
        scale_rewards: advantages divided by the standard deviation of the "group" (the paper), of the "batch" (its release), or "none".
        loss: TRL's loss_type; "grpo" averages over a solution's tokens, then over solutions.
        temperature: of sampling.
        max_new_tokens: of a solution; longer ones are cut off, and so wrong.
        reward: see problems.get_reward.
        chat: prompts are put into the model's chat template.
        micro_batch: solutions in one training pass of a process.
        rollout_batch: solutions that a process decodes at once.
        gradient_checkpointing: recompute activations in the backward pass.
        average: scores are the mean of the gates after so many last steps; 1: the last gates (the release). Gates go on to swing around
            their balance at a constant learning rate, so a mean ranks the weak ones better.
        save_every: steps between checkpoints, at most 10.
        seconds: stop after the step that passes this time, whatever `steps` says; 0: never.
        seed: of all random numbers.
    Raises:
        PlanError: a value out of range.
    """

    sink: int = 128
    recent: int = 256
    steps: int = 185
    questions: int = 32
    samples: int = 4
    learning_rate: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    weight_decay: float = 0.017
    beta: float = 1e-3
    tau: float = 0.5
    penalty: str = "group"
    scale_rewards: str = "group"
    loss: str = "grpo"
    temperature: float = 1.0
    max_new_tokens: int = 8192
    reward: str = "math"
    chat: bool = True
    micro_batch: int = 1
    rollout_batch: int = 32
    gradient_checkpointing: bool = True
    average: int = 1
    save_every: int = 10
    seconds: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.window
        for name in ("steps", "questions", "max_new_tokens", "micro_batch", "rollout_batch", "average"):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= 1, name, value, "a whole number of at least 1")
        check(self.samples >= 2, "samples", self.samples, "at least 2: advantages compare the samples of a question")
        check(1 <= self.save_every <= 10, "save_every", self.save_every, "1 to 10 steps")
        check(self.temperature > 0, "temperature", self.temperature, "a number above 0")
        check(self.penalty in ("group", "micro_batch", "constant"), "penalty", self.penalty, '"group", "micro_batch" or "constant"')
        check(self.scale_rewards in ("group", "batch", "none"), "scale_rewards", self.scale_rewards, '"group", "batch" or "none"')

    @property
    def window(self) -> Window:
        """The local part."""
        return Window(self.sink, self.recent)

    def accumulation(self, processes: int) -> int:
        """Training passes of one step in each process. PlanError where the solutions of a step do not divide into them."""
        total, unit = self.questions * self.samples, self.micro_batch * processes
        check(
            total % unit == 0,
            "micro_batch",
            self.micro_batch,
            f"a number such that {processes} processes of it divide the {total} solutions of a step",
        )
        return total // unit

    def to_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=1) + "\n"
