"""Confidence intervals and paired comparisons."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from statistics import NormalDist
from typing import Any

import numpy as np


def bootstrap_mean(values: np.ndarray, block: int = 1, draws: int = 2000, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean, by a moving-block bootstrap.

    Args:
        values: [n] numbers in their order.
        block: length of the blocks that are drawn together (neighbouring tokens are correlated; independent samples: 1).
    Returns:
        low, high.
    """
    n = len(values)
    block = min(block, n)
    random = np.random.default_rng(seed)
    sums = np.convolve(values, np.ones(block), "valid")  # sum of every block
    blocks = -(-n // block)
    means = sums[random.integers(0, len(sums), (draws, blocks))].sum(1) / (blocks * block)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_ratio(
    values: np.ndarray, base: np.ndarray, block: int = 1, draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of mean(values) / mean(base), pairs drawn together in moving blocks. values, base: [n], same samples."""
    n = len(values)
    block = min(block, n)
    random = np.random.default_rng(seed)
    starts = random.integers(0, n - block + 1, (draws, -(-n // block)))
    sums = [np.convolve(x, np.ones(block), "valid")[starts].sum(1) for x in (values, base)]
    low, high = np.quantile(sums[0] / np.maximum(sums[1], 1e-300), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def wilson(right: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion: low, high. right: how many of n samples are right (E. B. Wilson, JASA 1927)."""
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + level) / 2)
    p = right / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the samples that only the first or only the second answered right."""
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return min(1.0, float(Fraction(2 * tail, 2**n)))


@dataclass(frozen=True)
class Comparison:
    """A plan against a base on the same samples.

    Attributes:
        difference: mean score less the base's; low, high: 95% interval by paired bootstrap over the samples.
        only_plan, only_base: samples that only one of the two answered right; None unless all scores are 0 or 1.
        p: McNemar's exact p-value; None where the scores are no 0 and 1.
        within_noise: zero lies in the interval, or p is at least 0.05.
    """

    n: int
    difference: float
    low: float
    high: float
    only_plan: int | None
    only_base: int | None
    p: float | None
    within_noise: bool

    @property
    def verdict(self) -> str:
        """In words."""
        if self.within_noise:
            return "inside the noise"
        return "better" if self.difference > 0 else "worse"


def compare(scores: Mapping[Any, float], base: Mapping[Any, float]) -> Comparison:
    """Compare two sets of scores on the samples that both have.

    Args:
        scores, base: sample -> score. Where a sample was answered several times, give the mean of its scores.
    Raises:
        ValueError: no sample in common.
    """
    common = [k for k in scores if k in base]
    if not common:
        raise ValueError("The two sets of scores have no sample in common.")
    ours, theirs = (np.array([x[k] for k in common], dtype=float) for x in (scores, base))
    difference = ours - theirs
    low, high = bootstrap_mean(difference)
    only_plan = only_base = p = None
    if np.isin([ours, theirs], [0, 1]).all():
        only_plan, only_base = int((difference > 0).sum()), int((difference < 0).sum())
        p = mcnemar(only_plan, only_base)
    noise = low <= 0 <= high or (p is not None and p >= 0.05)
    return Comparison(len(common), float(difference.mean()), low, high, only_plan, only_base, p, noise)
