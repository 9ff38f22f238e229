"""Transform coding, our own presets: principal axes of each head, bits by variance, a few tokens whole.

Keys: axes of the covariance within groups, after scaling channels by the root of their mean squared query; a map back by least
squares; packed scores corrected for the variance that codes lose. Values: the same without the query. See dev/LOG.md for the search.
"""

from ..plan import CachePlan, HeadGroup
from ..quant.spec import AxisClass, KVQuant, TensorQuant


def _classes(*pairs: tuple[int, float]) -> tuple[AxisClass, ...]:
    return tuple(AxisClass(bits, share, centre=bits > 0) for bits, share in pairs)


def _plan(name: str, keys: tuple[AxisClass, ...], values: tuple[AxisClass, ...], sink: int, heavy: int) -> CachePlan:
    quant = KVQuant(
        TensorQuant(keys, transform="principal", query_weighted=True, refit=True, noise_correction=0.8, attention_weight=0.25),
        TensorQuant(values, transform="principal", attention_weight=0.7),
        sink=sink,
        heavy=heavy,
        basis_tokens=512,
        metadata="fp8",
    )
    return CachePlan(name, (HeadGroup(quant=quant),), note="transform coding by principal axes")


def balanced() -> CachePlan:
    """Keys 1.5 bits, values 1.5 bits and 6 whole tokens."""
    keys = _classes((4, 0.125), (3, 0.125), (2, 0.125), (1, 0.375), (0, 0.25))
    values = _classes((3, 0.125), (2, 0.375), (1, 0.375), (0, 0.125))
    return _plan("balanced", keys, values, sink=2, heavy=4)


def extreme() -> CachePlan:
    """Keys 1.25 bits, values 1 bit and 4 whole tokens."""
    keys = _classes((4, 0.125), (2, 0.25), (1, 0.25), (0, 0.375))
    values = _classes((3, 0.125), (2, 0.125), (1, 0.375), (0, 0.375))
    return _plan("extreme", keys, values, sink=1, heavy=3)
