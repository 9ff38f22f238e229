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
import triton.language as tl
from torch import Tensor

from ..errors import BackendError
from ..quant.spec import channel_block
from ..quant.tile import HalfLayout, TileLayout
from .heads import HeadSet
from .rotations import rotation_matrix

MAX_SPLITS = 256
PACKED_WARPS = 1  # of a program over packed tiles with 8 query rows
WARPS = 1056  # warps that fill the GPU: eight for each multiprocessor of an H100
NEVER = tl.constexpr(-1.0e30)
LOG2E = 1.4426950408889634
FAR_BACK = 1 << 30


# ------------------------------------------------------------------------------------------------------------- what is covered


def unsupported(q: Tensor, sets: list[HeadSet]) -> str | None:
    """Why these inputs cannot run here, or None. Reads shapes and dtypes only."""
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
    """Where the slots of a half lie, as tensors, padded to `padded` = (two-bit, one-bit, trit) slots.

    axis, step: int32 [sum of padded]; weight: float32, 0 for padding. For per="token" steps are found by token.
    """

    padded: tuple[int, int, int]
    real: tuple[int, int, int]
    axis: Tensor
    step: Tensor
    weight: Tensor


@lru_cache(maxsize=128)
def _tables(half: HalfLayout, device: torch.device) -> HalfTables:
    position = {axis: i for i, axis in enumerate(half.step_axes)}
    planes: list[list[tuple[int, float]]] = []
    for bits in (2, 1):
        planes.append([(s.axis + i, float(s.weight)) for s in half.slots if s.bits == bits for i in range(s.count)])
    first, count = half.trit_axes
    planes.append([(first + i, 1.0) for i in range(count)])
    padded = tuple(_power_of_two(len(p)) for p in planes)
    axis, step, weight = [], [], []
    for plane, size in zip(planes, padded, strict=True):
        rows = plane + [(plane[0][0] if plane else 0, 0.0)] * (size - len(plane))
        axis += [a for a, _ in rows]
        step += [position.get(a, 0) for a, _ in rows]
        weight += [w for _, w in rows]
    put = lambda x, dtype: torch.tensor(x or [0], dtype=dtype, device=device)  # noqa: E731
    sizes = tuple(len(p) for p in planes)
    return HalfTables(padded, sizes, put(axis, torch.int32), put(step, torch.int32), put(weight, torch.float32))  # type: ignore[arg-type]


@lru_cache(maxsize=128)
def _collect(half: HalfLayout, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """For the merge: which partial sums make an axis, int32 [D, 4] (-1: none), and their weights float32 [D, 4]."""
    tables = _tables(half, device)
    total = sum(tables.padded)
    index = [[-1] * 4 for _ in range(half.head_dim)]
    weights = [[0.0] * 4 for _ in range(half.head_dim)]
    used = [0] * half.head_dim
    for slot, (a, w) in enumerate(zip(tables.axis.tolist()[:total], tables.weight.tolist()[:total], strict=True)):
        if w > 0:
            index[a][used[a]], weights[a][used[a]] = slot, w
            used[a] += 1
    centres = half.centre_axes if half.spec.per == "channel" else list(range(half.head_dim))
    if half.counts[1]:
        for i, a in enumerate(centres):
            index[a][used[a]], weights[a][used[a]] = total + i, 1.0
    return torch.tensor(index, dtype=torch.int32, device=device), torch.tensor(weights, device=device), total


@lru_cache(maxsize=128)
def _terms(half: HalfLayout, device: torch.device) -> int:
    """Partial sums that make an axis, at most."""
    return max(1, int((_collect(half, device)[0] >= 0).sum(1).max()))


# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _stored(ptr, index, mask, FP8: tl.constexpr):
    """Steps or centres as float32; e4m3 by its bits, for GPUs without the conversion."""
    if FP8:
        b = tl.load(ptr + index, mask=mask, other=0).to(tl.int16)
        return (((b & 0x7F) << 7) | ((b & 0x80) << 8)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.load(ptr.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _factor(ptr, index, FP8: tl.constexpr):
    if FP8:
        return tl.load(ptr.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)
    return 1.0


@triton.jit
def _words(ptr, slots, rows, N: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr):
    """The word of every (slot, row), shifted so that the slot's code of field 0 is at bit 0 (int16)."""
    E: tl.constexpr = 256 // TOKENS // BITS
    C: tl.constexpr = (N + E - 1) // E
    s = slots if PADDED == N else tl.minimum(slots, N - 1)
    c = s if E == 1 else s % C
    if VALUES:
        offset = c * 16 + rows
    else:
        offset = (c // WIDTH) * (16 * WIDTH) + rows * WIDTH + c % WIDTH
    w = tl.load(ptr.to(tl.pointer_type(tl.int16)) + offset)
    if E > 1:
        w = w >> ((s // C) * BITS).to(tl.int16)
    return w


@triton.constexpr_function
def _direct(tokens):
    """Fields whose masked words are fp16 subnormals or in the first binade; the others are shifted down first."""
    bits = 256 // tokens
    return 11 // bits if bits <= 8 else 1


@triton.constexpr_function
def _bit(f, tokens):
    """Bit of the first code of field f, after the shift."""
    bits = 256 // tokens
    return (f if f < _direct(tokens) else f - _direct(tokens)) * bits


@triton.jit
def _codes(w, f: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Codes of field f as fp16 subnormals: code * 2^(bit - 24), bit = _bit(f)."""
    if f >= _direct(TOKENS):
        w = w >> (_direct(TOKENS) * (256 // TOKENS))
    return (w & (((1 << BITS) - 1) << _bit(f, TOKENS))).to(tl.float16, bitcast=True)


@triton.jit
def _trits(ptr, slots, token, N: tl.constexpr, BIT: tl.constexpr):
    """Trits as fp16 subnormals at bit BIT."""
    i = token * N + tl.minimum(slots, N - 1)
    b = tl.load(ptr + i // 5).to(tl.int32)
    d = i % 5
    b = tl.where(d == 1, b // 3, tl.where(d == 2, b // 9, tl.where(d == 3, b // 27, tl.where(d == 4, b // 81, b))))
    return ((b % 3) << BIT).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _rotate_query(q, out, constant, row_scale, matrix, order, mean, noise, q_b, q_h, q_t, m_b, m_h, heads, kv_heads, scale_log2, noise_log2, peak,
                  GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr):  # fmt: skip
    """Queries -> axes, float32 [B h, blocks * ROWS, D], each row scaled so that its largest entry is `peak`; the constant q . mean with the correction for noise, and what undoes the scaling."""
    bh = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    ok = rows < GROUP * Q
    head = tl.load(kv_heads + h) * GROUP + rows // Q
    base = q + b * q_b + head.to(tl.int64) * q_h + (rows % Q) * q_t
    a = tl.arange(0, DP)
    if MATRIX:
        y = tl.zeros([ROWS, DP], tl.float32)
        for c0 in tl.static_range(0, DP, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            there = c < D
            source = tl.load(order + bh * D + c, mask=there, other=0).to(tl.int32) if ORDER else c
            x = tl.load(base[:, None] + source[None], mask=ok[:, None] & there[None], other=0.0).to(tl.float32)
            m = tl.load(matrix + b * m_b + h * m_h + c[:, None] * D + a[None], mask=there[:, None] & (a < D)[None], other=0.0).to(tl.float32)
            y = tl.dot(x, m, y, input_precision="ieee")
    else:
        source = tl.load(order + bh * D + a, mask=a < D, other=0).to(tl.int32) if ORDER else a
        y = tl.load(base[:, None] + source[None], mask=ok[:, None] & (a < D)[None], other=0.0).to(tl.float32)
    biggest = tl.max(tl.abs(y), 1)
    inverse = tl.where(biggest > 0, peak / tl.where(biggest > 0, biggest, 1.0), 0.0)
    at = (bh * tl.num_programs(1) + block) * ROWS + tl.arange(0, ROWS)
    tl.store(out + at[:, None] * D + a[None], y * inverse[:, None], mask=(a < D)[None])
    tl.store(row_scale + at, biggest / peak * scale_log2)
    total = tl.zeros([ROWS], tl.float32)
    if MEAN:
        x = tl.load(base[:, None] + a[None], mask=ok[:, None] & (a < D)[None], other=0.0).to(tl.float32)
        total = tl.sum(x * tl.load(mean + bh * D + a, mask=a < D, other=0.0)[None], 1) * scale_log2
    if NOISE:
        total += tl.sum(y * y * tl.load(noise + bh * D + a, mask=a < D, other=0.0)[None], 1) * noise_log2
    tl.store(constant + at, total)


@triton.jit
def _attend_raw(qt, m, l, acc, k, v, count, newest, back, window, split, splits, scale_log2, D: tl.constexpr, DP: tl.constexpr, RAW: tl.constexpr, TAIL: tl.constexpr):
    """Whole-precision tokens of one buffer, blocks split, split + splits, ...: acc [DP, N]."""
    a = tl.arange(0, DP)
    for t0 in range(split * RAW, count, splits * RAW):
        t = t0 + tl.arange(0, RAW)
        there = (t < count)[:, None] & (a < D)[None]
        kt = tl.load(k + t.to(tl.int64)[:, None] * D + a[None], mask=there, other=0.0)
        s = tl.dot(kt, qt, input_precision="ieee") * scale_log2
        seen = (t < count)[:, None]
        age = (newest - 1 - t)[:, None]
        seen = seen & (age >= back[None])
        if TAIL:
            seen = seen & (age - back[None] < window)
        s = tl.where(seen, s, NEVER)
        new = tl.maximum(m, tl.max(s, 0))
        p = tl.where(seen, tl.exp2(s - new[None]), 0.0)
        alpha = tl.exp2(m - new)
        m = new
        l = l * alpha + tl.sum(p, 0)
        acc = acc * alpha[None]
        vt = tl.trans(tl.load(v + t.to(tl.int64)[:, None] * D + a[None], mask=there, other=0.0))
        high = p.to(vt.dtype)
        acc = tl.dot(vt, high, acc, input_precision="ieee")
        if vt.dtype == tl.bfloat16:
            acc = tl.dot(vt, (p - high.to(tl.float32)).to(vt.dtype), acc, input_precision="ieee")
    return m, l, acc


@triton.jit
def _attend(q, q_axes, constant, row_scale, tiles, sink_k, sink_v, tail_k, tail_v, lengths, hidden, partial, stats, kv_heads,
            k_axis, k_step, k_weight, k_centre, v_step, q_b, q_h, q_t, tiles_b, tiles_h, sink_b, sink_h, tail_b, tail_h, batch, heads, window, scale_log2,
            GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
            SINK: tl.constexpr, HIDDEN: tl.constexpr, TILES: tl.constexpr, TILE_BYTES: tl.constexpr, TOKENS: tl.constexpr, GROUPS: tl.constexpr, FP8: tl.constexpr,
            K_TWO: tl.constexpr, K_ONE: tl.constexpr, K_TRIT: tl.constexpr, K_STEPS: tl.constexpr, K_CENTRES: tl.constexpr, K_FACTORS: tl.constexpr,
            K2: tl.constexpr, K1: tl.constexpr, K3: tl.constexpr, KC: tl.constexpr, K2P: tl.constexpr, K1P: tl.constexpr, K3P: tl.constexpr, KCP: tl.constexpr, KN: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr,
            V_TWO: tl.constexpr, V_ONE: tl.constexpr, V_TRIT: tl.constexpr, V_STEPS: tl.constexpr, V_CENTRES: tl.constexpr, V_FACTORS: tl.constexpr,
            V2: tl.constexpr, V1: tl.constexpr, V3: tl.constexpr, VC: tl.constexpr, V2P: tl.constexpr, V1P: tl.constexpr, V3P: tl.constexpr, VCP: tl.constexpr, VN: tl.constexpr,
            RESIDUAL: tl.constexpr, PER_TOKEN: tl.constexpr, VBLOCK: tl.constexpr, V_TOP: tl.constexpr):  # fmt: skip
    """One split of one (sequence, KV head, block of query rows): partial sums by slot, axis of the centres and channel, with maximum and sums."""
    split = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    splits = tl.num_programs(0)
    b = bh // heads
    h = bh % heads
    rows = block * ROWS + tl.arange(0, ROWS)
    ok = rows < GROUP * Q
    head = tl.load(kv_heads + h) * GROUP + rows // Q
    a = tl.arange(0, DP)
    m = tl.full([ROWS], NEVER, tl.float32)
    l_raw = tl.zeros([ROWS], tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    raw = tl.zeros([DP, ROWS], tl.float32)
    # whole-precision tokens
    qt = tl.load(q + b * q_b + head.to(tl.int64)[None] * q_h + (rows % Q)[None] * q_t + a[:, None], mask=ok[None] & (a < D)[:, None], other=0.0)
    back = Q - 1 - rows % Q
    if HIDDEN:
        back = tl.load(hidden + b * Q + rows % Q).to(tl.int32)
    tail = tl.load(lengths + 2 * batch + b)
    if SINK:
        sink = tl.load(lengths + b)
        m, l_raw, raw = _attend_raw(qt, m, l_raw, raw, sink_k + b * sink_b + h * sink_h, sink_v + b * sink_b + h * sink_h, sink, tail + sink, back, window, split, splits, scale_log2, D, DP, RAW, False)
    m, l_raw, raw = _attend_raw(qt, m, l_raw, raw, tail_k + b * tail_b + h * tail_h, tail_v + b * tail_b + h * tail_h, tail, tail, back, window, split, splits, scale_log2, D, DP, RAW, True)
    at = ((bh * tl.num_programs(2) + block) * splits + split) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, ROWS)
    tl.store(partial + at[None] * WIDTH + (WIDTH - DP) + a[:, None], raw)
    tl.store(stats + at * 4 + 2, l_raw)
    tl.store(stats + at * 4 + 3, m)
    m = tl.full([ROWS], NEVER, tl.float32)
    if TILES:
        FIELDS: tl.constexpr = TOKENS // 16
        GF: tl.constexpr = FIELDS // GROUPS
        VG: tl.constexpr = 1 if PER_TOKEN else GROUPS
        count = tl.load(lengths + batch + b)
        per = tl.cdiv(count, splits)
        qrow = (bh * tl.num_programs(2) + block) * ROWS + n
        scale_row = tl.load(row_scale + qrow)
        shift = tl.load(constant + qrow)
        i16 = tl.arange(0, 16)
        acc2 = tl.zeros([V2P if V2 else 16, ROWS], tl.float32)
        acc1 = tl.zeros([V1P if V1 else 16, ROWS], tl.float32)
        acc3 = tl.zeros([V3P if V3 else 16, ROWS], tl.float32)
        accc = tl.zeros([VCP if VC else 16, ROWS], tl.float32)
        if K2:
            s2 = tl.arange(0, K2P)
            q2 = tl.load(q_axes + qrow[None] * D + tl.load(k_axis + s2)[:, None]) * tl.load(k_weight + s2)[:, None]
            q2 = q2.to(tl.float16)
            at2 = tl.load(k_step + s2)
        if K1:
            s1 = tl.arange(0, K1P)
            q1 = tl.load(q_axes + qrow[None] * D + tl.load(k_axis + K2P + s1)[:, None]) * tl.load(k_weight + K2P + s1)[:, None]
            q1 = q1.to(tl.float16)
            at1 = tl.load(k_step + K2P + s1)
        if K3:
            s3 = tl.arange(0, K3P)
            q3 = tl.load(q_axes + qrow[None] * D + tl.load(k_axis + K2P + K1P + s3)[:, None]) * tl.load(k_weight + K2P + K1P + s3)[:, None]
            q3 = q3.to(tl.float16)
            at3 = tl.load(k_step + K2P + K1P + s3)
        if KC:
            sc = tl.arange(0, KCP)
            qc = tl.load(q_axes + qrow[None] * D + tl.load(k_centre + sc)[:, None])
            qc = tl.where((sc < KC)[:, None], qc, 0.0)
            qch = qc.to(tl.float16)
            if RESIDUAL:
                qcl = (qc - qch.to(tl.float32)).to(tl.float16)
        if V2:
            u2 = tl.arange(0, V2P)
            vat2 = tl.load(v_step + u2)
        if V1:
            u1 = tl.arange(0, V1P)
            vat1 = tl.load(v_step + V2P + u1)
        if V3:
            u3 = tl.arange(0, V3P)
            vat3 = tl.load(v_step + V2P + V1P + u3)
        if VC:
            uc = tl.arange(0, VCP)
        for tile in range(split * per, tl.minimum(count, (split + 1) * per)):
            base = tiles + b * tiles_b + h * tiles_h + tile * TILE_BYTES
            if K2:
                w2 = _words(base + K_TWO, s2[None], i16[:, None], K2, K2P, 2, TOKENS, W2, False)
            if K1:
                w1 = _words(base + K_ONE, s1[None], i16[:, None], K1, K1P, 1, TOKENS, W1, False)
            for g in tl.static_range(GROUPS):
                by_step = _factor(base + K_FACTORS, g * 2, FP8)
                bias = tl.zeros([16, ROWS], tl.float32)
                if K2:
                    e2 = q2 * _stored(base + K_STEPS, g * KN + at2, s2 < K2P, FP8).to(tl.float16)[:, None]
                    bias = tl.dot(tl.full([16, K2P], -1.5, tl.float16), e2, bias)
                if K1:
                    e1 = q1 * _stored(base + K_STEPS, g * KN + at1, s1 < K1P, FP8).to(tl.float16)[:, None]
                    bias = tl.dot(tl.full([16, K1P], -0.5, tl.float16), e1, bias)
                if K3:
                    e3 = q3 * _stored(base + K_STEPS, g * KN + at3, s3 < K3P, FP8).to(tl.float16)[:, None]
                    bias = tl.dot(tl.full([16, K3P], -1.0, tl.float16), e3, bias)
                bias = bias * by_step
                if KC:
                    c = _stored(base + K_CENTRES, g * KC + sc, sc < KC, FP8).to(tl.float16)
                    c = tl.broadcast_to(c[None], [16, KCP])
                    from_centres = tl.dot(c, qch)
                    if RESIDUAL:
                        from_centres = tl.dot(c, qcl, from_centres)
                    bias += from_centres * _factor(base + K_FACTORS, g * 2 + 1, FP8)
                scores = ()
                top = m
                for j in tl.static_range(GF):
                    s = tl.zeros([16, ROWS], tl.float32)
                    if K2:
                        s = tl.dot(_codes(w2, (g * GF + j), 2, TOKENS), e2, s)
                    if K1:
                        s = tl.dot(_codes(w1, (g * GF + j), 1, TOKENS), e1, s)
                    if K3:
                        s = tl.dot(_trits(base + K_TRIT, s3[None], ((g * GF + j) * 16 + i16)[:, None], K3, _bit((g * GF + j), TOKENS)), e3, s)
                    s = (s * (by_step * (16777216.0 / (1 << _bit((g * GF + j), TOKENS)))) + bias) * scale_row[None] + shift[None]
                    top = tl.maximum(top, tl.max(s, 0))
                    scores = scores + (s,)
                alpha = tl.exp2(m - top)
                m = top
                l *= alpha
                if V2:
                    acc2 *= alpha[None]
                if V1:
                    acc1 *= alpha[None]
                if V3:
                    acc3 *= alpha[None]
                if VC:
                    accc *= alpha[None]
                if V2:
                    x2 = _words(base + V_TWO, u2[:, None], i16[None], V2, V2P, 2, TOKENS, 1, True)
                if V1:
                    x1 = _words(base + V_ONE, u1[:, None], i16[None], V1, V1P, 1, TOKENS, 1, True)
                sums = tl.zeros([ROWS], tl.float32)
                r2 = tl.zeros([V2P if V2 else 16, ROWS], tl.float32)
                r1 = tl.zeros([V1P if V1 else 16, ROWS], tl.float32)
                r3 = tl.zeros([V3P if V3 else 16, ROWS], tl.float32)
                for j in tl.static_range(GF):
                    # a common scale of 2^-9 for code * P: P = 2^(15 - bit) * 2^(score - maximum) fits fp16
                    p = tl.exp2(scores[j] - m[None] + (15 - _bit((g * GF + j), TOKENS))).to(tl.float16)
                    p32 = p.to(tl.float32) * ((1 << _bit((g * GF + j), TOKENS)) / 32768.0)
                    here = tl.sum(p32, 0)
                    sums += here
                    if PER_TOKEN:
                        token = (g * GF + j) * 16 + i16
                        for k in tl.static_range(D // VBLOCK):
                            step = _stored(base + V_STEPS, token * (D // VBLOCK) + k, token < TOKENS, FP8) * _factor(base + V_FACTORS, 0, FP8)
                            pk = p32 * step[:, None]
                            offset = -0.5 * V_TOP * tl.sum(pk, 0)
                            if VC:
                                centre = _stored(base + V_CENTRES, token * (D // VBLOCK) + k, token < TOKENS, FP8) * _factor(base + V_FACTORS, 1, FP8)
                                offset += tl.sum(p32 * centre[:, None], 0)
                            accc += tl.where((uc // VBLOCK == k)[:, None] & (uc < D)[:, None], offset[None], 0.0)
                            # |step| <= 65504 would overflow fp16: a power of two of its own for each product
                            big = tl.max(tl.abs(pk))
                            norm = tl.where(big > 0, 1024.0 / big, 0.0)
                            ph = (pk * norm).to(tl.float16)
                            undo = tl.where(big > 0, big / 1024.0, 0.0) * (16777216.0 / (1 << _bit((g * GF + j), TOKENS)))
                            if V2:
                                r2 += tl.where((u2 % D // VBLOCK == k)[:, None], tl.dot(_codes(x2, (g * GF + j), 2, TOKENS), ph), 0.0) * undo
                            if V1:
                                r1 += tl.where((u1 % D // VBLOCK == k)[:, None], tl.dot(_codes(x1, (g * GF + j), 1, TOKENS), ph), 0.0) * undo
                    else:
                        if V2:
                            r2 = tl.dot(_codes(x2, (g * GF + j), 2, TOKENS), p, r2)
                        if V1:
                            r1 = tl.dot(_codes(x1, (g * GF + j), 1, TOKENS), p, r1)
                        if V3:
                            r3 = tl.dot(_trits(base + V_TRIT, u3[:, None], ((g * GF + j) * 16 + i16)[None], V3, _bit((g * GF + j), TOKENS)), p, r3)
                l += sums
                if PER_TOKEN:
                    if V2:
                        acc2 += r2
                    if V1:
                        acc1 += r1
                else:
                    by = _factor(base + V_FACTORS, g * 2, FP8)
                    if V2:
                        acc2 += (r2 * 512.0 - 1.5 * sums[None]) * (_stored(base + V_STEPS, g * VN + vat2, u2 < V2P, FP8) * by)[:, None]
                    if V1:
                        acc1 += (r1 * 512.0 - 0.5 * sums[None]) * (_stored(base + V_STEPS, g * VN + vat1, u1 < V1P, FP8) * by)[:, None]
                    if V3:
                        acc3 += (r3 * 512.0 - 1.0 * sums[None]) * (_stored(base + V_STEPS, g * VN + vat3, u3 < V3P, FP8) * by)[:, None]
                    if VC:
                        accc += sums[None] * (_stored(base + V_CENTRES, g * VC + uc, uc < VC, FP8) * _factor(base + V_FACTORS, g * 2 + 1, FP8))[:, None]
        row = partial + at[None] * WIDTH
        if V2:
            tl.store(row + u2[:, None], acc2)
        if V1:
            tl.store(row + V2P + u1[:, None], acc1)
        if V3:
            tl.store(row + V2P + V1P + u3[:, None], acc3)
        if VC:
            tl.store(row + V2P + V1P + V3P + uc[:, None], accc)
    tl.store(stats + at * 4, m)
    tl.store(stats + at * 4 + 1, l)


@triton.jit
def _reduce(partial, stats, merged, merged_stats, splits, ROWS: tl.constexpr, WIDTH: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr, TOGETHER: tl.constexpr):
    """Merge the splits of one block of query rows, CHUNK columns for each program, in a fixed order."""
    at = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    n = tl.arange(0, ROWS)
    j = tl.arange(0, TOGETHER)
    column = tl.where(c >= WIDTH - DP, 3, 0)                     # whole-precision channels have their own maximum
    first = tl.min(column)
    m = tl.full([ROWS], NEVER, tl.float32)
    for s in range(0, splits, TOGETHER):
        row = (at * splits + s + j[:, None]) * ROWS + n[None]
        there = (s + j < splits)[:, None] & (n >= 0)[None]
        m = tl.maximum(m, tl.max(tl.maximum(tl.load(stats + row * 4, mask=there, other=NEVER), tl.load(stats + row * 4 + 3, mask=there, other=NEVER)), 0))
    y = tl.zeros([ROWS, CHUNK], tl.float32)
    packed = tl.zeros([ROWS], tl.float32)
    raw = tl.zeros([ROWS], tl.float32)
    for s in range(0, splits, TOGETHER):
        row = (at * splits + s + j[:, None]) * ROWS + n[None]
        there = (s + j < splits)[:, None] & (n >= 0)[None]
        m_packed = tl.load(stats + row * 4, mask=there, other=NEVER)
        m_raw = tl.load(stats + row * 4 + 3, mask=there, other=NEVER)
        e_packed = tl.where(m_packed > 0.5 * NEVER, tl.exp2(m_packed - m[None]), 0.0)
        e_raw = tl.where(m_raw > 0.5 * NEVER, tl.exp2(m_raw - m[None]), 0.0)
        packed += tl.sum(e_packed * tl.load(stats + row * 4 + 1, mask=there, other=0.0), 0)
        raw += tl.sum(e_raw * tl.load(stats + row * 4 + 2, mask=there, other=0.0), 0)
        e = tl.where(first == 3, e_raw, e_packed)
        y += tl.sum(e[:, :, None] * tl.load(partial + row[:, :, None] * WIDTH + c[None, None], mask=there[:, :, None] & (c >= 0)[None, None], other=0.0), 0)
    tl.store(merged + (at * ROWS + n)[:, None] * WIDTH + c[None], y)
    if tl.program_id(1) == 0:
        tl.store(merged_stats + (at * ROWS + n) * 4, m)
        tl.store(merged_stats + (at * ROWS + n) * 4 + 1, packed)
        tl.store(merged_stats + (at * ROWS + n) * 4 + 2, raw)


@triton.jit
def _finish(partial, stats, out, lse, collect, weights, matrix, order, mean, m_b, m_h, heads, kv_heads, q_heads,
           GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr, TERMS: tl.constexpr,
           MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gather the axes of one block of query rows from its partial sums, rotate the packed part back, write output and lse."""
    bh = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    n = tl.arange(0, ROWS)
    rows = block * ROWS + n
    ok = rows < GROUP * Q
    head = tl.load(kv_heads + h) * GROUP + rows // Q
    a = tl.arange(0, DP)
    at = (bh * tl.num_programs(1) + block) * ROWS + n
    m = tl.load(stats + at * 4)
    mass = tl.load(stats + at * 4 + 1)
    total = mass + tl.load(stats + at * 4 + 2)
    raw = tl.load(partial + at[:, None] * WIDTH + (WIDTH - DP) + a[None])
    if TILES:
        y = tl.zeros([ROWS, DP], tl.float32)
        for j in tl.static_range(TERMS):
            index = tl.load(collect + a * 4 + j, mask=a < D, other=-1)
            w = tl.load(weights + a * 4 + j, mask=a < D, other=0.0)
            y += tl.load(partial + at[:, None] * WIDTH + index[None], mask=(index >= 0)[None] & (n >= 0)[:, None], other=0.0) * w[None]
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    target = out + ((b * q_heads + head) * Q + rows % Q)[:, None] * D
    if MATRIX:
        tl.store(target + a[None], raw * inverse[:, None], mask=ok[:, None] & (a < D)[None])
        tl.debug_barrier()
        for c0 in tl.static_range(0, DP, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            there = c < D
            mt = tl.load(matrix + b * m_b + h * m_h + c[None] * D + a[:, None], mask=there[None] & (a < D)[:, None], other=0.0).to(tl.float32)
            z = tl.dot(y * inverse[:, None], mt, input_precision="ieee")
            if MEAN:
                z += (mass * inverse)[:, None] * tl.load(mean + bh * D + c, mask=there, other=0.0)[None]
            to = tl.load(order + bh * D + c, mask=there, other=0).to(tl.int32) if ORDER else c
            place = target + to[None]
            mask = ok[:, None] & there[None]
            tl.store(place, tl.load(place, mask=mask, other=0.0) + z, mask=mask)
    else:
        tl.store(target + a[None], raw * inverse[:, None], mask=ok[:, None] & (a < D)[None])
        if TILES:
            tl.debug_barrier()
            to = tl.load(order + bh * D + a, mask=a < D, other=0).to(tl.int32) if ORDER else a
            place = target + to[None]
            mask = ok[:, None] & (a < D)[None]
            tl.store(place, tl.load(place, mask=mask, other=0.0) + y * inverse[:, None], mask=mask)
    natural = tl.where(total > 0, (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse + (b * q_heads + head) * Q + rows % Q, natural, mask=ok)


# ------------------------------------------------------------------------------------------------------------- launching


@lru_cache(maxsize=256)
def _head_index(kv_heads: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(kv_heads, dtype=torch.int32, device=device)


@lru_cache(maxsize=128)
def _centre_index(half: HalfLayout, padded: int, device: torch.device) -> Tensor:
    axes = half.centre_axes if half.counts[1] else []
    return torch.tensor((axes + [0] * padded)[: max(padded, 1)], dtype=torch.int32, device=device)


def _half_arguments(half: HalfLayout, base: int, letter: str, device: torch.device) -> tuple[dict[str, int], HalfTables]:
    tables = _tables(half, device)
    at = {name: base + offset for name, (offset, _) in half.sections.items()}
    centres = half.counts[1] if half.spec.per == "channel" else half.head_dim
    numbers = {"TWO": at["two"], "ONE": at["one"], "TRIT": at["trits"], "STEPS": at["steps"], "CENTRES": at["centres"], "FACTORS": at["factors"]}
    out = {f"{letter}_{k}": v for k, v in numbers.items()}
    for plane, real, padded in zip("213", tables.real, tables.padded, strict=True):
        out |= {f"{letter}{plane}": real, f"{letter}{plane}P": padded}
    return out | {f"{letter}C": centres, f"{letter}CP": _power_of_two(centres), f"{letter}N": half.counts[0]}, tables


def _rotation_arguments(half: HalfLayout | None, basis: dict[str, Tensor], like: Tensor, used: bool) -> tuple[dict[str, object], dict[str, object]]:
    matrix = rotation_matrix(half, basis, like.device) if half is not None and used else None
    parts = {k: basis.get(k) if used else None for k in ("order", "mean", "noise")}
    flags = {"MATRIX": matrix is not None} | {k.upper(): v is not None for k, v in parts.items()}
    tensors = {k: like if v is None else v.contiguous() for k, v in parts.items()} | {"matrix": like if matrix is None else matrix}
    strides = (matrix.stride(0), matrix.stride(1)) if matrix is not None and matrix.dim() == 4 else (0, 0)
    return {**tensors, "m_b": strides[0], "m_h": strides[1]}, flags


def _attend_part(q: Tensor, s: HeadSet, kv_heads: tuple[int, ...], group: int, scale: float, hidden: Tensor | None, window: int | None, out: Tensor, lse: Tensor, warps: int | None) -> None:
    batch, q_heads, n_query, dim = q.shape
    h, device = len(kv_heads), q.device
    dp = triton.next_power_of_2(dim)
    rows = 8 if group * n_query <= 8 else 16
    blocks = triton.cdiv(group * n_query, rows)
    used = s.tiles is not None and s.layout is not None and s.tiles.shape[2] > 0
    index = _head_index(kv_heads, device)
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
        width += sum(v_tables.padded) + int(v_numbers["VCP"])
        units += s.tiles.shape[2]
        axes = torch.empty(batch * h * blocks * rows, dim, device=device)
        constant, row_scale = torch.empty(2, batch * h * blocks * rows, device=device)
        tensors, flags = _rotation_arguments(layout.keys, s.key_basis, q, True)
        peak = (128.0 if layout.keys.fmt == "fp8" else 1.0) / max([x.weight for x in layout.keys.slots] or [1])
        _rotate_query[(batch * h, blocks)](
            q, axes, constant, row_scale, tensors["matrix"], tensors["order"], tensors["mean"], tensors["noise"], *q.stride()[:3],
            tensors["m_b"], tensors["m_h"], h, index, scale * LOG2E, 0.5 * layout.keys.spec.noise_correction * scale**2 * LOG2E, peak,
            GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, BLOCK=min(dp, 32), **flags,
        )  # fmt: skip
        k_axis, k_step, k_weight, v_step = k_tables.axis, k_tables.step, k_tables.weight, v_tables.step
        k_centre = _centre_index(layout.keys, int(k_numbers["KCP"]), device)
        columns = {bits: triton.cdiv(layout.keys.plane_slots(bits), 256 // layout.tokens // bits) for bits in (2, 1)}
        per_token = layout.values.spec.per == "token"
        numbers = {**k_numbers, **v_numbers, "W2": _gcd32(columns[2]), "W1": _gcd32(columns[1]), "PER_TOKEN": per_token, "RESIDUAL": layout.keys.spec.transform != "principal"}
        numbers |= {"VBLOCK": channel_block(dim), "V_TOP": layout.values.top[0], "TILE_BYTES": layout.nbytes, "TOKENS": layout.tokens}
        numbers |= {"GROUPS": layout.keys.groups, "FP8": layout.keys.fmt == "fp8"}
    else:
        numbers = dict.fromkeys(_TILE_NUMBERS, 0)
    splits = max(1, min(MAX_SPLITS, units, WARPS // warps // (batch * h * blocks)))
    partial = torch.empty(batch * h * blocks * splits * rows, width, device=device)
    stats = torch.empty(batch * h * blocks * splits * rows, 4, device=device)
    sink = s.sink_k is not None and s.sink_k.shape[2] > 0
    sink_k, sink_v = (s.sink_k, s.sink_v) if sink else (s.tail_k, s.tail_v)
    _attend[(splits, batch * h, blocks)](
        q, axes, constant, row_scale, s.tiles if used else q, sink_k, sink_v, s.tail_k, s.tail_v, s.lengths, q if hidden is None else hidden, partial, stats, index,
        k_axis, k_step, k_weight, k_centre, v_step, *q.stride()[:3], *(s.tiles.stride()[:2] if used and s.tiles is not None else (0, 0)), *sink_k.stride()[:2], *s.tail_k.stride()[:2],
        batch, h, window or FAR_BACK, scale * LOG2E,
        GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, WIDTH=width, RAW=raw_tokens, SINK=sink, HIDDEN=hidden is not None, TILES=used,
        num_warps=warps, num_stages=2, **numbers,
    )  # fmt: skip
    merged = torch.empty(batch * h * blocks * rows, width, device=device)
    merged_stats = torch.empty(batch * h * blocks * rows, 4, device=device)
    _reduce[(batch * h * blocks, width // 16)](partial, stats, merged, merged_stats, splits, ROWS=rows, WIDTH=width, DP=dp, CHUNK=16, TOGETHER=32, num_warps=4)
    tensors, flags = _rotation_arguments(layout.values if layout else None, s.value_basis, q, used)
    flags.pop("NOISE")
    collect, weights, _ = _collect(layout.values, device) if layout else (q, q, 0)
    terms = _terms(layout.values, device) if layout else 1
    _finish[(batch * h, blocks)](
        merged, merged_stats, out, lse, collect, weights, tensors["matrix"], tensors["order"], tensors["mean"], tensors["m_b"], tensors["m_h"],
        h, index, q_heads, GROUP=group, Q=n_query, D=dim, DP=dp, ROWS=rows, WIDTH=width, TILES=used, TERMS=terms, BLOCK=min(dp, 32), num_warps=4, **flags,
    )  # fmt: skip


_TILE_NUMBERS = [f"{x}_{n}" for x in "KV" for n in ("TWO", "ONE", "TRIT", "STEPS", "CENTRES", "FACTORS")]
_TILE_NUMBERS += [f"{x}{n}" for x in "KV" for n in ("2", "1", "3", "C", "2P", "1P", "3P", "CP", "N")]
_TILE_NUMBERS += ["W2", "W1", "PER_TOKEN", "RESIDUAL", "VBLOCK", "V_TOP", "TILE_BYTES", "TOKENS", "GROUPS", "FP8"]


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
