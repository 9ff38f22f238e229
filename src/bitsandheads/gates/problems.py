"""Problems with verifiable answers in files (JSON lines), and the rewards that verify them."""

import importlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, PlanError
from ..scores import read_text, write_text
from ..tasks import Sample, reasoning

Reward = Callable[[Sample, str], float]
FIELDS = {f.name for f in fields(Sample)}


def read_problems(source: str | Path) -> list[Sample]:
    """Read problems.

    Args:
        source: a file of JSON lines, each with "prompt" and "answer" and, as they are known, the other fields of `Sample` (further fields
            are ignored; without "id" it is the line's number), or "reasoning:SPLIT:N:SEED" for generated ones, for example
            "reasoning:train:3000:0".
    Raises:
        FileFormatError: no such file, no problems, or a line that is none.
    """
    name, *rest = str(source).split(":")
    if name == "reasoning" and len(rest) == 3 and rest[1].isdecimal() and rest[2].isdecimal():
        return reasoning.samples(rest[0], int(rest[1]), int(rest[2]))
    path = Path(source)
    if not path.is_file():
        raise FileFormatError(f'There are no problems {str(source)!r}; give a file of JSON lines, or "reasoning:train:3000:0".')
    out = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            out.append(Sample(**({"id": str(number)} | {k: v for k, v in row.items() if k in FIELDS} | {"answer": str(row["answer"])})))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FileFormatError(f'{path}, line {number} is no problem ({error!r}); give JSON with "prompt" and "answer".') from error
    if not out:
        raise FileFormatError(f"{path} holds no problems.")
    return out


def write_problems(path: str | Path, problems: Iterable[Sample], more: Iterable[dict[str, Any]]) -> None:
    """Write problems as JSON lines, whole or not at all; `more` holds further fields of each."""
    write_text(Path(path), "".join(json.dumps(asdict(p) | m, ensure_ascii=False) + "\n" for p, m in zip(problems, more, strict=True)))


# -- rewards ------------------------------------------------------------------------------------------------------------------------


def math_reward(sample: Sample, output: str) -> float:
    """1.0 if math-verify finds the output's answer (boxed, a fraction, with a unit...) equal to the problem's, else 0.0.

    Raises:
        FileFormatError: the problem's own answer cannot be understood. An output that cannot be understood is only wrong.
    """
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    gold = parse(f"\\boxed{{{sample.answer}}}", [LatexExtractionConfig(), ExprExtractionConfig()])
    if not gold:
        raise FileFormatError(f"The answer {sample.answer!r} of problem {sample.id} is nothing that math-verify understands.")
    found = parse(output, [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()])
    return float(bool(found) and verify(gold, found))


REWARDS: dict[str, Reward] = {"math": math_reward, "reasoning": reasoning.score}


def get_reward(name: str) -> Reward:
    """A reward by name: "math", "reasoning", or "module:function" for a function of (Sample, output text) that returns a number.

    Raises:
        PlanError: there is no such reward.
    """
    module, _, function = name.partition(":")
    if name in REWARDS:
        return REWARDS[name]
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise PlanError(f'There is no reward {name!r} ({error}); choose one of {", ".join(REWARDS)}, or "module:function".') from error
