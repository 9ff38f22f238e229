"""Training of the gates: a planted head, resuming after a kill, two processes, rewards that raise."""

import csv
import multiprocessing
import os
import signal
import socket
from dataclasses import replace

import planted
import pytest
import torch

from bitsandheads.errors import BackendError, CacheStateError, NotFiniteError
from bitsandheads.gates.config import TrainConfig
from bitsandheads.gates.trainer import GateTrainer, checkpoints, penalty_weight, ranked
from bitsandheads.gates.training import histogram, schedule, train
from bitsandheads.scores import HeadScores

CONFIG = TrainConfig(
    sink=planted.SINK, recent=planted.RECENT, steps=16, questions=16, samples=4, learning_rate=0.07, max_new_tokens=4, chat=False,
    micro_batch=32, rollout_batch=64, gradient_checkpointing=False, save_every=2,
)  # fmt: skip


def run(folder, config=CONFIG, reward=planted.score, **more):
    return train(planted.model(), planted.tokenizer(), planted.problems(64, 3), reward, config, folder, say=lambda _: None, **more)


def forked(function, *args):
    """Run in a child process that inherits all that is imported and trained; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(100)
    return process.exitcode


def test_the_gate_that_the_task_needs_stays_and_the_others_fall(tmp_path):
    scores = run(tmp_path)
    others = [v for i, row in enumerate(scores.values) for j, v in enumerate(row) if (i, j) != planted.HEAD]
    assert scores.values[planted.HEAD] > 0.4 and max(others) < 0.1
    assert HeadScores.from_pretrained(tmp_path) == scores and scores.method == "rlkv" and scores.seed == 0
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, 17))
    assert all(float(r["logprob_distance"]) < 1e-5 for r in rows), "the rollout's log-probabilities are the trainer's own"
    assert float(rows[0]["reward"]) == 1 and float(rows[0]["output_tokens"]) == 2
    assert float(rows[0]["gates_mean"]) == pytest.approx(0.93, abs=0.002) and float(rows[-1]["gate_1_0"]) > 0.4
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-14", "checkpoint-16"] and not (tmp_path / "partial").exists()


def test_scores_are_the_last_gates_or_their_mean_and_never_tie_at_zero():
    history = torch.tensor([[[0.9, 0.9, 0.9]], [[0.8, 0.3, 0.4]], [[0.7, 0.0, 0.0]], [[0.9, 0.0, 0.0]]])
    assert ranked(history, 1).tolist() == [[pytest.approx(0.9), pytest.approx(0.3 - 1), pytest.approx(0.325 - 1)]]
    assert ranked(history, 3).tolist() == [[pytest.approx(0.8), pytest.approx(0.1), pytest.approx(0.4 / 3)]]
    assert ranked(history[:1], 20).tolist() == history[0].tolist(), "a run of fewer steps"


def test_a_killed_run_resumes_to_the_same_scores(tmp_path):
    config = replace(CONFIG, steps=7, temperature=1.5, average=5)  # two epochs of the schedule, and mixed rewards
    expected = run(tmp_path / "whole", config)
    calls = []

    def deadly(sample, output):
        calls.append(1)
        if len(calls) > 64 * 5:  # in the sixth step; checkpoint-4 is the newest
            os.kill(os.getpid(), signal.SIGKILL)
        return planted.score(sample, output)

    assert forked(run, tmp_path / "killed", config, deadly) == -signal.SIGKILL
    assert [p.name for p in checkpoints(tmp_path / "killed")] == ["checkpoint-2", "checkpoint-4"]
    (tmp_path / "killed" / "partial").mkdir()
    with pytest.raises(CacheStateError, match="--resume"):
        run(tmp_path / "killed", config)
    with pytest.raises(CacheStateError, match="another configuration"):
        run(tmp_path / "killed", replace(config, beta=0.5), resume=True)
    again = run(tmp_path / "killed", config, resume=True)
    assert again.values.tolist() == expected.values.tolist()
    assert (again.values < 1).all()
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "killed")]
    assert [[r["step"], r["reward"], r["gate_1_0"]] for r in logs[0]] == [[r["step"], r["reward"], r["gate_1_0"]] for r in logs[1]]
    assert len({r["reward"] for r in logs[0]}) > 1


def _one_of_two(rank, port, folder):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true", "LOCAL_WORLD_SIZE": "2"}
    scores = run(folder, replace(CONFIG, steps=12, micro_batch=16, learning_rate=0.09))
    assert torch.distributed.get_world_size() == 2
    (folder / f"rank{rank}.txt").write_text(scores.to_text())


def test_two_processes_train_the_same_gates(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("fork")
    planted.model()
    processes = [context.Process(target=_one_of_two, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [p.exitcode for p in processes] == [0, 0]
    first, second = ((tmp_path / f"rank{rank}.txt").read_text() for rank in range(2))
    assert first == second
    scores = HeadScores.from_pretrained(tmp_path)
    assert scores.to_text() == first
    assert scores.values[planted.HEAD] == scores.values.max() and scores.values[planted.HEAD] > 0.4
    with (tmp_path / "log.csv").open() as file:
        assert float(next(csv.DictReader(file))["rollout_tokens"]) == 128, "both processes' tokens are counted"


def test_a_reward_that_raises_or_is_nan_stops_the_run(tmp_path):
    def broken(sample, output):
        raise ZeroDivisionError("reward")

    with pytest.raises(ZeroDivisionError, match="reward"):
        run(tmp_path / "a", reward=broken)
    assert not (tmp_path / "a" / "head_scores.tsv").exists()
    with pytest.raises(NotFiniteError, match="nan"):
        run(tmp_path / "b", reward=lambda sample, output: float("nan"))


def test_the_penalty_is_the_papers():
    groups = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.75, 0.75])
    own = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.5])
    e = torch.e
    paper = (2 * (e - 1) + 0 + 2 * (torch.tensor(0.75).exp().item() - 1)) / 6
    assert penalty_weight(TrainConfig(beta=2.0), groups, own).item() == pytest.approx(2 * paper)
    release = torch.tensor(0.75).exp().item() - 1
    assert penalty_weight(TrainConfig(beta=2.0, penalty="micro_batch"), groups, own).item() == pytest.approx(2 * release)
    assert penalty_weight(TrainConfig(beta=2.0, penalty="micro_batch", tau=0.8), groups, own).item() == 0
    assert penalty_weight(TrainConfig(beta=2.0, penalty="constant"), groups, own).item() == pytest.approx(2 * (e - 1))


def test_sharding_backends_are_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator, DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises((BackendError, ValueError)):
        run(tmp_path)


def test_a_run_stops_when_its_time_is_over(tmp_path):
    scores = run(tmp_path, replace(CONFIG, seconds=0.001))
    assert scores.extra["steps"] == 1 and 0.9 < scores.values.min() < 0.94


def test_schedule_and_histogram():
    order = schedule(5, 4, 3, 0)
    assert len(order) == 12 and sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order != schedule(5, 4, 3, 1)
    assert histogram(torch.tensor([0.0, 0.05, 1.0, 1.0, 1.0, 0.55])) == "▇    ▅   █"


def test_command_line(tmp_path):
    import yaml
    from typer.testing import CliRunner

    from bitsandheads.cli import app

    planted.model().save_pretrained(tmp_path / "model")
    planted.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{p.prompt}", "answer": "{p.answer}"}}\n' for p in planted.problems(32, 3)))
    small = {"questions": 8, "samples": 2, "micro_batch": 8, "rollout_batch": 16, "max_new_tokens": 4, "sink": 1, "recent": 4}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(small | {"chat": False, "reward": "planted:score", "gradient_checkpointing": False}))

    def call(*args):
        result = CliRunner().invoke(app, ["heads", *map(str, args)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    model = ("--model", tmp_path / "model")
    problems = tmp_path / "solved.jsonl"
    said = call("curriculum", *model, "--problems", tmp_path / "p.jsonl", "--output", problems, "--edges", "2,4", "--counts", "20,5",
                "--reward", "planted:score", "--no-chat")  # fmt: skip
    assert "20 problems" in said and len(problems.read_text().splitlines()) == 20
    common = (*model, "--problems", problems, "--output", tmp_path / "run", "--config", tmp_path / "c.yaml", "--steps", "2")
    assert "cache" in call("train", *common, "--dry-run") and not (tmp_path / "run").exists()
    said = call("train", *common)
    assert "step 2/2" in said and "sparsity" in said and "tokens/s" in said
    found = HeadScores.from_pretrained(tmp_path / "run")
    assert found.seed == 0 and found.model == str(tmp_path / "model")
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    (tmp_path / "text.txt").write_text("!uvwxyz?abcd" * 40)
    (tmp_path / "d.yaml").write_text("{length: 48, passkeys: 2, passkey_tokens: 6, cue: 2, sink: 1, recent: 4}")
    call(
        "distill",
        *model,
        "--text",
        tmp_path / "text.txt",
        "--config",
        tmp_path / "d.yaml",
        "--steps",
        "3",
        "--output",
        tmp_path / "duo.tsv",
    )
    assert HeadScores.read(tmp_path / "duo.tsv").method == "duo"


def test_the_trainer_adds_the_penalty_to_trls_loss(tmp_path, monkeypatch):
    """With every reward 1 the advantages are 0, so the gradient is the penalty's alone."""
    seen = []
    original = GateTrainer._compute_loss

    def spy(self, model, inputs):
        loss = original(self, model, inputs)
        seen.append((loss.item(), self.current_gradient_accumulation_steps))
        return loss

    monkeypatch.setattr(GateTrainer, "_compute_loss", spy)
    run(tmp_path, replace(CONFIG, steps=1, beta=0.25), reward=lambda sample, output: 1.0)
    assert [n for _, n in seen] == [2, 2]
    assert [loss for loss, _ in seen] == pytest.approx([0.25 * (torch.e - 1) / 2] * 2, rel=1e-4)


def test_training_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    import sys

    from typer.testing import CliRunner

    from bitsandheads.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.delitem(sys.modules, "bitsandheads.gates.training")
    monkeypatch.delitem(sys.modules, "bitsandheads.gates.trainer")
    result = CliRunner().invoke(app, ["heads", "train", "--model", "m", "--problems", str(tmp_path / "p.jsonl"), "--output", str(tmp_path)])
    assert isinstance(result.exception, BackendError) and "bitsandheads[train]" in str(result.exception)
