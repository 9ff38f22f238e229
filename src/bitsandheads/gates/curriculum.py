"""Self-distillation sampling (RLKV, arXiv 2510.08525): the problems that the model itself solves greedily, spread over output lengths."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FileFormatError, PlanError
from ..tasks import Sample
from .problems import Reward, write_problems
from .rollout import RolloutEngine


@dataclass(frozen=True)
class Spread:
    """How many problems of which output length. The defaults are the paper's: 3,000 problems of up to 8k tokens.

    Attributes:
        edges: upper ends of the bins, in output tokens, growing; the last one is also the most tokens that are generated.
        counts: problems of each bin.
    Raises:
        PlanError: other lengths than that.
    """

    edges: tuple[int, ...] = (2048, 4096, 6144, 8192)
    counts: tuple[int, ...] = (600, 600, 1000, 800)

    def __post_init__(self) -> None:
        if not self.edges or len(self.edges) != len(self.counts) or list(self.edges) != sorted(set(self.edges)) or min(self.counts) < 0:
            raise PlanError(f"Edges {self.edges} and counts {self.counts}: give growing edges and a count for each of them.")

    def bin(self, tokens: int) -> int:
        """The bin of an output of so many tokens."""
        return next((i for i, edge in enumerate(self.edges) if tokens <= edge), len(self.edges) - 1)


def build(
    engine: RolloutEngine,
    encode: Callable[[Sample], list[int]],
    decode: Callable[[list[int]], str],
    reward: Reward,
    problems: Sequence[Sample],
    output: Path,
    spread: Spread,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Solve the problems greedily and write those that are solved (reward at least 1) to `output`, so many of each length.

    Results are kept beside the output, in OUTPUT.partial, after each batch; a second call goes on behind them. The file goes when
    the output is written. Each problem gets the fields "output_tokens" and "output".

    Args:
        engine: of the model without gates, or with all of them 1.
        encode: prompt tokens of a problem.
        decode: text of generated tokens.
        reward: see problems.get_reward.
        problems: their ids must differ.
        output: JSON lines, see problems.read_problems.
        spread: how many of which length.
        seed: of the choice where a bin has more problems than are asked for.
        progress: called with (problems done, solved) after each batch.
    Returns:
        the number of problems written, by bin. Fewer than asked for where the model does not solve more.
    Raises:
        FileFormatError: OUTPUT.partial belongs to another run.
    """
    if len({p.id for p in problems}) != len(problems):
        raise FileFormatError("Two problems have the same id; give each its own.")
    partial = output.with_name(output.name + ".partial")
    header = {"problems": len(problems), "first": problems[0].id, "last": problems[-1].id, "edges": list(spread.edges)}
    done = _read_partial(partial, header)
    todo = [p for p in problems if p.id not in done]
    solved = sum(row["reward"] >= 1 for row in done.values())
    with partial.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            file.write(json.dumps(header) + "\n")
        for start in range(0, len(todo), engine.batch):
            batch = todo[start : start + engine.batch]
            out = engine.generate([encode(p) for p in batch], spread.edges[-1], temperature=0.0)
            for problem, tokens in zip(batch, out.tokens, strict=True):
                text = decode(tokens)
                value = float(reward(problem, text))
                solved += value >= 1
                row: dict[str, Any] = {"id": problem.id, "reward": value, "output_tokens": len(tokens), "output": text}
                done[problem.id] = row
                file.write(json.dumps(row) + "\n")
            file.flush()
            if progress is not None:
                progress(len(done), solved)
    bins: list[list[Sample]] = [[] for _ in spread.edges]
    order = list(problems)
    random.Random(seed).shuffle(order)
    for problem in order:
        row = done[problem.id]
        place = spread.bin(row["output_tokens"])
        if row["reward"] >= 1 and len(bins[place]) < spread.counts[place]:
            bins[place].append(problem)
    chosen = [p for b in bins for p in b]
    write_problems(output, chosen, ({k: done[p.id][k] for k in ("output_tokens", "output")} for p in chosen))
    partial.unlink()
    return [len(b) for b in bins]


def _read_partial(path: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of a run that was cut short; a last line that was not finished is cut off."""
    if not path.exists():
        return {}
    text = path.read_text("utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, "utf-8")
    lines = whole.splitlines()
    if lines and json.loads(lines[0]) != header:
        raise FileFormatError(f"{path} belongs to a run over other problems or lengths; remove it, or give another output.")
    return {row["id"]: row for row in map(json.loads, lines[1:])}
