"""The rotation of a half as one dense matrix, for the kernels: axes = matrix^T ((x[order] - mean) * scale)."""

from functools import lru_cache

import torch
from torch import Tensor

from ..quant.codec import Basis
from ..quant.tile import HalfLayout
from ..quant.transforms import fixed_rotation


@lru_cache(maxsize=64)
def fixed_matrix(name: str, turned: int, dim: int, device: torch.device) -> Tensor:
    """float32 [D, D] (channel, axis): the identity, but for a fixed rotation of the last `turned` channels."""
    full = torch.eye(dim, dtype=torch.float32)
    full[dim - turned :, dim - turned :] = fixed_rotation(name, turned).T  # type: ignore[arg-type]
    return full.to(device)


def rotation_matrix(half: HalfLayout, basis: Basis, device: torch.device) -> Tensor | None:
    """bfloat16 [B, h, D, D] of a basis with principal axes, float32 [D, D] of a fixed rotation, or None (no rotation)."""
    if "axes" in basis:
        axes = basis["axes"]
        return axes if axes.stride()[-2:] == (axes.shape[-1], 1) else axes.contiguous()
    if half.spec.transform in ("none", "principal"):
        return None
    return fixed_matrix(half.spec.transform, half.sizes[-1] if half.spec.last_class_only else half.head_dim, half.head_dim, device)
