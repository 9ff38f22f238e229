"""The tasks that `bitsandheads eval` knows by name: published benchmarks from the hub or a local file, needles, generated tasks."""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TaskError
from ..gates.problems import math_reward
from ..scores import read_text
from ..tasks import Sample, reasoning
from .programs import code_of, passes
from .tasks import Task

Row = Mapping[str, Any]
THINK_END = "</think>"


@dataclass(frozen=True)
class Options:
    """What a user may say about tasks.

    Attributes:
        samples: at most so many of each task (the first ones); of needles, so many for each depth and length. None: all, 3 needles.
        contexts: lengths in tokens, for needles.
        text: what needles are hidden in.
        max_new_tokens: None: the task's own.
        chat: prompts through the chat template.
    """

    samples: int | None = None
    contexts: tuple[int, ...] = (1024, 2048)
    text: str = ""
    max_new_tokens: int | None = None
    chat: bool = False


def answer_of(output: str) -> str:
    """What stands behind the thinking of a thinking model; all of it where there is none."""
    return output.rpartition(THINK_END)[2]


# -- published benchmarks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark's rows come from and what is made of them.

    Attributes:
        repository, config, split: on the hub.
        sample: (number of the row, row) -> sample. KeyError where a field is missing.
    """

    repository: str
    config: str | None
    split: str
    sample: Callable[[int, Row], Sample]
    score: Callable[[Sample, str], float]
    max_new_tokens: int

    def rows(self, file: Path | None) -> list[Row]:
        """Its rows: from a file of JSON lines of the same form, or from the hub.

        Raises:
            TaskError: the file, or the package datasets, is missing, or the hub does not give the rows.
        """
        if file is not None:
            return _read_lines(file)
        try:
            import datasets
        except ImportError as error:
            raise TaskError('Tasks from the hub need the package datasets: pip install "bitsandheads[eval]".') from error
        try:
            return list(datasets.load_dataset(self.repository, self.config, split=self.split))
        except Exception as error:  # the hub's client raises errors of many libraries
            raise TaskError(
                f"The hub did not give {self.repository} ({type(error).__name__}: {error}). Without the network, give the task a local file "
                "of JSON lines with the same fields: NAME=FILE."
            ) from error


def _read_lines(file: Path) -> list[Row]:
    if not file.is_file():
        raise TaskError(f"There is no file {file}. Give NAME=FILE with a file of JSON lines, or NAME alone for the hub's data.")
    rows = []
    for number, line in enumerate(read_text(file).splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise TaskError(f"{file}, line {number} is no JSON ({error}).") from error
    return rows


BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."


def _math_score(sample: Sample, output: str) -> float:
    return math_reward(sample, answer_of(output))


def _gsm8k(number: int, row: Row) -> Sample:
    return Sample(f"gsm8k-{number}", row["question"] + BOXED, row["answer"].rpartition("####")[2].strip().replace(",", ""))


def _math500(number: int, row: Row) -> Sample:
    return Sample(str(row["unique_id"]), row["problem"] + BOXED, row["answer"], str(row["subject"]), int(row["level"]))


def _aime(year: int) -> Callable[[int, Row], Sample]:
    return lambda number, row: Sample(f"aime{year}-{number}", row["problem"] + BOXED, str(row["answer"]))


def _mbpp(number: int, row: Row) -> Sample:
    tests = "\n".join(row["test_list"])
    prompt = (
        f"You are an expert Python programmer, and here is your task: {row['text']} Your code should pass these tests:\n\n{tests}\n\n"
        "Answer with the program in one block of Python code."
    )
    return Sample(f"mbpp-{row['task_id']}", prompt, f"{row['test_setup_code']}\n{tests}")


def _mbpp_score(sample: Sample, output: str) -> float:
    return float(passes(f"{code_of(answer_of(output))}\n{sample.answer}\n"))


def _long_reason(number: int, row: Row) -> Sample:
    letter = row["answer"].strip()[:1].upper()
    prompt = row["prompt"] + "\n\nReason step by step, and put the letter of the right option within \\boxed{}."
    return Sample(f"longreason-{row['example_idx']}", prompt, letter)


def _letter_score(sample: Sample, output: str) -> float:
    """The letter in the last box, with or without \\text{} and brackets; without a box the last letter that stands alone."""
    text = answer_of(output)
    found = re.findall(r"\\boxed\{\W*(?:\\text\{)?\W*([A-Z])\b", text) or re.findall(r"\b([A-H])\b", text)
    return float(bool(found) and found[-1] == sample.answer)


BENCHMARKS = {
    "gsm8k": Benchmark("openai/gsm8k", "main", "test", _gsm8k, _math_score, 2048),
    "math-500": Benchmark("HuggingFaceH4/MATH-500", None, "test", _math500, _math_score, 16384),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", None, "train", _aime(24), _math_score, 32768),
    "aime25": Benchmark("math-ai/aime25", None, "test", _aime(25), _math_score, 32768),
    "mbpp": Benchmark("google-research-datasets/mbpp", "full", "test", _mbpp, _mbpp_score, 8192),
} | {
    f"longreason-{k}": Benchmark("lz1bytedance/LongReason", None, k, _long_reason, _letter_score, 8192)
    for k in ("8k", "16k", "32k", "64k", "128k")
}


def _published(name: str, file: Path | None, options: Options) -> Task:
    benchmark = BENCHMARKS[name]
    rows = benchmark.rows(file)[: options.samples]
    if not rows:
        raise TaskError(f"Task {name!r} has no rows: {file or benchmark.repository} is empty.")
    samples = []
    for number, row in enumerate(rows):
        try:
            samples.append(benchmark.sample(number, row))
        except KeyError as error:
            raise TaskError(f"Row {number} of task {name!r} has no field {error}; it has {', '.join(map(repr, row))}.") from error
    return Task(name, samples, benchmark.score, options.max_new_tokens or benchmark.max_new_tokens, options.chat)


# -- needles ------------------------------------------------------------------------------------------------------------------

CITIES = ("Bilbao", "Cusco", "Dakar", "Fukuoka", "Graz", "Hobart", "Izmir", "Jaipur", "Lagos", "Nantes", "Osaka", "Porto", "Quito", "Riga")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def needles(tokenizer: Any, options: Options) -> Task:
    """A number somewhere in a long text, asked for at the end (needle in a haystack). kind: depth in percent; level: tokens.

    The prompt is one text with the beginning of the answer and goes through no chat template, so that models of every kind are
    asked alike.

    Raises:
        TaskError: the text is shorter than the longest context.
    """
    ids = tokenizer(options.text, add_special_tokens=False).input_ids
    samples = []
    for context in options.contexts:
        rng = random.Random(context)
        for depth in DEPTHS:
            for number in range(3 if options.samples is None else options.samples):
                samples.append(_needle(tokenizer, ids, context, depth, number, rng))
    return Task("needle", samples, _needle_score, options.max_new_tokens or 16)


def _needle(tokenizer: Any, ids: list[int], context: int, depth: float, number: int, rng: random.Random) -> Sample:
    city, secret = rng.choice(CITIES), str(rng.randrange(10_000, 100_000))
    needle = f" The special number of {city} is {secret}. Remember it."
    head = "There is a special number hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
    tail = f"\n\nWhat is the special number of {city}? The special number of {city} is"
    room = context - len(tokenizer(head + needle + tail).input_ids)
    if room < 16 or len(ids) < room:
        raise TaskError(f"A needle in {context} tokens needs a text of 16 to {room} tokens; it has {len(ids)}. Give a longer --text.")
    start = rng.randrange(len(ids) - room + 1)
    text = tokenizer.decode(ids[start : start + room])
    ends = [0, *(m.end() for m in re.finditer(r"[.!?](?=\s)", text)), len(text)]
    at = min(ends, key=lambda e: abs(e - depth * len(text)))
    prompt = head + text[:at] + needle + text[at:] + tail
    return Sample(f"needle-{context}-{depth:g}-{number}", prompt, secret, f"{depth:.0%}", context)


def _needle_score(sample: Sample, output: str) -> float:
    """The first number of the output."""
    found = re.search(r"\d+", output)
    return float(found is not None and found.group() == sample.answer)


# -- by name ------------------------------------------------------------------------------------------------------------------


def _reasoning(options: Options) -> Task:
    samples = reasoning.samples("test", 1000 if options.samples is None else options.samples)
    return Task("reasoning", samples, reasoning.score, options.max_new_tokens or 1024)


def task_names() -> list[str]:
    """Every name that `get_task` knows."""
    return [*BENCHMARKS, "needle", "reasoning"]


def get_task(text: str, tokenizer: Any, options: Options) -> Task:
    """A task from NAME, or NAME=FILE for a benchmark with its rows in a local file of JSON lines.

    Raises:
        TaskError: no such task or file, rows without the fields that the task needs, or data that the hub does not give.
    """
    name, _, file = text.partition("=")
    if name in BENCHMARKS:
        return _published(name, Path(file) if file else None, options)
    if name not in task_names() or file:
        raise TaskError(f"There is no task {text!r}; choose from fidelity, {', '.join(task_names())} (NAME=FILE for those of the hub).")
    return needles(tokenizer, options) if name == "needle" else _reasoning(options)
