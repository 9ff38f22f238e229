"""Verifiable problems whose written-out solution must look back further than a window of recent tokens.

Three kinds, each in the levels 0..4 of growing prompt and chain length:

- `assign`: variable assignments in shuffled order, modulo 10. `let c1=4;a7=f1+c1;f1=7;...ask f1>a7:` asks to start at f1 and to go on
  to the variable that is defined from the last one, until a7 is reached. A step copies a definition from the prompt, then both values
  (from the prompt or from an earlier step), then the result: `f1=7;a7=f1+c1,7+4,a7=1;#1`.
- `hops`: follow a shuffled map for a number of hops that the prompt names first. `hop 02,c3;f2>k1;c3>f2;...:` is solved by a countdown:
  `02c3;01f2;00k1;#k1`.
- `sum`: written addition, column by column, of some numbers out of a longer list. Every digit stands behind the name of its place:
  `sum k1=3k0=4;m1=0m0=9;...ask z2=k0+m0:` is 34 + 09 with result digits z0, z1, z2. A step copies a digit and writes the running total:
  `k0=4,04;m0=9,13;z0=3/k1=3,04;m1=0,04;z1=4/z2=0/#z2=0z1=4z0=3`.

The answer stands behind the last `#`. A problem belongs to the split that a hash of its canonical form (question and sorted facts) names,
so no problem of one split is ever in another, whatever the seed.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import TaskError
from . import Sample

KINDS = ("assign", "hops", "sum")
LEVELS = (0, 1, 2, 3, 4)
SPLITS = ("train", "validation", "test")
MARKER = "#"

NAMES = [letter + digit for letter in "abcdefghijklmnopqrstuvwxyz" for digit in "0123456789"]
VOCABULARY = ["<pad>", "<eos>", "let ", "hop ", "sum ", "ask ", *"0123456789=+-*>,;:/#", *NAMES]
PATTERN = r"[a-z]+ |[a-z][0-9]|."


@dataclass(frozen=True)
class _Problem:
    question: str
    facts: tuple[str, ...]
    prompt: str
    solution: str


# Ranges of a level, both ends included.
_ASSIGN = [((2, 4), (8, 12)), ((5, 9), (14, 24)), ((10, 16), (28, 40)), ((17, 26), (44, 60)), ((27, 40), (62, 84))]  # steps, facts
_HOPS = [((3, 6), (8, 12)), ((7, 15), (18, 30)), ((16, 35), (40, 60)), ((36, 60), (66, 96)), ((61, 99), (104, 140))]  # hops, nodes
_SUM = [  # digits, summands, numbers in the list
    ((2, 2), (2, 2), (3, 4)),
    ((3, 4), (2, 3), (4, 6)),
    ((5, 6), (3, 3), (6, 9)),
    ((7, 8), (4, 4), (9, 13)),
    ((9, 9), (5, 5), (13, 18)),
]


def _apply(a: int, op: str, b: int) -> int:
    return (a + b if op == "+" else a - b if op == "-" else a * b) % 10


def _assign(rng: random.Random, level: int) -> _Problem:
    (low, high), facts_range = _ASSIGN[level]
    steps, count = rng.randint(low, high), rng.randint(*facts_range)
    names = rng.sample(NAMES, count)
    main = min(steps + 1 + rng.randint(0, 3), count - 2)  # the chain goes on behind the target, so that only the question ends it
    chains = [names[:main]] + [[] for _ in range((count - main) // 6 + 1)]
    for name in names[main:]:
        chains[rng.randint(1, len(chains) - 1)].append(name)
    chains = [chain for chain in chains if chain]
    value = {chain[0]: rng.randint(0, 9) for chain in chains}
    starts = list(value)
    facts, solution = [f"{name}={v};" for name, v in value.items()], ""
    for chain in chains:
        for i in range(1, len(chain)):
            before, name, op = chain[i - 1], chain[i], rng.choice("+-*")
            draw = rng.random()
            if draw < 0.4:
                operand, b = str(b := rng.randint(1, 9)), b
            else:
                operand = rng.choice(starts) if draw < 0.6 or i < 3 else chain[rng.randint(0, i - 2)]
                b = value[operand]
            value[name] = _apply(value[before], op, b)
            facts.append(f"{name}={before}{op}{operand};")
            if chain is chains[0] and i <= steps:
                solution += f"{name}={before}{op}{operand},{value[before]}{op}{b},{name}={value[name]};"
    rng.shuffle(facts)
    start, target = names[0], names[steps]
    question = f"ask {start}>{target}:"
    return _Problem(question, tuple(facts), "let " + "".join(facts) + question, f"{start}={value[start]};{solution}{MARKER}{value[target]}")


def _hops(rng: random.Random, level: int) -> _Problem:
    hops_range, nodes_range = _HOPS[level]
    hops, nodes = rng.randint(*hops_range), rng.randint(*nodes_range)
    ring = rng.sample(NAMES, nodes)  # one cycle through all nodes, longer than the walk: no node is met twice
    facts = [f"{a}>{b};" for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
    rng.shuffle(facts)
    question = f"hop {hops:02d},{ring[0]};"
    solution = "".join(f"{hops - i:02d}{ring[i]};" for i in range(hops + 1))
    return _Problem(question, tuple(facts), question + "".join(facts) + ":", f"{solution}{MARKER}{ring[hops]}")


def _sum(rng: random.Random, level: int) -> _Problem:
    digits, summands, numbers = (rng.randint(*r) for r in _SUM[level])
    letters = rng.sample("abcdefghijklmnopqrstuvwxy", numbers)
    rows = {letter: [rng.randint(0, 9) for _ in range(digits)] for letter in letters}
    facts = ["".join(f"{k}{i}={row[i]}" for i in reversed(range(digits))) + ";" for k, row in rows.items()]
    chosen = rng.sample(letters, summands)
    question = f"ask z{digits}=" + "+".join(f"{k}0" for k in chosen) + ":"
    solution, total, result = "", 0, []
    for i in range(digits):
        for k in chosen:
            total += rows[k][i]
            solution += f"{k}{i}={rows[k][i]},{total:02d};"
        result.append(f"z{i}={total % 10}")
        solution += result[-1] + "/"
        total //= 10
    result.append(f"z{digits}={total}")
    return _Problem(
        question, tuple(facts), "sum " + "".join(facts) + question, f"{solution}{result[-1]}/{MARKER}{''.join(reversed(result))}"
    )


_MAKE: dict[str, Callable[[random.Random, int], _Problem]] = {"assign": _assign, "hops": _hops, "sum": _sum}


def canonical_hash(question: str, facts: Sequence[str]) -> str:
    """16 hexadecimal digits that name a problem, whatever the order of its facts."""
    return hashlib.blake2b((question + "".join(sorted(facts))).encode(), digest_size=8).hexdigest()


def split_of(digest: str) -> str:
    """The split of a problem: its hash modulo 8 decides, 0 test, 1 validation, else train."""
    return {0: "test", 1: "validation"}.get(int(digest, 16) % 8, "train")


def problem_stream(
    split: str, seed: int | str, choose: Callable[[random.Random], tuple[str, int]], repeats: bool = False
) -> Iterator[Sample]:
    """Endless samples of a split; `choose(rng)` says the kind and level of the next one.

    Args:
        split: "train", "validation" or "test".
        seed: the same seed and choices give the same samples.
        choose: called once for each sample with the stream's own random generator.
        repeats: whether a problem may come a second time (training does not keep a list of what it has seen).
    Raises:
        TaskError: unknown split, kind or level.
    """
    if split not in SPLITS:
        raise TaskError(f"There is no split {split!r} of the reasoning problems; choose one of {', '.join(SPLITS)}.")
    rng = random.Random(f"reasoning/{split}/{seed}")
    seen: set[str] = set()
    while True:
        kind, level = choose(rng)
        if kind not in KINDS or level not in LEVELS:
            raise TaskError(f"There are no reasoning problems of kind {kind!r} and level {level!r}; kinds {KINDS}, levels {LEVELS}.")
        while True:
            problem = _MAKE[kind](rng, level)
            digest = canonical_hash(problem.question, problem.facts)
            if split_of(digest) == split and digest not in seen:
                break
        if not repeats:
            seen.add(digest)
        answer = problem.solution.rpartition(MARKER)[2]
        yield Sample(f"{kind}-{level}-{digest}", problem.prompt, answer, kind, level, problem.solution)


def samples(split: str, n: int, seed: int = 0, levels: Sequence[int] = LEVELS, kinds: Sequence[str] = KINDS) -> list[Sample]:
    """`n` different problems of a split, the kinds and levels in turn, the same for the same arguments.

    Raises:
        TaskError: unknown split, kind or level, or none given.
    """
    cells = [(kind, level) for level in levels for kind in kinds]
    if not cells:
        raise TaskError("samples() was given no kind or no level; give at least one of each.")
    turn = iter(range(n))
    stream = problem_stream(split, seed, lambda _: cells[next(turn) % len(cells)])
    return [next(stream) for _ in range(n)]


def score(sample: Sample, output: str) -> float:
    """1.0 if the text behind the last `#` of `output` is exactly the answer, else 0.0."""
    return float(MARKER in output and output.rpartition(MARKER)[2].strip() == sample.answer)


def encode(text: str) -> list[int]:
    """Token ids of a prompt or solution, as the tokenizer of the tiny reasoner gives them, only faster.

    Raises:
        TaskError: the text holds what no problem holds.
    """
    try:
        return [_IDS[token] for token in _TOKENS(text)]
    except KeyError as error:
        raise TaskError(f"The text has the token {error}, which is not in the vocabulary of the reasoning problems.") from error


_IDS = {token: i for i, token in enumerate(VOCABULARY)}
_TOKENS = re.compile(PATTERN, re.DOTALL).findall
EOS = _IDS["<eos>"]
PAD = _IDS["<pad>"]
