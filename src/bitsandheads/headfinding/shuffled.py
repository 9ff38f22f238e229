"""Random head scores: what any method must beat."""

from typing import Any

import numpy as np

from ..scores import HeadScores
from ..seam import layer_shapes


def random_scores(model: Any, seed: int, **fields: Any) -> HeadScores:
    """Uniform random scores for a model (or its configuration), the same for the same seed. fields: see HeadScores.of."""
    shapes = [s for s in layer_shapes(model) if s.compressed]
    values = np.random.default_rng(seed).random((len(shapes), shapes[0].kv_heads), dtype=np.float32)
    return HeadScores.of(values, model, "random", seed=seed, **fields)
