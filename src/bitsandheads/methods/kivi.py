"""KIVI (arXiv 2402.02750): 2-bit keys for each channel, 2-bit values for each token, groups of 32."""

from dataclasses import replace

from ..plan import CachePlan, HeadGroup
from ..quant.spec import AxisClass, KVQuant, TensorQuant

_QUANT = KVQuant(
    keys=TensorQuant((AxisClass(2, 1.0, "minmax"),)),
    values=TensorQuant((AxisClass(2, 1.0, "minmax"),), per="token"),
    group_size=32,
    residual=128,
    sink=0,
)


def kivi_2() -> CachePlan:
    """The paper's own: no sink tokens, fp16 metadata, 3.0 true bits."""
    return CachePlan("kivi-2", (HeadGroup(quant=_QUANT),), note="KIVI, arXiv 2402.02750")


def kivi_2_sink() -> CachePlan:
    """The same with the first 32 tokens whole."""
    return CachePlan("kivi-2-sink", (HeadGroup(quant=replace(_QUANT, sink=32)),), note="KIVI, arXiv 2402.02750, with 32 sink tokens")
