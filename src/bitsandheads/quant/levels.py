"""Fit steps, centres and codes: x' = centre + step * (code - top / 2) for each axis and group."""

import torch
from torch import Tensor

from .spec import AxisClass

GAMMA = 0.7  # ternary threshold over mean|x| (VidKV)
# Optimal uniform steps for a normal distribution, in standard deviations (Max, 1960); refined by least squares on the codes
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041}


def fit(y: Tensor, cls: AxisClass, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Steps and centres of a group, before they are rounded to their stored form.

    Args:
        y: float32 [..., tokens, axes].
        cls: bits and levels; cls.centre False: the centre is zero.
        weight: float32 [..., tokens] with sum 1, what each token's error counts; None: all alike. "minmax", "sign" and "ternary"
            levels count all tokens alike.
    Returns:
        steps, centres, each float32 [..., axes].
    """
    zero = torch.zeros_like(y[..., 0, :])
    mean = _average(y, weight) if cls.centre else zero
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
    top = 2 ** int(cls.bits) - 1
    step = _average(z.square(), weight).sqrt() * GAUSSIAN_STEP[int(cls.bits)]
    codes = quantize(y, step[..., None, :], mean[..., None, :], top).float() - top / 2
    return _least_squares(y, codes, step, mean, cls.centre, weight)


def _average(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.mean(-2) if weight is None else (weight[..., None, :] @ x).squeeze(-2)


def _least_squares(
    y: Tensor, codes: Tensor, step: Tensor, centre: Tensor, free_centre: bool, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Step and centre that restore y best from these codes (counted from their middle); degenerate groups keep what they had."""
    zero = torch.zeros_like(step)
    code_mean, y_mean = (_average(codes, weight), _average(y, weight)) if free_centre else (zero, zero)
    spread = _average(codes.square(), weight) - code_mean.square()
    slope = (_average(codes * y, weight) - code_mean * y_mean) / spread.clamp(min=1e-9)
    good = (spread > 1e-6) & (slope > 0)
    slope = torch.where(good, slope, step)
    return slope, torch.where(good, y_mean - slope * code_mean, centre) if free_centre else centre


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
