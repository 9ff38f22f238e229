"""One training run of the gates, from a model and problems to a folder with head scores."""

import csv
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from ..errors import CacheStateError, NotFiniteError
from ..scores import HeadScores, write_text
from ..seam import disable_gates, enable_gates
from ..tasks import Sample
from .config import TrainConfig
from .problems import Reward
from .prompts import make_engine, message
from .trainer import GateTrainer, checkpoints, ranked

BINS = 10  # of the gates' histogram
BARS = "▁▂▃▄▅▆▇█"
LOGGED = {  # column of log.csv: TRL's or our metric
    "reward": "reward",
    "reward_std": "reward_std",
    "mixed_groups": "frac_reward_zero_std",
    "output_tokens": "completions/mean_length",
    "cut_off": "completions/clipped_ratio",
    "loss": "loss",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "penalty_weight": "gates/penalty_weight",
    "logprob_distance": "rollout/logprob_distance",
    "rollout_tokens": "rollout/tokens",
    "rollout_seconds": "rollout/seconds",
    "step_seconds": "step_time",
}


def schedule(problems: int, steps: int, questions: int, seed: int) -> list[int]:
    """Which problems each step asks: one permutation after the other, `steps * questions` indices."""
    rng = random.Random(seed)
    out: list[int] = []
    while len(out) < steps * questions:
        out += rng.sample(range(problems), problems)
    return out[: steps * questions]


def arguments(config: TrainConfig, output: Path, processes: int, cpu: bool) -> GRPOConfig:
    """TRL's configuration of a run."""
    return GRPOConfig(
        output_dir=str(output),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=config.accumulation(processes),
        num_generations=config.samples,
        max_completion_length=config.max_new_tokens,
        temperature=config.temperature,
        beta=0.0,
        loss_type=config.loss,
        scale_rewards=config.scale_rewards,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=config.adam_beta1,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        bf16=False,  # the weights' own dtype, no autocast: rollouts and training compute the same
        disable_dropout=True,
        shuffle_dataset=False,  # see schedule
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=config.save_every,
        logging_strategy="steps",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=cpu,
        seed=config.seed,
    )


class _Report(TrainerCallback):
    """After every step: a line for the reader, a row of log.csv, TensorBoard."""

    def __init__(self, folder: Path, gates: Any, resumed: int, say: Callable[[str], None]) -> None:
        self.path, self.gates, self.say = folder / "log.csv", gates, say
        self.board = SummaryWriter(folder / "tensorboard", purge_step=resumed + 1 if resumed else None)
        heads = [f"gate_{i}_{j}" for i in range(gates.alpha.shape[0]) for j in range(gates.alpha.shape[1])]
        self.columns = ["step", *LOGGED, "below_0.1", "below_0.5", "gates_mean", *heads]
        kept = []
        if resumed:
            with self.path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= resumed]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(kept)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "reward" not in logs:
            return
        alpha = self.gates.alpha.detach().float().cpu()
        row: dict[str, Any] = {"step": state.global_step} | {k: logs.get(name) for k, name in LOGGED.items()}
        row["mixed_groups"] = 1 - row["mixed_groups"]
        row |= {"below_0.1": (alpha < 0.1).float().mean().item(), "below_0.5": (alpha < 0.5).float().mean().item()}
        row["gates_mean"] = alpha.mean().item()
        for name, value in row.items():
            self.board.add_scalar(name, value, state.global_step)
        self.board.add_histogram("gates", alpha, state.global_step)
        self.board.flush()
        heads = self.columns[-alpha.numel() :]
        row |= {name: f"{value:.5f}" for name, value in zip(heads, alpha.flatten().tolist(), strict=True)}
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        share = row["rollout_seconds"] / row["step_seconds"] if row["step_seconds"] else math.nan
        self.say(
            f"step {state.global_step}/{args.max_steps}  reward {row['reward']:.3f}  tokens {row['output_tokens']:.0f}  "
            f"sparsity {row['below_0.5']:.2f}  gates 0 {histogram(alpha)} 1  {row['step_seconds']:.1f} s  "
            f"{row['rollout_tokens'] / row['rollout_seconds']:.0f} tokens/s, {share:.0%} of the time"
        )


def histogram(alpha: torch.Tensor) -> str:
    """A bar for each tenth of [0, 1], as high as the logarithm of its number of gates; a blank where there is none."""
    counts = torch.histc(alpha.clamp(0, 1), BINS, 0, 1).tolist()
    most = math.log1p(max(counts))
    return "".join(BARS[round(math.log1p(c) / most * (len(BARS) - 1))] if c else " " for c in counts)


def train(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Sample],
    reward: Reward,
    config: TrainConfig,
    output: Path,
    resume: bool = False,
    data: str = "",
    commit: str = "",
    name: str = "",
    say: Callable[[str], None] = print,
) -> HeadScores:
    """Train the gates of a model; the folder `output` gets head_scores.tsv at the end.

    It also holds config.json, log.csv (a row for each step), tensorboard/, checkpoint-*/ (the newest two; whole or absent) and at the end
    summary.json (seconds, tokens, peak memory). The model comes back without gates. Scores: see trainer.ranked.

    Args:
        model: of transformers, on its device; its parameters are frozen.
        reward: of a problem and an output's text; what it raises ends the run.
        config: see TrainConfig.
        resume: go on from the newest checkpoint in `output`; on a CPU the scores are then those of a run that was not interrupted.
        data, commit, name: for the scores' header; name is the model's, empty: as its configuration has it.
        say: is given a line for each step.
    Raises:
        CacheStateError: `output` holds another run, or one that is not resumed.
        NotFiniteError: a reward is no finite number.
    """
    device = next(model.parameters()).device
    gates = enable_gates(model, config.window)
    try:
        trainer = _trainer(model, tokenizer, gates, problems, reward, config, output, device)
        main = trainer.accelerator.is_main_process
        found = checkpoints(output)
        if main:
            _claim(output, config, resume)
        trainer.accelerator.wait_for_everyone()
        checkpoint = found[-1] if resume and found else None
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if main:
            trainer.add_callback(_Report(output, gates, step, say))
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        about = {k: getattr(config, k) for k in ("penalty", "beta", "tau", "average")}
        scores = HeadScores.of(
            ranked(torch.stack(trainer.history), config.average), model, "rlkv", sink=config.sink, recent=config.recent, data=data,
            seed=config.seed, commit=commit, name=name, extra={"steps": trainer.state.global_step} | about,
        )  # fmt: skip
        if main:
            scores.save_pretrained(output)
            write_text(output / "summary.json", json.dumps(_summary(output, step, time.perf_counter() - started, device), indent=1) + "\n")
        trainer.accelerator.wait_for_everyone()
        return scores
    finally:
        disable_gates(model)


def _trainer(
    model: Any, tokenizer: Any, gates: Any, problems: Sequence[Sample], reward: Reward, config: TrainConfig, output: Path, device: Any
) -> GateTrainer:
    def verified(completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float]:
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = [float(reward(problems[i], text)) for i, text in zip(index, texts, strict=True)]
        if not all(map(math.isfinite, rewards)):
            raise NotFiniteError(f"The reward returned {next(r for r in rewards if not math.isfinite(r))}; it must return finite numbers.")
        return rewards

    from accelerate import PartialState

    cpu = device.type == "cpu"
    args = arguments(config, output, PartialState(cpu=cpu).num_processes, cpu)
    order = schedule(len(problems), config.steps, config.questions, config.seed)
    rows = [{"prompt": message(problems[i], config.chat), "index": i} for i in order]
    trainer = GateTrainer(
        gates, config, make_engine(model, tokenizer, config.rollout_batch),
        model=model, args=args, train_dataset=Dataset.from_list(rows), reward_funcs=[verified], processing_class=tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _claim(output: Path, config: TrainConfig, resume: bool) -> None:
    """Make the folder this run's own."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "config.json"
    if file.exists():
        if not resume:
            raise CacheStateError(f"{output} holds a run already; go on with --resume, or give another folder.")
        if file.read_text("utf-8") != config.to_json():
            raise CacheStateError(f"{output} holds a run with another configuration (config.json); give that one, or another folder.")
    shutil.rmtree(output / "partial", ignore_errors=True)
    write_text(file, config.to_json())


def _summary(output: Path, resumed: int, seconds: float, device: torch.device) -> dict[str, Any]:
    with (output / "log.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) > resumed]
    total = {name: sum(float(row[name]) for row in rows) for name in ("rollout_tokens", "rollout_seconds", "step_seconds")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "steps": len(rows),
        "seconds": round(seconds, 1),
        "tokens_generated": int(total["rollout_tokens"]),
        "tokens_per_second_of_rollout": round(total["rollout_tokens"] / total["rollout_seconds"], 1) if rows else None,
        "rollout_share": round(total["rollout_seconds"] / total["step_seconds"], 3) if rows else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
