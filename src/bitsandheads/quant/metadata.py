"""Metadata of a group: steps and centres for each axis, in fp16 or in fp8 (e4m3) with one fp16 factor for each array."""

from typing import Literal

import torch
from torch import Tensor

from ..errors import NotFiniteError

MetadataFormat = Literal["fp16", "fp8"]
FP16_MAX = 65504.0
FP8_MAX = 448.0
SMALLEST_FACTOR = 2.0**-24
LIMITS = {"fp16": FP16_MAX, "fp8": FP8_MAX * FP16_MAX}  # the largest number that each format holds


def itemsize(fmt: MetadataFormat) -> int:
    """Bytes of one stored number."""
    return 2 if fmt == "fp16" else 1


def unstorable(largest: float, fmt: MetadataFormat) -> NotFiniteError:
    """The error for metadata beyond the format's range."""
    return NotFiniteError(
        f"A step or centre of the codes is {largest}; {fmt} metadata hold at most {LIMITS[fmt]:.0f}. Look for an overflow in the model "
        "(float16 weights? try bfloat16), or keep these heads whole in the plan."
    )


def encode(x: Tensor, fmt: MetadataFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Round numbers to their stored form.

    Args:
        x: float32 [..., count].
        fmt: "fp16", or "fp8": e4m3 times a shared fp16 factor max|x| / 448.
    Returns:
        The bytes, uint8 [..., count * itemsize]; the factor, float16 [..., 1] (one for fp16, where it is not stored); and
        what they restore to, float32 [..., count].
    Raises:
        NotFiniteError: a number is not finite, or too large for the format.
    """
    if x.numel() and not (largest := x.abs().max().item()) <= LIMITS[fmt]:
        raise unstorable(largest, fmt)
    if fmt == "fp16" or x.shape[-1] == 0:
        stored = x.half().contiguous()
        return stored.view(torch.uint8), torch.ones(*x.shape[:-1], 1, dtype=torch.float16, device=x.device), stored.float()
    factor = (x.abs().amax(-1, keepdim=True) / FP8_MAX).clamp(SMALLEST_FACTOR, FP16_MAX).half()
    small = (x / factor.float()).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
    return small.view(torch.uint8), factor, small.float() * factor.float()


def decode(data: Tensor, factor: Tensor, fmt: MetadataFormat) -> Tensor:
    """Inverse of `encode`: uint8 [..., count * itemsize], float16 [..., 1] -> float32 [..., count]."""
    if data.shape[-1] == 0:
        return data.float()
    if fmt == "fp16":
        return data.contiguous().view(torch.float16).float()
    return data.contiguous().view(torch.float8_e4m3fn).float() * factor.float()
