"""The training script on a CPU, at a scale at which nothing is learned: it goes on after a kill -9 and leaves a model that loads."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parents[1] / "training" / "tiny_reasoner.py"
OPTIONS = {"layers": 1, "hidden": 32, "mlp": 32, "q-heads": 2, "kv-heads": 1, "batch-tokens": 384, "workers": 1}
OPTIONS |= {"save-seconds": 0, "eval-seconds": 1, "eval-problems": 1, "test-problems": 3}


def log_rows(folder):
    log = folder / "training-log.csv"
    if not log.exists():
        return []
    with open(log) as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def test_training_goes_on_after_a_kill(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--output",
        str(tmp_path),
        "--no-compile",
        *(f"--{name}={value}" for name, value in OPTIONS.items()),
    ]
    first = subprocess.Popen([*command, "--minutes", "10"], start_new_session=True)
    deadline = time.monotonic() + 120
    while not ((tmp_path / "checkpoint.pt").exists() and log_rows(tmp_path)):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run([*command, "--minutes", "0.001"], check=True, timeout=120)
    rows = log_rows(tmp_path)
    assert int(rows[0]["step"]) >= 20 and rows[0]["accuracy"]
    with open(tmp_path / "evaluation.csv") as file:
        assert sum(int(row["n"]) for row in csv.DictReader(file)) == 3
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.num_hidden_layers == 1
    assert not (tmp_path / "checkpoint.pt").exists()
