"""Decode attention in CUDA C++ for Hopper: `decode_sm90.cu`, compiled for one tile layout at first use.

The source is compiled with NVRTC for the layout's tables (as constants), and the result is kept on disk under the hash of everything that
went into it. Shape letters: B sequences, Hq query heads, h KV heads of a set, Q query tokens, D head_dim.
Longer than other files: tables, bytes of shared memory and arguments mirror the source, and are read side by side with it.
"""

import ctypes
import hashlib
import logging
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..quant.tile import HalfLayout, TileLayout
from .heads import HeadSet
from .rotations import rotation_matrix

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("decode_sm90.cu")
MAX_SETS, MAX_HEADS, MAX_ENTRIES, ROWS = 4, 128, 256, 8  # as in the source
MERGE_THREADS = 256  # as in the source
MERGE_ROWS = 1, 4  # query rows of a CTA of merge_1, merge_4
MANY_HEADS = 64  # of a launch, from which merge_4 is faster
SHARED_LIMIT = 227 * 1024
# Warps of a CTA of attend, stages of a warp's copies, registers of a thread
MANY = 12, 2, 168  # reads fastest
FEW = 8, 3, 176  # leaves room for merge beside it, which then starts early
SEVEN = 7, 2, 255  # reads 12% faster than four warps where eight do not fit, but is 10% slower to start
LARGER = (8, 3, 255), (8, 2, 255), SEVEN, (4, 3, 255), (4, 2, 255), (4, 1, 255)  # where the tiles of MANY do not fit
MANY_TILES = 12  # for each multiprocessor: from here on MANY
RUN = 8
LOG2E = 1.4426950408889634


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
        if len(s.extra) > 1:
            return f"{len(s.extra)} packed parts with other value codes (one)"
        for part in (s, *s.extra):
            if part.layout is not None and (why := _unsupported_layout(part.layout)):
                return why
        for name, t in (("sink", s.sink_k), ("sink", s.sink_v), ("tail", s.tail_k), ("tail", s.tail_v)):
            if t is not None and (t.dtype != q.dtype or t.stride(-1) != 1 or t.stride(-2) != dim or any(x % 8 for x in t.stride()[:2])):
                return f"a {name} of dtype {t.dtype} and strides {t.stride()} (the query's dtype, rows of D elements)"
    return None


@lru_cache(maxsize=256)
def _unsupported_layout(layout: TileLayout) -> str | None:
    for half in (layout.keys, layout.values):
        if half.spec.per == "token" and half.kind == "keys":
            return 'keys with per="token"'
        if half.trit_axes[1] and half.kind == "keys":
            return "keys as trits"
        if half.tokens not in (32, 64, 128):
            return f"tiles of {half.tokens} tokens (32, 64 or 128)"
        if half.plane_slots(2) + half.plane_slots(1) + half.trit_axes[1] == 0:
            return f"{half.kind} without codes"
        for bits in (1, 2):
            if half.plane_slots(bits) % (_slots_per_word(half, bits) * RUN):
                return f"{half.kind} with {half.plane_slots(bits)} slots of {bits} bits (a multiple of {_slots_per_word(half, bits) * RUN})"
        if half.trit_axes[1] % (_slots_per_word(half, 2) * RUN):
            return f"{half.kind} with {half.trit_axes[1]} ternary axes (a multiple of {_slots_per_word(half, 2) * RUN})"
    if _shape(layout)[1] == 0:
        return f"tiles of {layout.nbytes} bytes"
    return None


# ------------------------------------------------------------------------------------------------------------- constants of a layout


def _slots_per_word(half: HalfLayout, bits: int) -> int:
    return 256 // half.tokens // bits


def _columns(half: HalfLayout, bits: int) -> int:
    """Words of a row of a plane."""
    return half.plane_slots(bits) // _slots_per_word(half, bits)


def _slot_runs(half: HalfLayout, bits: int) -> list[tuple[int, int]]:
    """(first axis, weight) of every run of 8 slots of a plane."""
    return [(axis, s.weight) for s in half.slots if s.bits == bits for axis in range(s.axis, s.axis + s.count, RUN)]


def _table(kind: str, name: str, values: Sequence[float]) -> str:
    items = ", ".join(repr(v) + "f" if kind == "float" else str(v) for v in values) or "0"
    return f"__constant__ constexpr {kind} {name}[] = {{{items}}};"


def _basis_flags(half: HalfLayout | None) -> str:
    """Which parts of a basis this half has."""
    spec = half.spec if half else None
    principal = spec is not None and spec.transform == "principal"
    fixed = spec is not None and spec.transform not in ("none", "principal")
    flags = {"MATRIX": principal or fixed, "RESIDUAL": fixed, "MEAN": principal, "NOISE": spec is not None and spec.noise_correction > 0}
    flags["ORDER"] = spec is not None and not principal and spec.order != "none"
    return "constexpr bool " + ", ".join(f"{k} = {str(v).lower()}" for k, v in flags.items()) + ";"


def _namespace(half: HalfLayout, base: int, tables: list[str]) -> str:
    """What the source knows of a half that lies at byte `base` of the tile."""
    constants = {name.upper(): base + half.sections[name][0] for name in ("two", "one", "trits", "steps", "centres", "factors")}
    constants |= {"N_STEPS": half.counts[0], "N_CENTRES": half.counts[1]}
    for bits in (2, 1):
        constants |= {f"C{bits}": _columns(half, bits), f"E{bits}": _slots_per_word(half, bits)}
    constants |= {"C3": half.trit_axes[1] // _slots_per_word(half, 2), "E3": _slots_per_word(half, 2)}
    constants["TOKEN_TOP"] = half.top[0] if half.spec.per == "token" else 0
    numbers = "constexpr int " + ", ".join(f"{k} = {v}" for k, v in constants.items()) + ";"
    return "\n".join([f"namespace {half.kind} {{", numbers, _basis_flags(half), *tables, "}"])


def _key_constants(half: HalfLayout) -> tuple[dict[str, int], list[str]]:
    """Tables of pairs of k-chunks: 32 word columns of a plane and one of the slots in their words; 8 columns for each l4 (a quarter of the lanes)."""
    reads, axes, weights = [], [], []
    step = {axis: i for i, axis in enumerate(half.step_axes)}
    for bits, plane in ((2, "two"), (1, "one")):
        runs, columns = _slot_runs(half, bits), _columns(half, bits)
        width = math.gcd(columns, 32)
        for block in range(0, columns, 32):
            for e in range(_slots_per_word(half, bits)):
                for column in range(block, block + 32, RUN):
                    there = column < columns
                    column = column if there else 0
                    axis, weight = runs[(e * columns + column) // RUN]
                    word = half.sections[plane][0] + 2 * (column // width * 16 * width + column % width)
                    reads.append(word | step[axis] << 16)
                    axes.append(axis)
                    weights.append(weight / 2 ** (e * bits) if there else 0.0)
    pairs = len(reads) // 4
    centres = half.centre_axes[::RUN]
    missing = -len(centres) % 4
    axes += centres + [0] * missing
    weights += [1.0] * len(centres) + [0.0] * missing
    tables = [_table("unsigned int", "reads", reads), _table("int", "axis", axes), _table("float", "weight", weights)]
    return {"K_PAIRS": pairs, "K_CENTRES": len(axes) // 4 - pairs}, tables


def _value_tables(half: HalfLayout) -> list[str]:
    first, count = half.trit_axes
    runs = [run for bits in (2, 1) for run in _slot_runs(half, bits)] + [(axis, 1) for axis in range(first, first + count, RUN)]
    step = {axis: i // RUN for i, axis in enumerate(half.step_axes)}
    centre = {axis: i // RUN for i, axis in enumerate(half.centre_axes)}
    coded = {axis for axis, _ in runs}
    axes = range(0, half.head_dim, RUN)
    tables = {
        "run_axis": [axis // RUN for axis, _ in runs],
        "run_shift": [weight.bit_length() - 1 for _, weight in runs],
        "run_step": [step[axis] for axis, _ in runs],
        "centre_run": [centre.get(axis, -1) for axis in axes],
        "coded": [int(axis in coded) for axis in axes],
    }
    return [_table("int", name, values) for name, values in tables.items()]


@lru_cache(maxsize=256)
def _constants(layout: TileLayout | None) -> tuple[dict[str, Any], str]:
    """Macros and tables of a layout (None: whole precision only)."""
    if layout is None:
        flags = "".join(f"namespace {name} {{ {_basis_flags(None)} }}\n" for name in ("keys", "values"))
        return {"HAS_TILES": 0, "TILE_BYTES": 0}, flags
    keys, values = layout.keys, layout.values
    pairs, key_tables = _key_constants(keys)
    residual = keys.spec.transform != "principal" and keys.counts[1] > 0
    peak = (128.0 if keys.fmt == "fp8" else 1.0) / max(s.weight for s in keys.slots)
    numbers = {
        "HAS_TILES": 1,
        "FIELDS": layout.tokens // 16,
        "GROUPS": keys.groups,
        "META_FP8": int(keys.fmt == "fp8"),
        "QUERY_PEAK": f"{peak}f",
    }
    numbers |= {"CENTRE_RESIDUAL": int(residual), "TILE_BYTES": layout.nbytes, **pairs}
    return numbers, _namespace(keys, 0, key_tables) + "\n" + _namespace(values, keys.nbytes, _value_tables(values))


def _fixed_shared_bytes(layout: TileLayout | None, dim: int, warps: int, stages: int) -> int:
    """At least the size of `Shared` in the source."""
    decoded = head = 16
    if layout is not None:
        keys, values = (half.groups * sum(half.counts) for half in (layout.keys, layout.values))
        trits = 16 * layout.values.trit_axes[1] // _slots_per_word(layout.values, 2)
        decoded = 4 * values + (2 * keys if layout.keys.fmt == "fp8" else 0) + 20 * -(-trits // 10)
        numbers = _constants(layout)[0]
        head = 512 * (numbers["K_PAIRS"] + numbers["K_CENTRES"] * (1 + numbers["CENTRE_RESIDUAL"]))
    per_warp = -(-max(ROWS * (dim + 4) * 4, decoded) // 16) * 16 + ROWS * 8 + stages * 8
    return head + warps * (per_warp + 32) + ROWS * 8 + 4 * (6 * MAX_ENTRIES + 4) + 32


def _shared_bytes(layout: TileLayout | None, dim: int, warps: int, stages: int) -> int:
    """Dynamic shared memory of a CTA of attend."""
    return _fixed_shared_bytes(layout, dim, warps, stages) + (warps * stages * layout.nbytes if layout else 0)


@lru_cache(maxsize=256)
def _shape(layout: TileLayout | None, many: bool = True) -> tuple[int, int, int]:
    """Warps of a CTA of attend, stages of a warp's copies, registers of a thread; `many`: tiles for a multiprocessor. Stages 0: nothing fits."""
    if layout is None:
        return 8, 1, 255
    fits = [shape for shape in (MANY, *LARGER) if _shared_bytes(layout, layout.keys.head_dim, *shape[:2]) <= SHARED_LIMIT]
    if fits and not many:
        return FEW if fits[0] == MANY else next(shape for shape in fits if shape != SEVEN)
    return fits[0] if fits else (4, 0, 0)


@lru_cache(maxsize=256)
def source(layout: TileLayout | None, dim: int, dtype: torch.dtype, group: int, n_query: int, many: bool = True) -> str:
    """The kernels' source with the constants of `layout` (None: whole precision only) in front."""
    numbers, tables = _constants(layout)
    warps, stages, registers = _shape(layout, many)
    fixed = {
        "HEAD_DIM": dim,
        "MODEL_FP16": int(dtype == torch.float16),
        "GROUP": group,
        "N_QUERY": n_query,
        "WARPS": warps,
        "STAGES": stages,
    }
    fixed |= {
        "SHARED_BYTES": _fixed_shared_bytes(layout, dim, warps, stages),
        "PARAMS_BYTES": ctypes.sizeof(_Params),
        "MAX_REGISTERS": registers,
    }
    defines = [f"#define {k} {v}" for k, v in (fixed | numbers).items()]
    return "\n".join([*defines, tables, SOURCE.read_text()])


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
class Kernels:
    """The loaded kernels of one layout and how they are launched."""

    attend: Any
    merge: tuple[Any, Any]  # by MERGE_ROWS
    ctas: int
    threads: int
    shared: int


def _check(result: tuple[Any, ...]) -> Any:
    from cuda.bindings import driver

    if int(result[0]):
        raise BackendError(f"CUDA driver: {driver.cuGetErrorString(result[0])[1].decode()}.")
    return result[1] if len(result) == 2 else result[1:]


@lru_cache(maxsize=128)
def kernels(layout: TileLayout | None, dim: int, dtype: torch.dtype, group: int, n_query: int, many: bool, device: torch.device) -> Kernels:
    """Compile (or read) and load the kernels for one layout."""
    from cuda.bindings import driver

    properties = torch.cuda.get_device_properties(device)
    cubin = cached_cubin(source(layout, dim, dtype, group, n_query, many), f"sm_{properties.major}{properties.minor}")
    warps, stages, _ = _shape(layout, many)
    shared = _shared_bytes(layout, dim, warps, stages)
    with torch.cuda.device(device):
        module = _check(driver.cuModuleLoadData(cubin))
        attend, *merge = (_check(driver.cuModuleGetFunction(module, name)) for name in (b"attend", b"merge_1", b"merge_4"))
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver.cuFuncSetAttribute(attend, limit, shared))
    return Kernels(attend, (merge[0], merge[1]), properties.multi_processor_count, warps * 32, shared)


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
        ("partial", _P), ("stats", _P), ("slots", _P),
        ("n_sets", _I), ("batch", _I), ("q_heads", _I),
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


def decode_attention(q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See ops.reference.decode_attention. Two launches for all sets that share a layout (sets without tiles join the first). Salient tokens, whose values have
    other codes, are attended to by themselves, and both results are merged by their lse.

    Raises:
        BackendError: the inputs are not covered (see `unsupported`), or the kernels cannot be compiled.
    """
    if why := unsupported(q, sets):
        raise BackendError(f'The "cuda" backend does not cover {why}; use backend="triton" or "auto".')
    group = q.shape[1] // sum(len(s.kv_heads) for s in sets)
    out, lse = _attend(q, [replace(s, extra=()) for s in sets], group, scale, hidden)
    salient = [replace(part, kv_heads=s.kv_heads) for s in sets for part in s.extra]
    if not salient:
        return out, lse
    more, more_lse = _attend(q, salient, group, scale, hidden, all_heads=len(salient) == len(sets))
    weight = torch.sigmoid(more_lse - lse)[..., None]
    return torch.lerp(out.float(), more.float(), weight).to(q.dtype), torch.logaddexp(lse, more_lse)


def _attend(
    q: Tensor, sets: list[HeadSet], group: int, scale: float, hidden: Tensor | None, all_heads: bool = True
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of these sets; where not all heads have one, the others have nothing to attend to."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    if not all_heads:
        out.zero_()
        lse.fill_(-torch.inf)
    layouts = list(dict.fromkeys(s.layout for s in sets if s.tiles is not None and s.tiles.shape[2])) or [None]
    for i, layout in enumerate(layouts):
        part = [s for s in sets if s.layout == layout or (i == 0 and (s.layout is None or s.layout not in layouts))]
        _launch(q, part, layout, group, scale, hidden, out, lse)
    return out, lse


def _launch(
    q: Tensor, sets: list[HeadSet], layout: TileLayout | None, group: int, scale: float, hidden: Tensor | None, out: Tensor, lse: Tensor
) -> None:  # fmt: skip
    batch, q_heads, n_query, dim = q.shape
    blocks = -(-group * n_query // ROWS)
    # the lengths are known to the device alone: by the tiles there is room for
    room = sum(len(s.kv_heads) * s.tiles.shape[2] for s in sets if s.tiles is not None) * batch * blocks
    many = layout is not None and room >= MANY_TILES * torch.cuda.get_device_properties(q.device).multi_processor_count
    run = kernels(layout, dim, q.dtype, group, n_query, many, q.device)
    q = q if q.stride(-1) == 1 and not any(x % 8 for x in q.stride()[:-1]) else q.contiguous()
    keep: list[Tensor] = [q]
    p = _Params()
    for i, s in enumerate(sets):
        p.sets[i] = _set(s, keep)
    heads = sum(len(s.kv_heads) for s in sets) * batch * blocks
    results = (run.ctas + 2 * heads) * 2 * ROWS
    scratch = torch.empty(results * (4 * dim + 8) + heads * 8, dtype=torch.uint8, device=q.device)
    p.partial = scratch.data_ptr()
    p.stats = p.partial + results * 4 * dim
    p.slots = p.stats + results * 8
    p.q, p.q_b, p.q_h, p.q_t = q.data_ptr(), *q.stride()[:3]
    p.out, p.lse = out.data_ptr(), lse.data_ptr()
    if hidden is not None:
        hidden = hidden.to(torch.int64).contiguous()
        p.hidden = hidden.data_ptr()
    p.n_sets, p.batch, p.q_heads = len(sets), batch, q_heads
    p.scale_log2 = scale * LOG2E
    p.noise_log2 = 0.5 * layout.keys.spec.noise_correction * scale**2 * LOG2E if layout else 0.0
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(p))
    stream = torch.cuda.current_stream(q.device).cuda_stream
    together = heads >= MANY_HEADS
    _start(run.attend, run.ctas, run.threads, run.shared, stream, arguments, early=False)
    _start(run.merge[together], heads * (ROWS // MERGE_ROWS[together]), MERGE_THREADS, 0, stream, arguments, early=True)


def _start(function: Any, grid: int, threads: int, shared: int, stream: int, arguments: Any, early: bool) -> None:
    """Launch a kernel; `early`: it may start while the one before runs, and waits for its end by itself."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared, stream
    if early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
    _check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(arguments), 0))
