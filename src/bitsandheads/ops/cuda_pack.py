"""Packing in CUDA C++ for the presets of transform coding: `pack.cu`, compiled by NVRTC for one half of a tile layout at first use. GPUs from sm_80."""

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..quant.codec import Basis
from ..quant.tile import HalfLayout
from .backends import why_no_nvrtc
from .cuda_decode import _check, _start, cached_cubin
from .triton_pack import _axis_table, _constants, _plane, multiprocessors

SOURCE = Path(__file__).with_name("pack.cu")
PROGRAMS = 2  # CTAs of a multiprocessor
_P, _L, _I = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int


class _Params(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("x", "map", "weight", "mean", "skip", "jobs", "table", "tiles", "kept", "error", "status")),
        *((name, _L) for name in ("x_b", "x_h", "x_t", "map_b", "map_h", "weight_b", "weight_h", "tiles_b", "tiles_h")),
        *((name, _I) for name in ("batch", "heads", "skips", "room", "workers")),
    ]


@lru_cache(maxsize=256)
def _unsupported_layout(half: HalfLayout) -> str | None:
    spec = half.spec
    if half.head_dim not in (64, 128):
        return f"head_dim {half.head_dim} (64 or 128)"
    if spec.transform != "principal" or half.fmt != "fp8":
        return f"transform {spec.transform!r} with {half.fmt} metadata (principal axes with fp8 metadata)"
    if half.tokens != 128 or half.group_size != 128:
        return f"groups of {half.group_size} tokens (128)"
    if any(c.bits and (c.levels != "gaussian" or int(c.bits) > 4) for c in spec.classes):
        return "codes other than gaussian ones of at most 4 bits"
    rows = _axis_table(half, half.head_dim, torch.device("cpu"))[5].view(-1, 8)
    if ((rows - rows[:, :1] != torch.arange(8)) | (rows[:, :1] % 8 != 0)).any():
        return "classes of such sizes"  # a row of the map is copied by eight neighbouring axes
    return None


def _shared(half: HalfLayout) -> int:
    """Bytes of shared memory of a CTA, at least sizeof(Shared)."""
    dim = half.head_dim
    return 2 * dim * dim + 2 * 128 * (2 * dim + 4 + 4) + half.nbytes + 4 * 10 * dim + 8 * dim // 16 + 64


def unsupported(x: Tensor, half: HalfLayout, weight: Tensor | None) -> str | None:
    """Why this half of tiles (tokens x [B, h, C, D], weight [B, h, C] or None) cannot be packed here, or None. Reads no elements."""
    if x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "a device that is no GPU of compute capability 8.0 or above"
    if x.dtype != torch.bfloat16:
        return f"dtype {x.dtype} (bfloat16)"
    rows = [(x, 8), *(() if weight is None else ((weight, 4),))]
    if any(t.stride(-1) != 1 or any(s % n for s in t.stride()[:-1]) or t.data_ptr() % 16 for t, n in rows):
        return "rows that do not begin at multiples of 16 bytes"
    if torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin < _shared(half):  # type: ignore[attr-defined]
        return f"a GPU with less than {_shared(half)} bytes of shared memory for a block"
    return _unsupported_layout(half) or why_no_nvrtc()


def source(half: HalfLayout, tile_bytes: int, weighted: bool, keep: bool) -> str:
    """The source with its constants."""
    two, one = (_plane(half, bits, torch.device("cpu")) for bits in (2, 1))
    numbers = {name.upper(): half.sections[name][0] for name in ("two", "one", "steps", "centres", "factors")}
    numbers |= {"DIM": half.head_dim, "NBYTES": half.nbytes, "TILE_BYTES": tile_bytes, "WEIGHTED": int(weighted), "KEEP": int(keep)}
    numbers |= {"TWO_WIDTH": two.width, "ONE_WIDTH": one.width, "ONE_COLUMNS": one.columns}
    return "".join(f"#define {k} {v}\n" for k, v in numbers.items()) + SOURCE.read_text()


@lru_cache(maxsize=64)
def _kernel(half: HalfLayout, tile_bytes: int, weighted: bool, keep: bool, device: torch.device) -> tuple[Any, int]:
    """The loaded kernel and the shared memory of a CTA."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    shared = _shared(half)
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(cached_cubin(source(half, tile_bytes, weighted, keep), f"sm_{major}{minor}")))
        kernel = _check(driver.cuModuleGetFunction(module, b"pack_tiles"))
        _check(driver.cuFuncSetAttribute(kernel, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
    return kernel, shared


def pack_half(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, due: bool, half: HalfLayout, base: int, basis: Basis, skip: Tensor | None,
    weight: Tensor | None, kept: Tensor | None, error: Tensor | None, status: Tensor,
) -> None:  # fmt: skip
    """See ops.pack.pack_with_kernels; not for `due`, and the caller has asked `unsupported`. Padding between the parts of a half is written as zeros.

    Raises:
        BackendError: NVRTC is missing or rejects the source.
    """
    batch, heads, _, dim = x.shape
    kernel, shared = _kernel(half, tiles.shape[-1], weight is not None, kept is not None, x.device)
    matrix, mean = basis.get("forward", basis["axes"]).contiguous(), basis["mean"].contiguous()
    table = _axis_table(half, int(_constants(half, base, tiles.shape[-1])["DP"]), x.device)  # type: ignore[call-overload]
    p = _Params()
    names = ("x", "map", "weight", "mean", "skip", "jobs", "table", "kept", "error", "status")
    for name, t in zip(names, (x, matrix, weight, mean, skip, jobs, table, kept, error, status), strict=True):
        setattr(p, name, None if t is None else t.data_ptr())
    p.tiles = tiles.data_ptr() + base
    (p.x_b, p.x_h, p.x_t), (p.map_b, p.map_h), (p.tiles_b, p.tiles_h) = x.stride()[:3], matrix.stride()[:2], tiles.stride()[:2]
    p.weight_b, p.weight_h = (0, 0) if weight is None else weight.stride()[:2]
    p.batch, p.heads, p.skips, p.room = batch, heads, 0 if skip is None else skip.shape[2], 0 if kept is None else kept.shape[2]
    p.workers = min(most, -(-multiprocessors(x.device) * PROGRAMS // (batch * heads)))
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(p))
    stream = torch.cuda.current_stream(x.device).cuda_stream
    _start(kernel, p.workers * batch * heads, 2 * dim, shared, stream, arguments, early=False)
