"""Eigenvectors and ridge regression for a head's basis in CUDA C++: `basis.cu`, compiled by NVRTC for one head_dim at first use. GPUs from sm_80."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.codec import RIDGE
from .backends import why_no_nvrtc
from .cuda_decode import _check, _start, cached_cubin

SOURCE = Path(__file__).with_name("basis.cu")
SWEEPS = 5  # of Jacobi rotations; `balanced` then loses 1e-4 against the exact axes for spectra of two and four decades (four sweeps: 5e-3)
LARGEST = 128  # head_dim: a matrix in shared memory
BLOCK = 8  # columns; a warp holds two blocks


def unsupported(dim: int, device: torch.device) -> str | None:
    """Why the kernels cannot run here, or None."""
    if device.type != "cuda":
        return f"the device is {device.type!r}, not a GPU"
    if dim > LARGEST or dim % 8:
        return f"head_dim {dim} (a multiple of 8 up to {LARGEST})"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "a compute capability below 8.0"
    return why_no_nvrtc()


@lru_cache(maxsize=16)
def _kernels(dim: int, device: torch.device) -> dict[str, Any]:
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    cubin = cached_cubin(source(dim), f"sm_{major}{minor}")
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(cubin))
        found = {name: _check(driver.cuModuleGetFunction(module, name.encode())) for name in ("principal_axes", "map_back")}
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(found["principal_axes"], limit, _shared(dim)))
    return found


def source(dim: int) -> str:
    """The source with its constants."""
    return f"#define DIM {dim}\n#define BLOCK {BLOCK}\n{SOURCE.read_text()}"


def _warps(dim: int) -> int:
    return -(-dim // (2 * BLOCK))


def _shared(dim: int) -> int:
    """Bytes of shared memory of `principal_axes`."""
    return _warps(dim) * 2 * BLOCK * (dim + 2) * 4


def _launch(name: str, like: Tensor, threads: int, shared: int, tensors: list[Tensor], number: ctypes.c_int | ctypes.c_float) -> None:
    """One CTA for each matrix of `like` [..., D, D]."""
    dim = like.shape[-1]
    values = [*(ctypes.c_void_p(t.data_ptr()) for t in tensors), number]
    arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
    stream = torch.cuda.current_stream(like.device).cuda_stream
    _start(_kernels(dim, like.device)[name], like.shape[:-2].numel(), threads, shared, stream, arguments, early=False)


def principal_axes(gram: Tensor, scale: Tensor) -> Tensor:
    """quant.codec.principal_axes, all matrices in one launch; gram float32 [..., D, D], scale float32 [..., D].

    Raises:
        BackendError: NVRTC is missing or rejects the source.
    """
    dim = gram.shape[-1]
    gram, scale = gram.float().contiguous(), scale.float().contiguous()
    rows = torch.empty_like(gram)
    _launch("principal_axes", gram, 32 * _warps(dim), _shared(dim), [gram, scale, rows], ctypes.c_int(SWEEPS))
    return rows.mT


def map_back(axes: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """quant.codec.HalfCodec.refit in float32, all matrices in one launch: bfloat16 [..., D, D], channels x axes.

    Args:
        axes: the inverse of the map to the axes, bfloat16 [..., D, D]; gram, cross: see there; float32 [..., D, D].
    Raises:
        BackendError: NVRTC is missing or rejects the source.
    """
    dim = gram.shape[-1]
    axes, gram, cross = axes.contiguous(), gram.contiguous(), cross.contiguous()
    out = torch.empty_like(axes)
    _launch("map_back", gram, dim * dim // 32, 0, [gram, cross, axes, out], ctypes.c_float(RIDGE))
    return out
