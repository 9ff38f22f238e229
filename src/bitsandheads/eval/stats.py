"""Bootstrap confidence intervals."""

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
