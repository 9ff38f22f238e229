"""Packing in Triton: launchers and the tables of a layout. GPUs from sm_80, and Triton's CPU interpreter."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from ..quant.levels import GAUSSIAN_STEP
from ..quant.spec import AxisClass, channel_block
from ..quant.tile import HalfLayout
from ..quant.transforms import fixed_rotation
from . import pack_kernels as kernels

LEVELS = {"minmax": 1, "gaussian": 2, "sign": 3, "ternary": 4}  # as in the kernels
TUNING = {"num_warps": 8, "maxnreg": 128, "num_stages": 2}  # of packing: two programs for each multiprocessor
WIDE = {"num_warps": 16, "num_stages": 1}  # from 256 channels on, where one program fills the shared memory
PROGRAMS = 2
PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that add up to one of the type


def unsupported(x: Tensor) -> str | None:
    """Why these tokens [B, h, C, D] cannot be packed here, or None."""
    if x.dtype not in PARTS:
        return f"dtype {x.dtype}"
    return "tokens whose channels are not neighbours in memory" if x.stride(-1) != 1 else None


def operand_dtype() -> triton.language.dtype:
    """What the tensor cores multiply; Triton's interpreter cannot multiply bfloat16."""
    return triton.language.float32 if triton.knobs.runtime.interpret else triton.language.bfloat16


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of the GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# ------------------------------------------------------------------------------------------------------------- tables of a layout


def _level(c: AxisClass) -> int:
    return 0 if c.bits == 0 else LEVELS[c.levels]


def _direct(half: HalfLayout) -> bool:
    """Whether a program can store its planes without sorting rows through memory: the rows come in the right order already."""
    sorted_rows = half.spec.per == "token" and half.plane_slots(1) > 0
    return half.tokens == 128 and max(half.top) < 16 and not half.trit_axes[1] and not sorted_rows


def _row_order(half: HalfLayout, padded: int) -> list[int]:
    """The axis of each row of a program. Tiles of 128 tokens: the axes of one-bit slots s and s + n / 2, which share a word, are 8 rows apart."""
    ones = [s.axis + i for s in half.slots if s.bits == 1 for i in range(s.count)]
    if not _direct(half) or not ones:
        return list(range(padded))
    rows = [-1] * padded
    for p, pair in enumerate(zip(ones[: len(ones) // 2], ones[len(ones) // 2 :], strict=True)):
        rows[p // 8 * 16 + p % 8], rows[p // 8 * 16 + p % 8 + 8] = pair
    rest = iter(sorted(set(range(padded)) - set(ones)))
    return [next(rest) if axis < 0 else axis for axis in rows]


@lru_cache(maxsize=128)
def _axis_table(half: HalfLayout, padded: int, device: torch.device) -> Tensor:
    """int32 [9, padded], a column for each row of a program: 0 largest code, 1 level, 2 place among the steps and 3 among the centres (-1: none),
    4 the bits of the first step's factor, 5 axis, 6 and 7 word column of the low and the high two-bit slot (-1: none), 8 bit of the one-bit slot."""
    steps, centres = ({a: i for i, a in enumerate(axes)} for axes in (half.step_axes, half.centre_axes))
    classes = [c for c, n in zip(half.spec.classes, half.sizes, strict=True) for _ in range(n)]
    table = torch.zeros(9, padded, dtype=torch.int32)
    table[[2, 3, 6, 7]] = -1
    sigma = torch.zeros(padded)
    for row, a in enumerate(_row_order(half, padded)):
        table[5, row] = a
        if a < half.head_dim:
            table[0, row], table[1, row], table[2, row], table[3, row] = (
                half.top[a],
                _level(classes[a]),
                steps.get(a, -1),
                centres.get(a, -1),
            )
            sigma[row] = GAUSSIAN_STEP.get(classes[a].bits, 0.0)  # type: ignore[arg-type]
        for s in (s for s in half.slots if s.axis <= a < s.axis + s.count):
            if s.bits == 1:
                table[8, row] = s.weight.bit_length() - 1
            elif s.weight <= 4:
                table[6 + (s.weight == 4), row] = s.first + a - s.axis
    table[4] = sigma.view(torch.int32)
    return table.to(device)


@dataclass(frozen=True)
class Plane:
    """Slots of a bit plane by word column: int32 [slots of a word, padded columns], axis (-1: none) and bit of the code."""

    columns: int
    padded: int
    width: int
    axis: Tensor
    shift: Tensor


@lru_cache(maxsize=128)
def _plane(half: HalfLayout, bits: int, device: torch.device) -> Plane:
    per_word = 256 // half.tokens // bits
    columns = -(-half.plane_slots(bits) // per_word)
    padded = triton.next_power_of_2(columns) if columns else 1
    axis = torch.full((per_word, padded), -1, dtype=torch.int32)
    shift = torch.zeros_like(axis)
    for s in (s for s in half.slots if s.bits == bits):
        for i in range(s.count):
            where = divmod(s.first + i, columns)
            axis[where], shift[where] = s.axis + i, s.weight.bit_length() - 1
    width = math.gcd(columns, 32) if columns and half.kind == "keys" else 1
    return Plane(columns, padded, width, axis.to(device), shift.to(device))


@lru_cache(maxsize=64)
def _fixed_parts(name: str, turned: int, dim: int, device: torch.device) -> Tensor:
    """bfloat16 [2, D, D] (channel, axis) whose sum is the fixed rotation of the last `turned` channels."""
    full = torch.eye(dim)
    full[dim - turned :, dim - turned :] = fixed_rotation(name, turned).T  # type: ignore[arg-type]
    high = full.to(torch.bfloat16)
    return torch.stack([high, (full - high.float()).to(torch.bfloat16)]).to(device)


def _rotation(half: HalfLayout, basis: dict[str, Tensor], like: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """The map to the axes in bfloat16 parts: tensor, number of parts (0: none), strides of part, sequence and head."""
    if "axes" in basis:
        matrix = basis.get("forward", basis["axes"])
        matrix = matrix if matrix.stride()[-2:] == (matrix.shape[-1], 1) else matrix.contiguous()
        return matrix, 1, (0, matrix.stride(0), matrix.stride(1))
    if half.spec.transform in ("none", "principal"):
        return like, 0, (0, 0, 0)
    turned = half.sizes[-1] if half.spec.last_class_only else half.head_dim
    parts = _fixed_parts(half.spec.transform, turned, half.head_dim, like.device)
    return parts, 2, (parts.stride(0), 0, 0)


@lru_cache(maxsize=128)
def _constants(half: HalfLayout, base: int, tile_bytes: int) -> dict[str, object]:
    """What the kernel knows of a half whose bytes start at `base` of a tile."""
    at = {name: base + offset for name, (offset, _) in half.sections.items()}
    names = {"two": "TWO", "one": "ONE", "trits": "TRITS", "steps": "STEPS", "centres": "CENTRES", "factors": "FACTORS"}
    per_token = half.spec.per == "token"
    dp = max(16, triton.next_power_of_2(half.head_dim))
    levels = {_level(c) for c in half.spec.classes}
    return {
        **{constant: at[name] for name, constant in names.items()},
        "D": half.head_dim,
        "DP": dp,
        "TOKENS": half.tokens,
        "GROUP": half.tokens if per_token else half.group_size,
        "BLOCK": channel_block(half.head_dim) if per_token else 0,
        "LEVELS": sum(1 << level for level in levels),
        "FP8": half.fmt == "fp8",
        "TILE_BYTES": tile_bytes,
        "N_STEPS": half.counts[0],
        "N_CENTRES": half.counts[1],
        "FIRST_TRIT": half.trit_axes[0],
        "N_TRITS": half.trit_axes[1],
        "DIRECT": _direct(half),
        "CODE_BITS": max(t.bit_length() for t in half.top),
        "SCRATCH": 0
        if _direct(half)
        else dp * 128 + half.trit_axes[1] * half.tokens,  # bytes of a program: two words a row and axis; trits
    }


# ------------------------------------------------------------------------------------------------------------- launching


def pack_half(
    x: Tensor, tiles: Tensor, jobs: Tensor, most: int, due: bool, half: HalfLayout, base: int, basis: dict[str, Tensor],
    skip: Tensor | None, weight: Tensor | None, kept: Tensor | None, error: Tensor | None, status: Tensor,
    tuning: dict[str, int] | None = None, programs: int = PROGRAMS,
) -> None:  # fmt: skip
    """See ops.pack.pack_with_kernels."""
    batch, heads = x.shape[:2]
    device = x.device
    numbers = _constants(half, base, tiles.shape[-1])
    dp = int(numbers["DP"])  # type: ignore[call-overload]
    two, one = (_plane(half, bits, device) for bits in (2, 1))
    matrix, parts, strides = _rotation(half, basis, x)
    workers = min(most, -(-multiprocessors(device) * programs // (batch * heads)))
    left_out = 0 if skip is None else skip.shape[2]
    scratch = torch.empty(batch * heads * workers * int(numbers["SCRATCH"]), dtype=torch.uint8, device=device)  # type: ignore[call-overload]
    kernels.pack_tiles[(workers, batch * heads)](
        x, x if weight is None else weight, matrix, basis.get("order", x), basis.get("mean", x), x if skip is None else skip, jobs, tiles,
        x if kept is None else kept, x if error is None else error, status, scratch, _axis_table(half, dp, device), two.axis, two.shift, one.axis,
        one.shift, *x.stride()[:3], *((0, 0) if weight is None else weight.stride()[:2]), *strides, *tiles.stride()[:2], batch, heads,
        0 if kept is None else kept.shape[2],
        DUE=due, SKIP=left_out, SKIP_PADDED=triton.next_power_of_2(max(left_out, 1)), WEIGHTED=weight is not None, KEEP=kept is not None, DOT=operand_dtype(),
        X_PARTS=PARTS[x.dtype], MATRIX=parts, ORDER="order" in basis, MEAN="mean" in basis, TWO_COLUMNS=two.columns, TWO_PADDED=two.padded,
        TWO_WIDTH=two.width, ONE_COLUMNS=one.columns, ONE_PADDED=one.padded, ONE_WIDTH=one.width, **numbers,
        **(tuning or (TUNING if dp < 256 else WIDE)),
    )  # fmt: skip
