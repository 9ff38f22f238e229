"""`bitsandheads eval`: tasks from rows, their scores, and runs from the command line, without the network."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import make
from tiny_texts import byte_tokenizer, saved_model
from typer.testing import CliRunner

import bitsandheads as bh
from bitsandheads.cli import app
from bitsandheads.errors import TaskError
from bitsandheads.eval import benchmarks, fidelity
from bitsandheads.eval.benchmarks import BENCHMARKS, Options, get_task
from bitsandheads.eval.environment import default_text
from bitsandheads.eval.programs import code_of, passes
from bitsandheads.eval.runs import read_records
from bitsandheads.evaluation import sampling_of, whole_numbers

ROWS = {
    "gsm8k": {"question": "2 + 1000?", "answer": "Two and a thousand <<2+1000=1002>>.\n#### 1,002"},
    "math-500": {"problem": "Half of 1?", "solution": "", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "test/a/1.json"},
    "aime24": {"id": 60, "problem": "What?", "answer": "204", "solution": "", "url": "", "year": "2024"},
    "aime25": {"id": "0", "problem": "What?", "answer": "70"},
    "mbpp": {"task_id": 11, "text": "Write f that doubles.", "code": "", "test_list": ["assert f(2) == 4", "assert f(0) == 0"],
             "test_setup_code": "import math", "challenge_test_list": []},
    "longreason-8k": {"example_idx": "7", "prompt": "Long text. Which?\nA. x\nB. y", "answer": "B", "question": "", "background": "",
                      "final_inquiry": "", "analysis": ""},
}  # fmt: skip
RIGHT = {
    "gsm8k": ["It is \\boxed{1002}.", "<think>\\boxed{7}</think>So \\boxed{1,002}"],
    "math-500": ["\\boxed{0.5}", "\\boxed{\\frac12}", "The answer is $\\boxed{\\dfrac{1}{2}}$"],
    "aime24": ["\\boxed{204}"],
    "aime25": ["\\boxed{070}"],
    "mbpp": [
        "```python\ndef f(x):\n    return 2 * x\n```",
        "def f(x): return x + x",
        "<think>```python\nf = 1\n```</think>\n```\nf = lambda x: 2*x",
    ],
    "longreason-8k": ["\\boxed{B}", "\\boxed{\\text{B}}", "\\boxed{(B) y}", "A or B? I say B."],
}
WRONG = {
    "gsm8k": ["\\boxed{1003}", "", "<think>\\boxed{1002}</think>So \\boxed{7}"],
    "math-500": ["\\boxed{2}", "no idea"],
    "aime24": ["\\boxed{20}"],
    "aime25": ["\\boxed{7}"],
    "mbpp": ["```python\ndef f(x):\n    return x\n```", "", "def f(x) return", "import sys; sys.exit(0)", "while True: pass"],
    "longreason-8k": ["\\boxed{A}", "A BAD day", ""],
}


def write_rows(path: Path, name: str, rows: list | None = None) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows or [ROWS[name]]))
    return f"{name}={path}"


# -- tasks --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_rows_and_scores(name, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "passes", lambda program: passes(program, seconds=2))
    task = get_task(write_rows(tmp_path / "rows.jsonl", name), None, Options(chat=True))
    (sample,) = task.samples
    assert (task.name, task.chat, task.max_new_tokens) == (name, True, BENCHMARKS[name].max_new_tokens)
    assert {o: task.score(sample, o) for o in RIGHT[name]} == dict.fromkeys(RIGHT[name], 1.0)
    assert {o: task.score(sample, o) for o in WRONG[name]} == dict.fromkeys(WRONG[name], 0.0)


def test_fields_of_the_samples(tmp_path):
    sample = {n: get_task(write_rows(tmp_path / "rows.jsonl", n), None, Options()).samples[0] for n in ROWS}
    assert (sample["gsm8k"].answer, sample["math-500"].kind, sample["math-500"].level) == ("1002", "Algebra", 2)
    assert all("\\boxed{}" in sample[n].prompt for n in ROWS if n != "mbpp")
    assert "assert f(2) == 4" in sample["mbpp"].prompt and sample["mbpp"].answer.startswith("import math\n")


def test_what_a_task_refuses(tmp_path):
    with pytest.raises(TaskError, match="no task 'gsm9k'"):
        get_task("gsm9k", None, Options())
    with pytest.raises(TaskError, match="no file"):
        get_task("gsm8k=nothing.jsonl", None, Options())
    with pytest.raises(TaskError, match="has no field 'answer'; it has 'question'"):
        get_task(write_rows(tmp_path / "a.jsonl", "gsm8k", [{"question": "?"}]), None, Options())
    (tmp_path / "b.jsonl").write_text("{")
    with pytest.raises(TaskError, match="line 1 is no JSON"):
        get_task(f"gsm8k={tmp_path / 'b.jsonl'}", None, Options())
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(TaskError, match="is empty"):
        get_task(f"gsm8k={tmp_path / 'c.jsonl'}", None, Options())
    with pytest.raises(TaskError, match="needs a text of"):
        get_task("needle", byte_tokenizer(), Options(contexts=(100_000,), text="short"))


def test_rows_from_the_hub(monkeypatch):
    import datasets

    def load(repository, config, split):
        assert (repository, config, split) == ("openai/gsm8k", "main", "test")
        return datasets.Dataset.from_list([ROWS["gsm8k"]] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(get_task("gsm8k", None, Options(samples=2)).samples) == 2
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(TaskError, match=r"ConnectionError: offline.*NAME=FILE"):
        get_task("gsm8k", None, Options())


def test_needles_lie_where_they_say():
    tok = byte_tokenizer()
    task = get_task("needle", tok, Options(samples=2, contexts=(600, 1200), text=default_text()))
    assert len(task.samples) == 2 * 2 * 5
    for s in task.samples:
        depth = float(s.kind.rstrip("%")) / 100
        body = s.prompt[s.prompt.index("\n\n") : s.prompt.index("\n\nWhat is")]
        assert abs(body.index(s.answer) / len(body) - depth) < 0.35
        assert abs(len(tok(s.prompt).input_ids) - s.level) < 20
        assert s.prompt.count(s.answer) == 1
        assert task.score(s, f" {s.answer}.") == 1 and task.score(s, f" 1{s.answer}") == 0 and task.score(s, "none") == 0
    assert task.samples[0].prompt.index(task.samples[0].answer) < task.samples[9].prompt.index(task.samples[9].answer)


# -- programs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "right"),
    [
        ("print('x' * 10**6)", True),
        ("assert False", False),
        ("import os; os._exit(0)", False),
        ("x = bytearray(2 * 10**9)", False),
        ("open('file', 'w').write('x' * 10**6)", False),
        ("input()", False),
        ("import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])", True),
    ],
)
def test_limits_of_programs(program, right):
    assert passes(program, seconds=5) is right


def test_time_of_programs():
    started = time.monotonic()
    assert not passes("import time; time.sleep(60)", seconds=1)
    assert time.monotonic() - started < 10


def test_code_of_an_answer():
    assert code_of("```python\na\n```\nbetter:\n```py\nb\n```") == "b\n"
    assert code_of("x = 1") == "x = 1"


# -- settings -----------------------------------------------------------------------------------------------------------------


def test_sampling():
    model = make("qwen3")
    assert sampling_of("auto", model) is None
    model.generation_config.do_sample = True
    assert sampling_of("auto", model) == {} and sampling_of("greedy", model) is None
    assert sampling_of("temperature=0.6, top_k=20", model) == {"temperature": 0.6, "top_k": 20}
    for wrong in ("warm", "temperature=hot", "heat=1", ""):
        with pytest.raises(TaskError, match="The sampling is"):
            sampling_of(wrong, model)


def test_whole_numbers():
    assert whole_numbers("The seeds", ["0", 3, "0"]) == (0, 3)
    for wrong in ([], ["-1"], ["x"]):
        with pytest.raises(TaskError, match="The seeds are"):
            whole_numbers("The seeds", wrong)


# -- whole runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved_model(tmp_path_factory.mktemp("model"), chat=True)


def call(*arguments: str):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=True)


def test_a_run_from_the_command_line(folder, tmp_path):
    rows = [ROWS["gsm8k"] | {"question": f"{i} + 2?"} for i in range(3)]
    arguments = [
        "--model", folder, "--tasks", "fidelity,needle," + write_rows(tmp_path / "rows.jsonl", "gsm8k", rows), "--plans", "bf16,kivi-2",
        "--samples", 2, "--contexts", "300", "--max-new-tokens", 5, "--output", tmp_path / "run", "--seeds", "0,1", "--sampling", "temperature=1",
    ]  # fmt: skip
    done = call(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    for part in ("Fidelity on long text", "kivi-2", "inside", "gsm8k"):
        assert part in done.output
    records = read_records(tmp_path / "run")
    assert len(records) == 2 * 2 + 2 * 2 * (10 + 2)
    assert {r["prompt"] for r in records if r["task"] == "gsm8k"} == {f"{i} + 2?{benchmarks.BOXED}" for i in range(2)}
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    config, facts = about["config"], about["facts"]["plans"]
    assert facts["bf16"]["bytes"]["512"] == 512 * 2 * 2 * 2 * 64 * 2 > facts["kivi-2"]["bytes"]["512"]  # tokens, layers, K and V, heads
    assert config["chat"] is True and config["sampling"] == {"temperature": 1.0} and set(config["plans"]) == {"bf16", "kivi-2"}
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert call(*arguments).exit_code == 0
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before
    write_rows(tmp_path / "rows.jsonl", "gsm8k", rows[::-1])
    refused = call(*arguments)
    assert isinstance(refused.exception, bh.BitsAndHeadsError) and "files was" in str(refused.exception)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "0,1"], "Greedy answers are the same"),
        (["--max-new-tokens", "5000"], "4096 positions"),
        (["--plans", "bf17"], "did you mean 'bf16'"),
        (["--tasks", "fidelity", "--contexts", "9999999"], "Give a longer text"),
        (["--tasks", "fidelity", "--contexts", "0"], "contexts of (0,) tokens"),
        (["--tasks", ""], "There are 0 tasks"),
        (["--text", "nothing.txt"], "nothing.txt cannot be read as text"),
        (["--device", "abacus"], "no device 'abacus' here"),
    ],
)
def test_a_run_that_cannot_be(folder, tmp_path, more, message):
    done = call("--model", folder, "--tasks", "needle", "--contexts", "300", "--samples", 1, "--output", tmp_path / "run", *more)
    assert isinstance(done.exception, bh.BitsAndHeadsError) and message in str(done.exception)


def test_fidelity_of_the_same_cache_is_perfect(folder, tmp_path):
    done = call(
        "--model", folder, "--tasks", "fidelity", "--plans", "bf16", "--samples", 1, "--contexts", "64", "--output", tmp_path / "run"
    )
    assert done.exit_code == 0, done.exception
    (record,) = read_records(tmp_path / "run")
    assert record["kl"] < 1e-3 and record["top1"] > 0.99  # whole tokens are kept in bfloat16, the model computes in float32
    (row,) = fidelity.summarise([record])
    assert row["plan"] == "bf16" and "kl_over_kivi2" not in row


# -- kill -9 ------------------------------------------------------------------------------------------------------------------

UNSTABLE = ("seconds", "peak_bytes")


def killed_run(arguments: list[str], run: Path, random_seconds: float) -> None:
    """Start the command, kill it after a random time from its first record on, then let it finish."""
    child = subprocess.Popen([sys.executable, "-m", "bitsandheads", "eval", *arguments, "--output", str(run)], stdout=subprocess.DEVNULL)
    records = run / "records.jsonl"
    while child.poll() is None and not (records.is_file() and records.stat().st_size):
        time.sleep(0.01)
    time.sleep(random_seconds)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert call(*arguments, "--output", run).exit_code == 0


def test_a_killed_run_ends_with_the_records_of_an_uninterrupted_one(folder, tmp_path):
    arguments = ["--model", str(folder), "--tasks", "needle", "--contexts", "300", "--samples", "1", "--plans", "bf16,kivi-2", "--max-new-tokens", "8",
                 "--batch-size", "2", "--sampling", "temperature=2", "--seeds", "0,1"]  # fmt: skip
    assert call(*arguments, "--output", tmp_path / "whole").exit_code == 0
    stable = lambda path: [{k: v for k, v in r.items() if k not in UNSTABLE} for r in read_records(path)]  # noqa: E731
    whole = stable(tmp_path / "whole")
    assert len(whole) == 2 * 2 * 5
    killed_run(arguments, tmp_path / "cut", random.uniform(0, 0.5))
    assert stable(tmp_path / "cut") == whole
