"""VidKV (arXiv 2503.16257): mixed-precision keys by channel, ternary values, salient tokens at 2 bits.

As the paper writes it (groups of 32, no sink, range as the criterion, a Fourier transform of the 1-bit channels, gamma 0.7), with
the defects of its release mended: one ranking for each head instead of one for a layer, a real transform (one code for each
channel), 1 bit = mean +- s, ternary values with a least-squares scale, five trits to a byte. Names: vidkv-KEYS/VALUES.
Values "1.66" protect the tokens that draw the most attention from the last prompt queries, on any model; "1.66-stp" protects those
whose embeddings are most similar to the text's, as the paper does, on models with images or videos.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..plan import CachePlan, HeadGroup
from ..quant.spec import AxisClass, KVQuant, Salience, TensorQuant

KEYS = {"1.25": 0.25, "1.5": 0.5, "1.75": 0.75, "2": 1.0}
VALUES = ("1.58", "1.66", "1.66-stp", "2")
SALIENT_SHARE = 0.2


def vidkv(keys: str, values: str) -> CachePlan:
    """The plan for nominal bits of keys ("1.25", "1.5", "1.75", "2") and values ("1.58", "1.66" or "1.66-stp" with protected tokens, "2")."""
    high = KEYS[keys]
    classes = (AxisClass(2, high, "minmax"),) + ((AxisClass(1, 1 - high, "sign"),) if high < 1 else ())
    mixed = high < 1
    key_quant = TensorQuant(classes, transform="fourier" if mixed else "none", last_class_only=mixed, order="range" if mixed else "none")
    value_class = AxisClass(2, 1.0, "minmax") if values == "2" else AxisClass("ternary", 1.0, "ternary", centre=False)
    quant = KVQuant(
        key_quant,
        TensorQuant((value_class,)),
        group_size=32,
        residual=128,
        sink=0,
        salience={"1.66": Salience(SALIENT_SHARE), "1.66-stp": Salience(SALIENT_SHARE, "embedding")}.get(values),
    )
    return CachePlan(f"vidkv-{keys}/{values}", (HeadGroup(quant=quant),), note="VidKV, arXiv 2503.16257, mended formulas")


def semantic_scores(embeddings: Tensor, visual: Tensor, real: Tensor) -> Tensor:
    """Semantic token protection: how similar each visual token is to the text (arXiv 2503.16257, section 3.3).

    Args:
        embeddings: [B, T, hidden] as they enter the language model.
        visual: bool [B, T], which tokens come from images or videos; the others are text.
        real: bool [B, T], False for padding.
    Returns:
        float32 [B, T]: the sum over the text tokens j of <x_i, x_j>; -inf for text and padding. In a prompt without visual tokens
        all are -inf, and the first ones are protected.
    """
    text = (embeddings.float() * (real & ~visual)[..., None]).sum(1, keepdim=True)
    return (embeddings.float() * text).sum(-1).masked_fill(~(visual & real), float("-inf"))


PRESETS: dict[str, Callable[[], CachePlan]] = {f"vidkv-{k}/{v}": partial(vidkv, k, v) for k in KEYS for v in VALUES}
