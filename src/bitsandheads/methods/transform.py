"""Transform coding, our own presets: principal axes of each head, bits by variance, sink tokens whole."""

from ..plan import CachePlan, HeadGroup
from ..quant.spec import AxisClass, KVQuant, TensorQuant


def balanced() -> CachePlan:
    """About 1.6 true bits: keys 1.5 bits along query-weighted principal axes, values 1.5 bits."""
    keys = TensorQuant(
        (AxisClass(4, 0.125), AxisClass(3, 0.125), AxisClass(2, 0.125), AxisClass(1, 0.375), AxisClass(0, 0.25)),
        transform="principal",
        query_weighted=True,
    )
    values = TensorQuant((AxisClass(3, 0.25), AxisClass(2, 0.25), AxisClass(1, 0.25), AxisClass(0, 0.25)), transform="principal")
    return CachePlan("balanced", (HeadGroup(quant=KVQuant(keys, values, metadata="fp8", sink=2, heavy=6)),), note="transform coding")


def extreme() -> CachePlan:
    """About 1.2 true bits."""
    light = (AxisClass(3, 0.25), AxisClass(1, 0.25), AxisClass(0, 0.5))
    keys = TensorQuant(light, transform="principal", query_weighted=True)
    values = TensorQuant(light, transform="principal")
    return CachePlan("extreme", (HeadGroup(quant=KVQuant(keys, values, metadata="fp8", sink=2, heavy=6)),), note="transform coding")
