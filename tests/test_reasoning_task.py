"""Generated reasoning problems: right solutions, disjoint splits, the same samples for the same seed."""

import re

import pytest

from bitsandheads.errors import TaskError
from bitsandheads.tasks import reasoning

RECENT = 128  # the larger of the two windows of the papers


def solve(sample) -> str:
    """The answer, computed from the prompt alone by other means than the generator's."""
    if sample.kind == "hops":
        hops, node = re.match(r"hop (\d\d),(\w\d);", sample.prompt).groups()
        follow = dict(re.findall(r"(\w\d)>(\w\d);", sample.prompt))
        for _ in range(int(hops)):
            node = follow[node]
        return node
    if sample.kind == "sum":
        digits = dict(re.findall(r"([a-y]\d)=(\d)", sample.prompt))
        top, operands = re.search(r"ask z(\d)=(.*):", sample.prompt).groups()
        numbers = [int("".join(digits[f"{o[0]}{i}"] for i in reversed(range(int(top))))) for o in operands.split("+")]
        return "".join(f"z{int(top) - i}={d}" for i, d in enumerate(f"{sum(numbers):0{int(top) + 1}d}"))
    defined = dict(re.findall(r"(\w\d)=([^;]*);", sample.prompt))

    def value(name: str) -> int:
        if name.isdigit():
            return int(name)
        parts = re.fullmatch(r"(\w\d)([-+*])(\w+)", defined[name])
        return int(defined[name]) if parts is None else eval(f"{value(parts[1])} {parts[2]} {value(parts[3])}") % 10

    return str(value(re.search(r"ask \w\d>(\w\d):", sample.prompt)[1]))


@pytest.mark.parametrize("kind", reasoning.KINDS)
def test_answers_are_right_and_solutions_end_in_them(kind):
    for sample in reasoning.samples("train", 60, seed=3, kinds=[kind]):
        assert solve(sample) == sample.answer
        assert sample.solution.endswith("#" + sample.answer)
        assert reasoning.score(sample, sample.solution) == 1.0
        assert reasoning.score(sample, sample.solution[:-1]) == 0.0
        assert reasoning.score(sample, sample.solution.replace("#", "")) == 0.0


def test_assign_solution_steps_are_the_facts_of_the_prompt():
    for sample in reasoning.samples("test", 20, kinds=["assign"]):
        for step in re.findall(r"(\w\d=\w\d[-+*]\w+),", sample.solution):
            assert step + ";" in sample.prompt


def test_same_arguments_same_samples_and_other_seeds_other_samples():
    first, again = (reasoning.samples("test", 30, seed=5) for _ in range(2))
    assert first == again
    assert not {s.id for s in first} & {s.id for s in reasoning.samples("test", 30, seed=6)}
    assert len({s.id for s in first}) == 30
    assert [(s.kind, s.level) for s in first[:4]] == [("assign", 0), ("hops", 0), ("sum", 0), ("assign", 1)]


def test_a_problem_is_in_the_split_of_its_hash_whatever_the_order_of_its_facts():
    for split in reasoning.SPLITS:
        assert {reasoning.split_of(s.id.rpartition("-")[2]) for s in reasoning.samples(split, 60, levels=[0])} == {split}
    facts = ["c3>f2;", "f2>k1;", "k1>c3;"]
    digest = reasoning.canonical_hash("hop 02,c3;", facts)
    assert digest == reasoning.canonical_hash("hop 02,c3;", facts[::-1]) != reasoning.canonical_hash("hop 03,c3;", facts)
    shares = [reasoning.split_of(f"{i:016x}") for i in range(80)]
    assert [shares.count(split) for split in reasoning.SPLITS] == [60, 10, 10]


def test_long_levels_reach_beyond_the_window():
    for sample in reasoning.samples("test", 30, levels=[3, 4]):
        prompt, solution = len(reasoning.encode(sample.prompt)), len(reasoning.encode(sample.solution))
        assert prompt > RECENT + 32 and solution > RECENT
        assert prompt + solution < 1088


def test_bad_arguments_are_named():
    with pytest.raises(TaskError, match="'dev'"):
        reasoning.samples("dev", 1)
    with pytest.raises(TaskError, match="level 7"):
        reasoning.samples("test", 1, levels=[7])
    with pytest.raises(TaskError, match="at least one"):
        reasoning.samples("test", 1, kinds=[])
    with pytest.raises(TaskError, match="not in the vocabulary"):
        reasoning.encode("let ä=3;")
