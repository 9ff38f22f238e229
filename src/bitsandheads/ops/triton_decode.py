"""Decode attention in Triton: every layout whose keys are coded per channel, on GPUs from sm_80 and in Triton's CPU interpreter.

Four kernels for each part of a layer (a head set, and each of its extra parts): queries are rotated into the axes of the codes; splits of the packed
tiles and of the whole-precision tokens are attended; the splits are merged; the result is rotated back. The codes are operand A of the tensor cores as fp16
subnormals: `word & (3 << p)` is code * 2^(p - 24) (docs/kernels.md). Shape letters: B sequences, Hq query heads, h KV heads of a set, Q query tokens,
D head_dim, N query rows of a program, S splits.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..errors import BackendError
from ..quant.spec import channel_block
from ..quant.tile import HalfLayout, TileLayout
from . import triton_kernels as kernels
from .heads import HeadSet
from .rotations import rotation_matrix

MAX_SPLITS = 256
PACKED_WARPS = 1  # of a program over packed tiles with 8 query rows
STAGES = 3  # tiles of a program: one in work, the others on their way
WARPS = 1056  # warps that fill the GPU: eight for each multiprocessor of an H100
WARPS_WITH_TRITS = 924  # the copies of their bytes ahead leave shared memory for seven
LOG2E = 1.4426950408889634
FAR_BACK = 1 << 30


# ------------------------------------------------------------------------------------------------------------- what is covered


def unsupported(q: Tensor, sets: list[HeadSet]) -> str | None:
    """Why these inputs (q [B, Hq, Q, D]) cannot run here, or None. Reads shapes and dtypes only."""
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {q.dtype}"
    for s in sets:
        for part in (s, *s.extra):
            if part.layout is not None and part.layout.keys.spec.per == "token":
                return 'keys with per="token"'
    return None


# ------------------------------------------------------------------------------------------------------------- tables of a layout


def _power_of_two(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(n)) if n else 0


@dataclass(frozen=True)
class HalfTables:
    """Where the slots of a half lie, as tensors: by plane (two-bit, one-bit, trits), slot of a word and word column, `columns` padded.

    axis, step: int32; weight: float32, 0 for padding. For per="token" steps are found by token.
    """

    columns: tuple[int, int, int]
    real: tuple[int, int, int]
    axis: Tensor
    step: Tensor
    weight: Tensor
    slots: int  # of all planes, with padding


@lru_cache(maxsize=128)
def _tables(half: HalfLayout, device: torch.device) -> HalfTables:
    position = {axis: i for i, axis in enumerate(half.step_axes)}
    planes: list[tuple[list[tuple[int, float]], int]] = []  # slots, and how many a word has
    for bits in (2, 1):
        slots = [(s.axis + i, float(s.weight)) for s in half.slots if s.bits == bits for i in range(s.count)]
        planes.append((slots, 256 // half.tokens // bits))
    first, count = half.trit_axes
    planes.append(([(first + i, 1.0) for i in range(count)], 128 // half.tokens))
    columns = tuple(_power_of_two(triton.cdiv(len(plane), per_word)) for plane, per_word in planes)
    axis, step, weight = [], [], []
    for (plane, per_word), size in zip(planes, columns, strict=True):
        real = triton.cdiv(len(plane), per_word)
        for e in range(per_word if plane else 0):
            part = plane[e * real : (e + 1) * real]
            rows = part + [(plane[0][0], 0.0)] * (size - len(part))
            axis += [a for a, _ in rows]
            step += [position.get(a, 0) for a, _ in rows]
            weight += [w for _, w in rows]
    put = lambda x, dtype: torch.tensor(x or [0], dtype=dtype, device=device)  # noqa: E731
    sizes = tuple(len(plane) for plane, _ in planes)
    return HalfTables(columns, sizes, put(axis, torch.int32), put(step, torch.int32), put(weight, torch.float32), len(axis))  # type: ignore[arg-type]


@lru_cache(maxsize=128)
def _collect(half: HalfLayout, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """For the merge: which partial sums make an axis, int32 [D, 4] (-1: none), and their weights float32 [D, 4]."""
    tables = _tables(half, device)
    total = tables.slots
    index = [[-1] * 4 for _ in range(half.head_dim)]
    weights = [[0.0] * 4 for _ in range(half.head_dim)]
    used = [0] * half.head_dim
    for slot, (a, w) in enumerate(zip(tables.axis.tolist()[:total], tables.weight.tolist()[:total], strict=True)):
        if w > 0:
            index[a][used[a]], weights[a][used[a]] = slot, w
            used[a] += 1
    centres = half.centre_axes if half.spec.per == "channel" else list(range(half.head_dim))
    if half.counts[1] or half.spec.per == "token":  # with per="token" what steps and centres add to all channels of a block
        for i, a in enumerate(centres):
            index[a][used[a]], weights[a][used[a]] = total + i, 1.0
    return torch.tensor(index, dtype=torch.int32, device=device), torch.tensor(weights, device=device), total


@lru_cache(maxsize=128)
def _terms(half: HalfLayout, device: torch.device) -> int:
    """Partial sums that make an axis, at most."""
    return max(1, int((_collect(half, device)[0] >= 0).sum(1).max()))


# ------------------------------------------------------------------------------------------------------------- launching


@lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@lru_cache(maxsize=128)
def _centre_index(half: HalfLayout, padded: int, device: torch.device) -> Tensor:
    axes = half.centre_axes if half.counts[1] else []
    return torch.tensor((axes + [0] * padded)[: max(padded, 1)], dtype=torch.int32, device=device)


def _half_arguments(half: HalfLayout, base: int, letter: str, device: torch.device) -> tuple[dict[str, int], HalfTables]:
    tables = _tables(half, device)
    at = {name: base + offset for name, (offset, _) in half.sections.items()}
    centres = half.counts[1] if half.spec.per == "channel" else half.head_dim
    numbers = {
        "TWO": at["two"],
        "ONE": at["one"],
        "TRIT": at["trits"],
        "STEPS": at["steps"],
        "CENTRES": at["centres"],
        "FACTORS": at["factors"],
    }
    out = {f"{letter}_{k}": v for k, v in numbers.items()}
    for plane, real, padded in zip("213", tables.real, tables.columns, strict=True):
        out |= {f"{letter}{plane}": real, f"{letter}{plane}P": padded}
    return out | {f"{letter}C": centres, f"{letter}CP": _power_of_two(centres), f"{letter}N": half.counts[0]}, tables


def _rotation_arguments(
    half: HalfLayout | None, basis: dict[str, Tensor], like: Tensor, used: bool
) -> tuple[dict[str, object], dict[str, object]]:
    matrix = rotation_matrix(half, basis, like.device) if half is not None and used else None
    parts = {k: basis.get(k) if used else None for k in ("order", "mean", "noise")}
    flags: dict[str, object] = {"MATRIX": matrix is not None, **{k.upper(): v is not None for k, v in parts.items()}}
    tensors = {k: like if v is None else v.contiguous() for k, v in parts.items()} | {"matrix": like if matrix is None else matrix}
    strides = (matrix.stride(0), matrix.stride(1)) if matrix is not None and matrix.dim() == 4 else (0, 0)
    return {**tensors, "m_b": strides[0], "m_h": strides[1]}, flags


def _attend_part(
    q: Tensor,
    s: HeadSet,
    kv_heads: tuple[int, ...],
    group: int,
    scale: float,
    hidden: Tensor | None,
    window: int | None,
    out: Tensor,
    lse: Tensor,
    warps: int | None,
) -> None:
    batch, q_heads, n_query, dim = q.shape
    h, device = len(kv_heads), q.device
    dp = triton.next_power_of_2(dim)
    rows = 8 if group * n_query <= 8 else 16
    blocks = triton.cdiv(group * n_query, rows)
    used = s.tiles is not None and s.layout is not None and s.tiles.shape[2] > 0
    index = _numbers(kv_heads, device)
    count = _numbers(tuple(range(max(dp, 16))), device)
    numbers: dict[str, object] = {}
    width = dp
    warps = warps or (PACKED_WARPS if used and rows == 8 else 4)
    raw_tokens = 16 * warps
    units = triton.cdiv(s.tail_k.shape[2], raw_tokens)
    layout: TileLayout | None = s.layout if used else None
    axes = constant = row_scale = k_axis = k_step = k_weight = k_centre = v_step = q
    if layout is not None and s.tiles is not None:
        k_numbers, k_tables = _half_arguments(layout.keys, 0, "K", device)
        v_numbers, v_tables = _half_arguments(layout.values, layout.keys.nbytes, "V", device)
        width += v_tables.slots + int(v_numbers["VCP"])
        units += s.tiles.shape[2]
        axes = torch.empty(batch * h * blocks * rows, dim, device=device)
        constant, row_scale = torch.empty(2, batch * h * blocks * rows, device=device)
        tensors, flags = _rotation_arguments(layout.keys, s.key_basis, q, True)
        exact = layout.keys.spec.transform == "principal" and q.dtype != torch.float32  # 16-bit numbers are exact in tf32
        precision = "tf32" if exact else "tf32x3"
        peak = (128.0 if layout.keys.fmt == "fp8" else 1.0) / max([x.weight for x in layout.keys.slots] or [1])
        kernels.rotate_query[(batch * h, blocks)](
            q, axes, constant, row_scale, tensors["matrix"], tensors["order"], tensors["mean"], tensors["noise"], *q.stride()[:3],
            tensors["m_b"], tensors["m_h"], h, index, scale * LOG2E, 0.5 * layout.keys.spec.noise_correction * scale**2 * LOG2E, peak,
            GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, BLOCK=min(dp, 16384 // dp), PRECISION=precision, num_warps=8, **flags,
        )  # fmt: skip
        k_axis, k_step, k_weight, v_step = k_tables.axis, k_tables.step, k_tables.weight, v_tables.step
        k_centre = _centre_index(layout.keys, int(k_numbers["KCP"]), device)
        columns = {bits: triton.cdiv(layout.keys.plane_slots(bits), 256 // layout.tokens // bits) for bits in (2, 1)}
        per_token = layout.values.spec.per == "token"
        numbers = {
            **k_numbers,
            **v_numbers,
            "W2": _gcd32(columns[2]),
            "W1": _gcd32(columns[1]),
            "PER_TOKEN": per_token,
            "V_CENTRED": layout.values.counts[1] > 0,
            "RESIDUAL": layout.keys.spec.transform != "principal",
        }
        numbers |= {"VBLOCK": channel_block(dim), "V_TOP": layout.values.top[0], "TILE_BYTES": layout.nbytes, "TOKENS": layout.tokens}
        numbers |= {"GROUPS": layout.keys.groups, "FP8": layout.keys.fmt == "fp8"}
    else:
        numbers = dict.fromkeys(_TILE_NUMBERS, 0)
    filling = WARPS_WITH_TRITS if layout is not None and layout.values.trit_axes[1] else WARPS
    splits = max(1, min(MAX_SPLITS, units, filling // warps // (batch * h * blocks)))
    partial = torch.empty(batch * h * blocks * splits * rows, width, device=device)
    stats = torch.empty(batch * h * blocks * splits * rows, 4, device=device)
    sink = s.sink_k is not None and s.sink_k.shape[2] > 0
    sink_k = s.sink_k if sink and s.sink_k is not None else s.tail_k
    sink_v = s.sink_v if sink and s.sink_v is not None else s.tail_v
    kernels.attend[(splits, batch * h, blocks)](
        q, axes, constant, row_scale, s.tiles if used else q, sink_k, sink_v, s.tail_k, s.tail_v, s.lengths, q if hidden is None else hidden,
        partial, stats, index, k_axis, k_step, k_weight, k_centre, v_step, count, *q.stride()[:3],
        *(s.tiles.stride()[:2] if used and s.tiles is not None else (0, 0)), *sink_k.stride()[:2], *s.tail_k.stride()[:2],
        batch, h, window or FAR_BACK, scale * LOG2E,
        GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, WIDTH=width, RAW=raw_tokens, SINK=sink, HIDDEN=hidden is not None, TILES=used,
        num_warps=warps, num_stages=STAGES, **numbers,
    )  # fmt: skip
    merged = torch.empty(batch * h * blocks * rows, width, device=device)
    merged_stats = torch.empty(batch * h * blocks * rows, 4, device=device)
    kernels.reduce[(batch * h * blocks, width // 16)](
        partial, stats, merged, merged_stats, splits, ROWS=rows, WIDTH=width, DP=dp, CHUNK=16, TOGETHER=64, STATS=MAX_SPLITS, num_warps=4
    )
    tensors, flags = _rotation_arguments(layout.values if layout else None, s.value_basis, q, used)
    flags.pop("NOISE")
    collect, weights, _ = _collect(layout.values, device) if layout else (q, q, 0)
    terms = _terms(layout.values, device) if layout else 1
    block = min(dp, 32)
    kernels.finish[(batch * h, blocks, dp // block)](
        merged, merged_stats, out, lse, collect, weights, tensors["matrix"], tensors["order"], tensors["mean"], tensors["m_b"], tensors["m_h"],
        h, index, q_heads, GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, WIDTH=width, TILES=used, TERMS=terms, BLOCK=block, num_warps=2, **flags,
    )  # fmt: skip


_TILE_NUMBERS = [f"{x}_{n}" for x in "KV" for n in ("TWO", "ONE", "TRIT", "STEPS", "CENTRES", "FACTORS")]
_TILE_NUMBERS += [f"{x}{n}" for x in "KV" for n in ("2", "1", "3", "C", "2P", "1P", "3P", "CP", "N")]
_TILE_NUMBERS += ["W2", "W1", "PER_TOKEN", "V_CENTRED", "RESIDUAL", "VBLOCK", "V_TOP", "TILE_BYTES", "TOKENS", "GROUPS", "FP8"]


def _gcd32(n: int) -> int:
    return max(1, min(32, n & -n)) if n else 1


def decode_attention(
    q: Tensor, sets: list[HeadSet], scale: float, hidden: Tensor | None = None, warps: int | None = None
) -> tuple[Tensor, Tensor]:
    """See ops.reference.decode_attention. Four launches for each set (and for each of its extra parts); `warps` of a
    program are chosen unless given.

    Raises:
        BackendError: the inputs are not covered (see `unsupported`).
    """
    if why := unsupported(q, sets):
        raise BackendError(f'The "triton" backend does not cover {why}; use backend="reference" or "auto".')
    q = q if q.stride(-1) == 1 else q.contiguous()
    group = q.shape[1] // sum(len(s.kv_heads) for s in sets)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    for s in sets:
        _attend_part(q, s, s.kv_heads, group, scale, hidden, s.window, out, lse, warps)
    if any(s.extra for s in sets):
        for depth in range(max(len(s.extra) for s in sets)):
            more, more_lse = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
            for s in sets:
                if depth < len(s.extra):
                    _attend_part(q, s.extra[depth], s.kv_heads, group, scale, hidden, None, more, more_lse, warps)
            total = torch.logaddexp(lse, more_lse)
            out = out * (lse - total).exp()[..., None] + more * (more_lse - total).exp()[..., None]
            lse = total
    return out.to(q.dtype), lse
