"""TRL's GRPO trainer with gates: the penalty, rollouts through `RolloutEngine`, and small checkpoints that are whole or absent."""

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from ..errors import BackendError
from .attention import HeadGates
from .config import TrainConfig
from .rollout import RolloutEngine

GATES_FILE = "head_gates.safetensors"
KEEP = 2  # checkpoints


def penalty_weight(config: TrainConfig, group_rewards: Tensor, rewards: Tensor) -> Tensor:
    """The factor of the mean absolute gate in the loss, a scalar.

    Args:
        config: beta, tau and the kind of penalty.
        group_rewards: float [solutions], the mean reward of each solution's question.
        rewards: float [solutions], each solution's own.
    """
    if config.penalty == "constant":
        return rewards.new_tensor(config.beta).mul(torch.e - 1)
    mean = group_rewards if config.penalty == "group" else rewards.mean()
    return ((mean > config.tau) * config.beta * (mean.exp() - 1)).mean()


def ranked(history: Tensor, average: int) -> Tensor:
    """Scores of trained gates: their mean over the last steps. Gates that ended at 0 would tie, so they are ranked by how long they stayed up.

    Args:
        history: float32 [steps, layers, KV heads], the gates after each step.
        average: how many of the last steps count; 1: the last gates, as in RLKV's release.
    Returns:
        float32 [layers, KV heads]; of a gate that was 0 in all those steps its mean over the whole run minus 1, so between -1 and 0.
    """
    last = history[-average:].mean(0)
    return torch.where(last > 0, last, history.mean(0) - 1)


class _Steps(TrainerCallback):
    """Clamps the gates after each step, and ends the run when its time is over."""

    def __init__(self, trainer: "GateTrainer") -> None:
        self.trainer, self.started = trainer, time.monotonic()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.gates.clamp_()
        self.trainer.history.append(self.trainer.gates.alpha.detach().cpu().clone())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.config.seconds:
            accelerator = self.trainer.accelerator
            spent = torch.tensor([time.monotonic() - self.started], device=accelerator.device)
            if accelerator.gather(spent).max() >= self.trainer.config.seconds:  # all processes decide the same
                control.should_training_stop = True


class GateTrainer(GRPOTrainer):
    """GRPO on the gates of a model.

    loss = L_GRPO + weight * mean |alpha| (RLKV, arXiv 2510.08525; its 1 / (L H_kv) sum is the mean), see penalty_weight. Solutions are
    sampled by `engine` from the same gated model. Metrics of each step: TRL's, the penalty's weight, the gates' mean, seconds and tokens
    of the rollouts, and the mean distance of the rollout's log-probabilities from the trainer's own.

    Args:
        gates: what is trained.
        config: the penalty; the other fields must be in `args` already, see training.arguments.
        engine: samples the solutions.
        rest: see GRPOTrainer.
    Raises:
        BackendError: a distributed backend that shards the model.
    """

    def __init__(self, gates: HeadGates, config: TrainConfig, engine: RolloutEngine, **rest: Any) -> None:
        super().__init__(**rest)
        kind = str(self.accelerator.distributed_type.value)
        if kind not in ("NO", "MULTI_GPU", "MULTI_CPU"):
            raise BackendError(
                f"Gates are trained with the whole model in each process; {kind} shards it. Use `accelerate launch --multi_gpu`."
            )
        self.gates, self.config, self.engine = gates, config, engine
        self.history: list[Tensor] = []  # the gates after each step
        self._folder = Path(str(self.args.output_dir))
        self._partial = False
        self._group_rewards: Tensor = torch.empty(0)
        self._rewards: Tensor = torch.empty(0)
        self.add_callback(_Steps(self))

    # -- rollouts and rewards ---------------------------------------------------------------------------------------------------

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> tuple[list[list[int]], list[list[float]]]:
        seed = (self.config.seed, self.state.global_step, self.accelerator.process_index)
        out = self.engine.generate(prompt_ids, self.config.max_new_tokens, self.config.temperature, seed)
        total = self.accelerator.gather(torch.tensor([out.count], device=self.accelerator.device)).sum().item()
        metrics = self._metrics["train"]
        metrics["rollout/seconds"].append(out.seconds)
        metrics["rollout/tokens"].append(total)
        return out.tokens, out.logprobs

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = rewards[:, 0]
        self._group_rewards = self._rewards.view(-1, self.config.samples).mean(1).repeat_interleave(self.config.samples)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        first = self.accelerator.process_index * len(inputs)
        own = slice(first, first + len(inputs))
        return out | {"rewards": self._rewards[own], "group_rewards": self._group_rewards[own]}

    # -- loss -------------------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        out = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._logps = out[0].detach()
        return out

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = trim(inputs)
        loss = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        weight = penalty_weight(self.config, inputs["group_rewards"], inputs["rewards"])
        metrics = self._metrics["train"]
        metrics["rollout/logprob_distance"].append((self._logps - inputs["sampling_per_token_logps"])[mask].abs().mean().item())
        metrics["gates/penalty_weight"].append(self.accelerator.reduce(weight.detach(), "mean").item())
        metrics["gates/mean"].append(self.gates.alpha.mean().item())
        return loss + weight * self.gates.alpha.abs().mean() / self.current_gradient_accumulation_steps

    # -- checkpoints ------------------------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the result is a table of scores."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder / "partial") if self._partial else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self._folder
        if self.accelerator.is_main_process:
            shutil.rmtree(folder / "partial", ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._partial = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._partial = False
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(folder / "partial" / name, folder / name)
            (folder / "partial").rmdir()
            for old in checkpoints(folder)[:-KEEP]:
                shutil.rmtree(old)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self._folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"alpha": self.gates.alpha.detach().cpu(), "history": torch.stack(self.history)}, folder / GATES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / GATES_FILE)
        with torch.no_grad():
            self.gates.alpha.copy_(saved["alpha"])
        self.history = list(saved["history"])


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, the oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def trim(inputs: dict[str, Any]) -> dict[str, Any]:
    """Cut columns off that are padding in all rows: of prompts on the left, of solutions on the right."""
    prompt = int(inputs["prompt_mask"].sum(1).max())
    completion = int(inputs["completion_mask"].sum(1).max())
    cut = {k: inputs[k][:, -prompt:] for k in ("prompt_ids", "prompt_mask")}
    cut |= {k: inputs[k][:, :completion] for k in ("completion_ids", "completion_mask", "sampling_per_token_logps")}
    return inputs | cut
