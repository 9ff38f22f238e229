"""Fit steps, centres and codes: x' = centre + step * (code - top / 2) for each axis and group."""

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import AxisClass

GAMMA = 0.7  # ternary threshold over mean|x| (VidKV)
# Optimal uniform steps for a normal distribution, in standard deviations (Max, 1960)
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041}

Round = Callable[[Tensor], Tensor]


def fit(y: Tensor, cls: AxisClass) -> tuple[Tensor, Tensor]:
    """Steps and centres of a group, before they are rounded to their stored form.

    Args:
        y: float32 [..., tokens, axes].
        cls: bits and levels; cls.centre False: the centre is zero.
    Returns:
        steps, centres, each float32 [..., axes].
    """
    zero = torch.zeros_like(y[..., 0, :])
    mean = y.mean(-2) if cls.centre else zero
    if cls.bits == 0:
        return zero, mean
    if cls.levels == "minmax":
        low, high = y.amin(-2), y.amax(-2)
        return (high - low) / (2 ** int(cls.bits) - 1), (high + low) / 2
    z = y - mean[..., None, :]
    if cls.levels == "sign":
        return 2 * z.abs().mean(-2), mean  # the least-squares step of two levels
    if cls.levels == "ternary":
        code = (z.abs() > GAMMA * z.abs().mean(-2, keepdim=True)).float() * z.sign()
        return (z * code).sum(-2) / code.abs().sum(-2).clamp(min=1), mean
    sigma = z.square().mean(-2).sqrt()
    return sigma * GAUSSIAN_STEP[int(cls.bits)], mean


def quantize(y: Tensor, step: Tensor, centre: Tensor, top: Tensor | int, ternary: bool = False) -> Tensor:
    """Nearest codes, given the stored steps and centres.

    Args:
        y: float32 [..., tokens, axes]; step, centre: float32 broadcastable to it.
        top: largest code.
        ternary: use VidKV's threshold instead of the nearest level.
    Returns:
        codes uint8 [..., tokens, axes] in 0..top.
    """
    z = y - centre
    if ternary:
        limit = GAMMA * z.abs().mean(-2, keepdim=True)
        return ((z > limit).to(torch.uint8) + (z >= -limit).to(torch.uint8)).to(torch.uint8)
    scaled = z / torch.where(step > 0, step, torch.ones_like(step)) + _half(top)
    limit_top = top if isinstance(top, int) else top.to(scaled)
    return torch.minimum(scaled.round().clamp_(min=0), torch.as_tensor(limit_top, dtype=scaled.dtype, device=y.device)).to(torch.uint8)


def _half(top: Tensor | int) -> Tensor | float:
    return top / 2
