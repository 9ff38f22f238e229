"""Generated tasks with verifiable answers. Each module offers `samples(...)` and `score(sample, output)`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One question with a verifiable answer.

    Attributes:
        id: stable and unique within its task.
        prompt: what the model reads.
        answer: the right final answer.
        kind: kind of question, for tables by kind.
        level: graded difficulty, 0 the easiest.
        solution: worked solution that ends in the answer, as a model is trained to write it; empty if there is none.
    """

    id: str
    prompt: str
    answer: str
    kind: str = ""
    level: int = 0
    solution: str = ""
