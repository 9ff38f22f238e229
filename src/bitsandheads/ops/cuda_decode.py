"""Decode attention in CUDA C++ for Hopper: `decode_sm90.cu`, compiled for one tile layout at first use.

The source is compiled with NVRTC for the layout's tables (as constants), and the result is kept on disk under the hash of everything that
went into it. Shape letters: B sequences, Hq query heads, h KV heads of a set, Q query tokens, D head_dim.
"""

import ctypes
import hashlib
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import BackendError, CacheStateError
from ..quant.tile import HalfLayout, TileLayout
from .heads import HeadSet
from .rotations import rotation_matrix

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode_sm90.cu")
MAX_SETS, MAX_HEADS, MAX_ENTRIES, ROWS = 4, 128, 256, 8  # as in the source
SHARED_LIMIT = 227 * 1024
RUN = 8
LOG2E = 1.4426950408889634
MIN_UNITS = 2  # units (tiles) that a CTA takes at least
LEAD = 20  # what a head costs a CTA beside its units, in units


# ------------------------------------------------------------------------------------------------------------- what is covered


def unsupported(q: Tensor, sets: list[HeadSet]) -> str | None:
    """Why these inputs cannot run here, or None. Reads shapes and dtypes only."""
    dim = q.shape[-1]
    if dim not in (64, 128):
        return f"head_dim {dim} (64 or 128)"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype} (float16 or bfloat16)"
    if len(sets) > MAX_SETS or len(sets) * q.shape[0] > MAX_ENTRIES or any(len(s.kv_heads) > MAX_HEADS for s in sets):
        return f"{len(sets)} head sets of {q.shape[0]} sequences (at most {MAX_SETS} sets and {MAX_ENTRIES} of both together)"
    for s in sets:
        if s.extra:
            return "packed parts with other value codes (salient tokens)"
        if s.layout is not None and (why := _unsupported_layout(s.layout)):
            return why
        for name, t in (("sink", s.sink_k), ("sink", s.sink_v), ("tail", s.tail_k), ("tail", s.tail_v)):
            if t is not None and (t.dtype != q.dtype or t.stride(-1) != 1 or t.stride(-2) != dim or any(x % 8 for x in t.stride()[:2])):
                return f"a {name} of dtype {t.dtype} and strides {t.stride()} (the query's dtype, rows of D elements)"
    return None


@lru_cache(maxsize=256)
def _unsupported_layout(layout: TileLayout) -> str | None:
    for half in (layout.keys, layout.values):
        if half.spec.per == "token":
            return f'{half.kind} with per="token"'
        if half.trit_axes[1]:
            return f"{half.kind} as trits"
        if half.tokens not in (32, 64, 128):
            return f"tiles of {half.tokens} tokens (32, 64 or 128)"
        if half.plane_slots(2) + half.plane_slots(1) == 0:
            return f"{half.kind} without codes"
        for bits in (1, 2):
            if half.plane_slots(bits) % (_slots_per_word(half, bits) * RUN):
                return f"{half.kind} with {half.plane_slots(bits)} slots of {bits} bits (a multiple of {_slots_per_word(half, bits) * RUN})"
    if _shape(layout)[1] == 0:
        return f"tiles of {layout.nbytes} bytes"
    return None


# ------------------------------------------------------------------------------------------------------------- constants of a layout


def _slots_per_word(half: HalfLayout, bits: int) -> int:
    return 256 // half.tokens // bits


def _table(name: str, values: list[int]) -> str:
    """A constexpr function that the compiler folds for constant arguments."""
    body = "".join(f"i == {i} ? {v} : " for i, v in enumerate(values[:-1])) + str(values[-1] if values else 0)
    return f"__device__ __forceinline__ constexpr int {name}(int i) {{ return {body}; }}"


def _basis_flags(half: HalfLayout | None) -> str:
    """Which parts of a basis this half has."""
    spec = half.spec if half else None
    principal = spec is not None and spec.transform == "principal"
    fixed = spec is not None and spec.transform not in ("none", "principal")
    flags = {"MATRIX": principal or fixed, "RESIDUAL": fixed, "MEAN": principal, "NOISE": spec is not None and spec.noise_correction > 0}
    flags["ORDER"] = spec is not None and not principal and spec.order != "none"
    return "constexpr bool " + ", ".join(f"{k} = {str(v).lower()}" for k, v in flags.items()) + ";"


def _half_header(half: HalfLayout, base: int) -> str:
    offsets = {name: base + start for name, (start, _) in half.sections.items()}
    constants = {"TWO": offsets["two"], "ONE": offsets["one"], "STEPS": offsets["steps"], "CENTRES": offsets["centres"]}
    constants |= {"FACTORS": offsets["factors"], "N_STEPS": half.counts[0], "N_CENTRES": half.counts[1]}
    for bits in (2, 1):
        per_word = _slots_per_word(half, bits)
        constants |= {f"C{bits}": half.plane_slots(bits) // per_word, f"E{bits}": per_word}
    step_run = {axis // RUN: i // RUN for i, axis in enumerate(half.step_axes)}
    centre_run = {axis // RUN: i // RUN for i, axis in enumerate(half.centre_axes)}
    axes, shifts = [], []
    for s in half.slots:
        axes += [(s.axis + i) // RUN for i in range(0, s.count, RUN)]
        shifts += [s.weight.bit_length() - 1] * (s.count // RUN)
    lines = [f"namespace {half.kind} {{", "constexpr int " + ", ".join(f"{k} = {v}" for k, v in constants.items()) + ";"]
    lines.append(f"constexpr int TOP_SHIFT = {max(shifts, default=0)};")
    lines += [_table("run_axis", axes), _table("run_shift", shifts), _table("run_step", [step_run[a] for a in axes])]
    lines.append(_basis_flags(half))
    lines.append(_table("centre_axis", list(centre_run)))
    lines.append(_table("centre_run", [centre_run.get(a, -1) for a in range(half.head_dim // RUN)]))
    return "\n".join([*lines, "}"])


def _fixed_shared_bytes(dim: int, warps: int, stages: int) -> int:
    """At least the size of `Shared` in the source."""
    row = (dim + 4) * 4
    return (
        warps * ROWS * row
        + ROWS * row
        + warps * ROWS * 8
        + ROWS * 16
        + warps * stages * 8
        + 4 * (6 * MAX_ENTRIES + 1)
        + 2 * MAX_ENTRIES
        + 128
    )


def _shared_bytes(layout: TileLayout | None, dim: int, warps: int, stages: int) -> int:
    """Dynamic shared memory of a CTA."""
    return _fixed_shared_bytes(dim, warps, stages) + (warps * stages * layout.nbytes if layout else 0)


def _shape(layout: TileLayout | None) -> tuple[int, int]:
    """Warps of a CTA and stages of a warp's copies: as many as shared memory holds."""
    if layout is None:
        return 12, 1
    dim = layout.keys.head_dim
    for warps, stages in ((8, 3), (8, 2), (4, 3), (4, 2), (4, 1)):
        if _shared_bytes(layout, dim, warps, stages) <= SHARED_LIMIT:
            return warps, stages
    return 4, 0


@lru_cache(maxsize=256)
def source(layout: TileLayout | None, dim: int, dtype: torch.dtype, group: int, n_query: int, warps: int, stages: int) -> str:
    """The kernel's source with the constants of `layout` (None: whole precision only) in front."""
    numbers = {
        "HEAD_DIM": dim,
        "MODEL_FP16": int(dtype == torch.float16),
        "WARPS": warps,
        "STAGES": stages,
        "HAS_TILES": int(layout is not None),
    }
    numbers |= {
        "GROUP": group,
        "N_QUERY": n_query,
        "TILE_BYTES": 0,
        "SHARED_BYTES": _fixed_shared_bytes(dim, warps, stages),
        "PARAMS_BYTES": ctypes.sizeof(_Params),
    }
    parts = [f"namespace {name} {{ {_basis_flags(None)} }}" for name in ("keys", "values")]
    if layout is not None:
        keys, values = layout.keys, layout.values
        residual = keys.spec.transform != "principal" and keys.counts[1] > 0
        numbers |= {"FIELDS": layout.tokens // 16, "GROUPS": keys.groups, "META_FP8": int(keys.fmt == "fp8")}
        numbers |= {"CENTRE_RESIDUAL": int(residual), "TILE_BYTES": layout.nbytes}
        parts = [_half_header(keys, 0), _half_header(values, keys.nbytes)]
    defines = [f"#define {k} {v}" for k, v in numbers.items()]
    return "\n".join([*defines, *parts, SOURCE.read_text()])


# ------------------------------------------------------------------------------------------------------------- compiling


def _cache_dir() -> Path:
    return Path.home() / ".cache" / "bitsandheads" / "kernels"


def compile_cubin(text: str, arch: str) -> bytes:
    """Compile with NVRTC.

    Raises:
        BackendError: NVRTC is missing or rejects the source.
    """
    try:
        from cuda.bindings import nvrtc
    except ImportError as e:
        raise BackendError(
            "The CUDA backend needs the package cuda-bindings and NVRTC: pip install cuda-bindings nvidia-cuda-nvrtc."
        ) from e
    status, program = nvrtc.nvrtcCreateProgram(text.encode(), b"decode_sm90.cu", 0, [], [])
    options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17", b"--use_fast_math"]
    status, *_ = nvrtc.nvrtcCompileProgram(program, len(options), options)
    if int(status):
        size = nvrtc.nvrtcGetProgramLogSize(program)[1]
        report = b" " * size
        nvrtc.nvrtcGetProgramLog(program, report)
        raise BackendError(f"NVRTC rejected the decode kernel ({status}): {report.decode(errors='replace')[:4000]}")
    size = nvrtc.nvrtcGetCUBINSize(program)[1]
    cubin = b" " * size
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return cubin


def cached_cubin(text: str, arch: str, folder: Path | None = None) -> bytes:
    """The compiled source, from disk when it is there; a file is written whole or not at all."""
    folder = folder or _cache_dir()
    path = folder / f"decode-{arch}-{hashlib.sha256(text.encode()).hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        pass
    cubin = compile_cubin(text, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as f:
            f.write(cubin)
        os.replace(f.name, path)
    except OSError as e:
        log.warning("The compiled kernel cannot be kept in %s (%s); it is compiled again in the next process.", folder, e)
    return cubin


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel and how it is launched."""

    function: object
    warps: int
    shared: int
    ctas: int


def _check(result: tuple) -> object:
    from cuda.bindings import driver

    if int(result[0]):
        raise BackendError(f"CUDA driver: {driver.cuGetErrorString(result[0])[1].decode()}.")
    return result[1] if len(result) == 2 else result[1:]


@lru_cache(maxsize=128)
def kernel(
    layout: TileLayout | None, dim: int, dtype: torch.dtype, group: int, n_query: int, device: torch.device, shape: tuple[int, int] | None = None
) -> Kernel:  # fmt: skip
    """Compile (or read) and load the kernel for one layout.

    Args:
        shape: warps and stages; None: as many as fit.
    """
    from cuda.bindings import driver

    warps, stages = shape or _shape(layout)
    properties = torch.cuda.get_device_properties(device)
    cubin = cached_cubin(source(layout, dim, dtype, group, n_query, warps, stages), f"sm_{properties.major}{properties.minor}")
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(cubin))
        function = _check(driver.cuModuleGetFunction(module, b"decode_attention"))
        shared = _shared_bytes(layout, dim, warps, stages)
        _check(driver.cuFuncSetAttribute(function, driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
    return Kernel(function, warps, shared, properties.multi_processor_count)


# ------------------------------------------------------------------------------------------------------------- arguments (as in the source)

_P, _L, _I = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int


class _Rotation(ctypes.Structure):
    _fields_ = [("matrix", _P), ("residual", _P), ("stride_b", _L), ("stride_h", _L), ("order", _P), ("mean", _P), ("noise", _P)]


class _Set(ctypes.Structure):
    _fields_ = [
        ("tiles", _P), ("tiles_b", _L), ("tiles_h", _L),
        ("sink_k", _P), ("sink_v", _P), ("tail_k", _P), ("tail_v", _P),
        ("sink_b", _L), ("sink_h", _L), ("tail_b", _L), ("tail_h", _L),
        ("lengths", _P), ("key", _Rotation), ("value", _Rotation),
        ("heads", _I), ("window", _I), ("kv_heads", ctypes.c_ubyte * MAX_HEADS),
    ]  # fmt: skip


class _Params(ctypes.Structure):
    _fields_ = [
        ("sets", _Set * MAX_SETS),
        ("q", _P), ("q_b", _L), ("q_h", _L), ("q_t", _L),
        ("out", _P), ("lse", _P), ("hidden", _P),
        ("partial", _P), ("partial_lse", _P), ("arrived", _P),
        ("n_sets", _I), ("batch", _I), ("q_heads", _I), ("min_units", _I), ("lead", _I),
        ("scale_log2", ctypes.c_float), ("noise_log2", ctypes.c_float),
    ]  # fmt: skip


@lru_cache(maxsize=64)
def _high_and_low(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix as bfloat16, and what the rounding lost."""
    high = matrix.to(torch.bfloat16)
    return high, (matrix - high.float()).to(torch.bfloat16)


def _rotation(half: HalfLayout, basis: dict[str, Tensor], keep: list[Tensor]) -> _Rotation:
    r = _Rotation()
    matrix = rotation_matrix(half, basis, keep[0].device)
    if matrix is not None and matrix.dim() == 4:
        keep.append(matrix)
        r.matrix, r.stride_b, r.stride_h = matrix.data_ptr(), matrix.stride(0), matrix.stride(1)
    elif matrix is not None:
        high, low = _high_and_low(matrix)
        r.matrix, r.residual = high.data_ptr(), low.data_ptr()
    for name in ("order", "mean", "noise"):
        if name in basis:
            tensor = basis[name].contiguous()
            keep.append(tensor)
            setattr(r, name, tensor.data_ptr())
    return r


def _set(s: HeadSet, keep: list[Tensor]) -> _Set:
    p = _Set()
    p.tail_k, p.tail_v, p.tail_b, p.tail_h = s.tail_k.data_ptr(), s.tail_v.data_ptr(), s.tail_k.stride(0), s.tail_k.stride(1)
    if s.sink_k is not None and s.sink_v is not None and s.sink_k.shape[2]:
        p.sink_k, p.sink_v, p.sink_b, p.sink_h = s.sink_k.data_ptr(), s.sink_v.data_ptr(), s.sink_k.stride(0), s.sink_k.stride(1)
    if s.tiles is not None and s.layout is not None and s.tiles.shape[2]:
        p.tiles, p.tiles_b, p.tiles_h = s.tiles.data_ptr(), s.tiles.stride(0), s.tiles.stride(1)
        p.key, p.value = _rotation(s.layout.keys, s.key_basis, keep), _rotation(s.layout.values, s.value_basis, keep)
    p.lengths, p.heads, p.window = s.lengths.data_ptr(), len(s.kv_heads), s.window or 0
    p.kv_heads[: len(s.kv_heads)] = list(s.kv_heads)
    return p


Scratch = tuple[Tensor, Tensor, Tensor]
CAPTURED = -1  # stands for the stream of every captured graph
_scratch: dict[tuple[torch.device, int], Scratch] = {}
_retired: list[Scratch] = []  # outgrown, but graphs may have captured their addresses


def _scratch_for(device: torch.device, slots: int, heads: int, dim: int) -> Scratch:
    """Partial results, their lse and the arrival counters (zero between launches): one set for each stream, one for all graphs of a device.

    The graphs' set must exist before a capture (where nothing can be zeroed); so graphs of one device must not run at the same time.
    """
    need = slots * ROWS * dim, slots * ROWS, heads
    fits = lambda have: have is not None and all(t.numel() >= n for t, n in zip(have, need, strict=True))  # noqa: E731
    capturing = torch.cuda.is_current_stream_capturing()
    stream = CAPTURED if capturing else torch.cuda.current_stream(device).cuda_stream
    if capturing and not fits(_scratch.get((device, CAPTURED))):
        raise CacheStateError("Run one decode step of these shapes before capturing it in a graph: the kernel's scratch memory must exist.")
    for key in () if capturing else ((device, stream), (device, CAPTURED)):
        have = _scratch.get(key)
        if fits(have):
            continue
        if have is not None:
            _retired.append(have)
        sums, lse, arrived = (2 * n for n in need)
        zeros = torch.zeros(arrived, dtype=torch.int32, device=device)
        _scratch[key] = torch.empty(sums, device=device), torch.empty(lse, device=device), zeros
    return _scratch[device, stream]


def decode_attention(
    q: Tensor,
    sets: list[HeadSet],
    scale: float,
    hidden: Tensor | None = None,
    shape: tuple[int, int] | None = None,
    min_units: int = MIN_UNITS,
    lead: int = LEAD,
) -> tuple[Tensor, Tensor]:
    """See ops.reference.decode_attention. One launch for all sets that share a layout (sets without tiles join the first).

    Raises:
        BackendError: the inputs are not covered (see `unsupported`), or the kernel cannot be compiled.
        CacheStateError: a graph is being captured before a step of these shapes has run.
    """
    if why := unsupported(q, sets):
        raise BackendError(f'The "cuda" backend does not cover {why}; use backend="triton" or "auto".')
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    layouts = list(dict.fromkeys(s.layout for s in sets if s.tiles is not None and s.tiles.shape[2])) or [None]
    total = sum(len(s.kv_heads) for s in sets)
    for i, layout in enumerate(layouts):
        part = [s for s in sets if s.layout == layout or (i == 0 and (s.layout is None or s.layout not in layouts))]
        _launch(q, part, layout, total, scale, hidden, out, lse, shape, min_units, lead)
    return out, lse


def _launch(
    q: Tensor, sets: list[HeadSet], layout: TileLayout | None, total_heads: int, scale: float, hidden: Tensor | None,
    out: Tensor, lse: Tensor, shape: tuple[int, int] | None, min_units: int, lead: int,
) -> None:  # fmt: skip
    from cuda.bindings import driver

    batch, q_heads, n_query, dim = q.shape
    group = q_heads // total_heads
    run = kernel(layout, dim, q.dtype, group, n_query, q.device, shape)
    q = q if q.stride(-1) == 1 and not any(x % 8 for x in q.stride()[:-1]) else q.contiguous()
    keep: list[Tensor] = [q]
    p = _Params()
    for i, s in enumerate(sets):
        p.sets[i] = _set(s, keep)
    heads = sum(len(s.kv_heads) for s in sets) * batch * -(-group * n_query // ROWS)
    partial, partial_lse, arrived = _scratch_for(q.device, 2 * (run.ctas + heads), heads, dim)
    p.q, p.q_b, p.q_h, p.q_t = q.data_ptr(), *q.stride()[:3]
    p.out, p.lse = out.data_ptr(), lse.data_ptr()
    if hidden is not None:
        hidden = hidden.to(torch.int64).contiguous()
        p.hidden = hidden.data_ptr()
    p.partial, p.partial_lse, p.arrived = partial.data_ptr(), partial_lse.data_ptr(), arrived.data_ptr()
    p.n_sets, p.batch, p.q_heads, p.min_units, p.lead = len(sets), batch, q_heads, min_units, lead
    p.scale_log2 = scale * LOG2E
    p.noise_log2 = 0.5 * layout.keys.spec.noise_correction * scale**2 * LOG2E if layout else 0.0
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(p))
    stream = torch.cuda.current_stream(q.device).cuda_stream
    _check(driver.cuLaunchKernel(run.function, run.ctas, 1, 1, run.warps * 32, 1, 1, run.shared, stream, ctypes.addressof(arguments), 0))
