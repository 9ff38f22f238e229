"""Tiles -> tokens in Triton, in one launch: what `HalfLayout.read` does in a hundred. Long chunks of new tokens read their history so."""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..quant import planes
from ..quant.metadata import itemsize
from ..quant.spec import channel_block
from ..quant.tile import HalfLayout
from .triton_kernels import _factor, _stored

PAIRS = 3  # two-bit slots of an axis, at most
NONE = -1


@triton.jit
def _word(tile, table, number: tl.constexpr, axis, row, SECTION: tl.constexpr, ROW: tl.constexpr, DP: tl.constexpr):
    """The words [16 rows, DP axes] of a slot of each axis, shifted down to its field 0."""
    at = tl.load(table + 2 * number * DP + axis)[None]
    word = tl.load((tile + SECTION).to(tl.pointer_type(tl.int16)) + at + row[:, None] * ROW, mask=at >= 0, other=0).to(tl.int32)
    return word >> tl.load(table + (2 * number + 1) * DP + axis)[None]


@triton.jit
def _trits(tile, first, n):
    """The n-th trits of a plane, 0 where an axis has none."""
    digit = n % 5
    byte = tl.load(tile + n // 5, mask=first >= 0, other=0).to(tl.int32)
    by = tl.where(digit == 0, 512, tl.where(digit == 1, 171, tl.where(digit == 2, 57, 19)))  # byte // 3^digit, see quant/planes.py
    part = tl.where(digit == 4, (byte * 203) >> 14, (byte * by) >> 9)
    return part - ((part * 171) >> 9) * 3


@triton.jit
def restore(tiles, out, table, t_b, t_h, heads, BYTES: tl.constexpr, TWO: tl.constexpr, ONE: tl.constexpr, TRITS: tl.constexpr,
            STEPS: tl.constexpr, CENTRES: tl.constexpr, FACTORS: tl.constexpr, N_STEPS: tl.constexpr, N_CENTRES: tl.constexpr,
            ROW2: tl.constexpr, ROW1: tl.constexpr, E2: tl.constexpr, E1: tl.constexpr, USED: tl.constexpr, HAS_ONE: tl.constexpr,
            HAS_TRITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, FP8: tl.constexpr, D: tl.constexpr,
            DP: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """One tile: axes [TOKENS, D]. Program (tile, sequence and head). BLOCK: channels that share a token's step; 0: steps for each axis and GROUP tokens."""
    bh = tl.program_id(1).to(tl.int64)
    tile = tiles + bh // heads * t_b + bh % heads * t_h + tl.program_id(0) * BYTES
    to = out + (bh * tl.num_programs(0) + tl.program_id(0)) * TOKENS * D
    axis = tl.arange(0, DP)
    row = tl.arange(0, 16)
    there = axis < D
    numbers = table + 2 * (PAIRS + 1) * DP + axis
    weight, trit, step_at, centre_at = tl.load(numbers), tl.load(numbers + DP), tl.load(numbers + 2 * DP), tl.load(numbers + 3 * DP)
    half = tl.load(numbers + 4 * DP).to(tl.float32)[None] * 0.5
    pairs = ()
    for j in tl.static_range(USED):
        pairs = pairs + (_word(tile, table, j, axis, row, TWO, ROW2, DP),)  # noqa: RUF005
    if HAS_ONE:
        single = _word(tile, table, PAIRS, axis, row, ONE, ROW1, DP)
    for f in tl.static_range(TOKENS // 16):
        code = tl.zeros([16, DP], tl.int32)
        for j in tl.static_range(USED):
            code += ((pairs[j] >> (2 * E2 * f)) & 3) << (2 * j)
        if HAS_ONE:
            code += ((single >> (E1 * f)) & 1) << weight[None]
        if HAS_TRITS:
            code += _trits(tile + TRITS, trit[None], trit[None] + (row[:, None] * (TOKENS // 16) + f) * E2)
        token = f * 16 + row[:, None]
        if BLOCK > 0:
            index = token * (D // BLOCK) + axis[None] // BLOCK
            ok = there[None] & (token >= 0)
            step = _stored(tile + STEPS, index, ok, FP8).to(tl.float32) * _factor(tile + FACTORS, 0, FP8)
            value = step * (code.to(tl.float32) - half)
            if N_CENTRES > 0:
                value += _stored(tile + CENTRES, index, ok, FP8).to(tl.float32) * _factor(tile + FACTORS, 1, FP8)
        else:
            step = _stored(tile + STEPS, f * 16 // GROUP * N_STEPS + step_at, there & (step_at >= 0), FP8).to(tl.float32)
            value = (step * _factor(tile + FACTORS, f * 16 // GROUP * 2, FP8))[None] * (code.to(tl.float32) - half)
            if N_CENTRES > 0:
                centre = _stored(tile + CENTRES, f * 16 // GROUP * N_CENTRES + centre_at, there & (centre_at >= 0), FP8).to(tl.float32)
                value += (centre * _factor(tile + FACTORS, f * 16 // GROUP * 2 + 1, FP8))[None]
        tl.store(to + token * D + axis[None], value, mask=there[None])


def _columns(half: HalfLayout, bits: int) -> int:
    """Words of a row of a plane."""
    return -(-half.plane_slots(bits) // planes.slots_per_word(bits, half.tokens))


@lru_cache(maxsize=128)
def _table(half: HalfLayout, padded: int, device: torch.device) -> Tensor:
    """int32 [2 * (PAIRS + 1) + 5, padded]: of each axis' two-bit slots, by weight, and its one-bit slot the word of row 0 (NONE: there is none) and the bit
    of its field 0; log2 of the one-bit slot's weight; its first trit, the places of its step and centre (NONE); its largest code."""
    rows = torch.full((2 * (PAIRS + 1) + 5, padded), NONE, dtype=torch.int32)
    rows[1 : 2 * (PAIRS + 1) : 2] = 0
    numbers = rows[2 * (PAIRS + 1) :]
    numbers[0] = 0
    for bits in (2, 1):
        columns = _columns(half, bits)
        width = math.gcd(columns, 32)
        for s in (s for s in half.slots if s.bits == bits):
            shift = s.weight.bit_length() - 1
            number = shift // 2 if bits == 2 else PAIRS
            for i in range(s.count):
                e, c = divmod(s.first + i, columns)
                word = c // width * 16 * width + c % width if half.kind == "keys" else c * 16
                rows[2 * number, s.axis + i], rows[2 * number + 1, s.axis + i] = word, e * bits
                if bits == 1:
                    numbers[0, s.axis + i] = shift
    first, count = half.trit_axes
    fields, per_word = planes.fields(half.tokens), planes.slots_per_word(2, half.tokens)
    columns = -(-count // per_word) or 1
    for i in range(count):
        e, c = divmod(i, columns)
        numbers[1, first + i] = c * 16 * fields * per_word + e
    for place, axes in ((2, half.step_axes), (3, half.centre_axes)):
        for i, axis in enumerate(axes):
            numbers[place, axis] = i
    numbers[4, : half.head_dim] = torch.tensor(half.top, dtype=torch.int32)
    return rows.to(device, non_blocking=True)


def constants(half: HalfLayout, base: int, tile_bytes: int) -> dict[str, int]:
    """What `restore` is compiled for; `base`: where the half begins in a tile."""
    at = {name: base + offset for name, (offset, _) in half.sections.items()}
    rows = [math.gcd(_columns(half, bits), 32) if half.kind == "keys" else 1 for bits in (2, 1)]
    slots = [planes.slots_per_word(bits, half.tokens) for bits in (2, 1)]
    out = {name.upper(): at[name] for name in ("two", "one", "trits", "steps", "centres", "factors")}
    out |= {
        "BYTES": tile_bytes,
        "N_STEPS": half.counts[0],
        "N_CENTRES": half.counts[1],
        "ROW2": rows[0],
        "ROW1": rows[1],
        "E2": slots[0],
        "E1": slots[1],
    }
    out["USED"] = max((s.weight.bit_length() // 2 + 1 for s in half.slots if s.bits == 2), default=0)
    out |= {
        "HAS_ONE": half.plane_slots(1) > 0,
        "HAS_TRITS": half.trit_axes[1] > 0,
        "TOKENS": half.tokens,
        "GROUP": half.group_size,
        "PAIRS": PAIRS,
    }
    out["BLOCK"] = channel_block(half.head_dim) if half.spec.per == "token" else 0
    return out | {"FP8": itemsize(half.fmt) == 1, "D": half.head_dim, "DP": max(16, triton.next_power_of_2(half.head_dim))}


def restore_tiles(tiles: Tensor, half: HalfLayout, base: int, dtype: torch.dtype) -> Tensor:
    """The axes of tiles (before any rotation back), as `HalfLayout.read` gives them.

    Args:
        tiles: uint8 [B, h, N, bytes of a tile], the tiles of a head one after the other.
        base: where the half begins in a tile.
        dtype: of the result: float16, bfloat16 or float32.
    Returns:
        [B, h, N * half.tokens, D].
    """
    batch, heads, count, size = tiles.shape
    out = torch.empty(batch, heads, count * half.tokens, half.head_dim, dtype=dtype, device=tiles.device)
    numbers = constants(half, base, size)
    table = _table(half, numbers["DP"], tiles.device)
    restore[(count, batch * heads)](tiles, out, table, tiles.stride(0), tiles.stride(1), heads, num_warps=4, **numbers)
    return out
