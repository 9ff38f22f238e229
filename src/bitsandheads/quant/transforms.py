"""Orthonormal real rotations of a head's axes: fixed ones by name, and principal axes found from the data."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from .spec import Transform


@lru_cache(maxsize=64)
def _fixed(name: str, n: int) -> Tensor:
    """[n, n] float64, rows are basis vectors: y = M x."""
    i = torch.arange(n, dtype=torch.float64)
    if name == "hadamard":
        size = n & -n  # the largest power of two that divides n: blocks of it
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < size:
            h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
        return torch.block_diag(*[h / math.sqrt(size)] * (n // size))
    if name == "dct":
        m = torch.cos(math.pi / n * (i[None] + 0.5) * i[:, None]) * math.sqrt(2 / n)
        m[0] /= math.sqrt(2)
        return m
    if name == "fourier":  # rows: constant, then cosine and sine of each frequency, then the alternating one
        rows = [torch.ones(n, dtype=torch.float64) / math.sqrt(n)]
        for f in range(1, (n - 1) // 2 + 1):
            angle = 2 * math.pi * f * i / n
            rows += [angle.cos() * math.sqrt(2 / n), angle.sin() * math.sqrt(2 / n)]
        if n % 2 == 0:
            rows.append((1 - 2 * (i % 2)) / math.sqrt(n))
        return torch.stack(rows)
    raise AssertionError(name)


def fixed_rotation(name: Transform, n: int, device: torch.device | str = "cpu") -> Tensor:
    """An orthonormal real matrix [n, n] float32 whose rows are the basis vectors (y = M x, x = M^T y).

    "hadamard" takes blocks of the largest power of two that divides n. "fourier" is the real form of the discrete Fourier
    transform: one real coefficient for each channel, where VidKV's release keeps a complex one.
    """
    if name == "none":
        return torch.eye(n, device=device)
    return _fixed(name, n).to(device=device, dtype=torch.float32)
