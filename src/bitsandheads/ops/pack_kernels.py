"""The Triton kernels of packing: tokens -> the bytes of their tile, in one pass.

A program holds a tile as [axes, tokens], so that an axis's statistics are sums along a row, which few threads share, and a word of a plane
collects the codes of tokens that one thread holds. Shape letters: T tokens of a tile, D head_dim (DP: the next power of two), R rows of
statistics. The layout is described in quant/planes.py and quant/tile.py, the formulas in quant/levels.py.
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even
GAMMA = tl.constexpr(0.7)
NO_BITS, MINMAX, GAUSSIAN, SIGN, TERNARY = (tl.constexpr(i) for i in range(5))  # rows "level" of the table of axes
LIMIT_FP16, FP8_MAX, SMALLEST_FACTOR = tl.constexpr(65504.0), tl.constexpr(448.0), tl.constexpr(2.0**-24)


@triton.jit
def skipped(skip, SKIP: tl.constexpr, PADDED: tl.constexpr):
    """For `source_token`: each place that is left out, less the places before it that are."""
    j = tl.arange(0, PADDED)
    return tl.load(skip + j, mask=j < SKIP, other=1 << 30) - j


@triton.jit
def source_token(i, left_out, SKIP: tl.constexpr):
    """The place of the i-th token that is packed, when some places are left out."""
    return i + tl.sum((i[:, None] >= left_out[None]).to(tl.int32), 1) if SKIP > 0 else i


@triton.jit
def _e4m3(x):
    """Numbers of at most 448 rounded to e4m3: their bytes (int32) and their values. In arithmetic, for GPUs without the type."""
    a = tl.abs(x)
    bits = a.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    small = (a * 512.0 + ROUND) - ROUND  # below 2^-6: multiples of 2^-9
    normal = a >= 0.015625
    byte = tl.where(normal, rounded - 960, small.to(tl.int32))
    value = tl.where(normal, (rounded << 20).to(tl.float32, bitcast=True), small * 0.001953125)
    return tl.where(x < 0, byte | 128, byte), tl.where(x < 0, -value, value)


@triton.jit
def _total(x, w, AXIS: tl.constexpr, WEIGHTED: tl.constexpr):
    return tl.sum(x * w, AXIS) if WEIGHTED else tl.sum(x, AXIS)


@triton.jit
def _between(z, slope, shift, AXIS: tl.constexpr, ASM: tl.constexpr):
    """z * slope + shift, between 0 and 1."""
    slope, shift = tl.expand_dims(slope, AXIS), tl.expand_dims(shift, AXIS)
    if ASM:
        slope, shift = tl.broadcast_to(slope, z.shape), tl.broadcast_to(shift, z.shape)
        return tl.inline_asm_elementwise("fma.rn.sat.f32 $0, $1, $2, $3;", "=f,f,f,f", [z, slope, shift], tl.float32, is_pure=True, pack=1)
    return tl.minimum(tl.maximum(z * slope + shift, 0.0), 1.0)


@triton.jit
def _codes(z, step, shift, top, AXIS: tl.constexpr, ASM: tl.constexpr):
    """The nearest code of z / step + top / 2 + shift in 0..top, plus ROUND: the code is in the low bits."""
    slope = 1.0 / (tl.where(step > 0, step, 1.0) * tl.maximum(top, 1.0))
    return _between(z, slope, shift * slope + 0.5, AXIS, ASM) * tl.expand_dims(top, AXIS) + ROUND


@triton.jit
def _fit(y, w, share, offset, level, sigma, top, centred, AXIS: tl.constexpr, N: tl.constexpr, WEIGHTED: tl.constexpr, LEVELS: tl.constexpr,
         ASM: tl.constexpr):  # fmt: skip
    """quant.levels.fit: steps and centres [R], and the deviations z from `base`, all before the metadata are rounded.

    y: [.., N, ..], axes without the head's mean taken off, which is `offset`. share: 1 / the sum of the weights w (or of the tokens).
    sigma: optimal step of a normal distribution.
    """
    mean = _total(y, w, AXIS, WEIGHTED) * share
    base = tl.where(centred, mean, offset)
    z = y - tl.expand_dims(base, AXIS)
    step = tl.zeros_like(mean)
    centre = tl.where(centred, mean - offset, 0.0)
    if LEVELS & 2:  # minmax
        low, high = tl.min(z, AXIS), tl.max(z, AXIS)
        step = tl.where(level == MINMAX, (high - low) / tl.maximum(top, 1.0), step)
        centre = tl.where(level == MINMAX, (high + low) * 0.5 + (base - offset), centre)
    if LEVELS & 24:  # sign, ternary
        size = tl.sum(tl.abs(z), AXIS) * (1.0 / N)
        step = tl.where(level == SIGN, 2.0 * size, step)
        if LEVELS & 16:
            outside = tl.abs(z) > tl.expand_dims(size * GAMMA, AXIS)
            hits = tl.sum(outside.to(tl.float32), AXIS)
            fitted = tl.sum(tl.where(outside, tl.abs(z), 0.0), AXIS) / tl.maximum(hits, 1.0)
            step = tl.where(level == TERNARY, fitted, step)
    if LEVELS & 4:  # gaussian: a first step from the deviation, then least squares on its codes
        first = tl.sqrt(_total(z * z, w, AXIS, WEIGHTED) * share) * sigma
        code = _codes(z, first, tl.zeros_like(first), top, AXIS, ASM) - ROUND
        weighted = code * w if WEIGHTED else code
        mean_code = tl.sum(weighted, AXIS) * share
        mean_square = tl.sum(weighted * code, AXIS) * share
        mean_product = tl.sum(weighted * z, AXIS) * share
        mean_z = mean - base
        middle = mean_code - 0.5 * top
        spread = mean_square - mean_code * mean_code
        product = mean_product - mean_code * mean_z
        spread = tl.where(centred, spread, spread + middle * middle)  # a centre that is not free is zero
        product = tl.where(centred, product, product + middle * mean_z)
        slope = product / tl.maximum(spread, 1e-9)
        good = (spread > 1e-6) & (slope > 0)
        slope = tl.where(good, slope, first)
        moved = tl.where(good, mean_z - slope * middle + (base - offset), centre)
        step = tl.where(level == GAUSSIAN, slope, step)
        centre = tl.where((level == GAUSSIAN) & centred, moved, centre)
    return step, centre, base, z


@triton.jit
def _store_metadata(out, factor_out, x, index, there, PER_TOKEN: tl.constexpr, FP8: tl.constexpr):
    """Store steps or centres x [R]; returns what they restore to, and the largest magnitude (infinite where x is NaN)."""
    size = tl.where(there, tl.abs(x), 0.0)
    if FP8:
        most = tl.max(size, 0)
        if PER_TOKEN:
            most = tl.max(most, 0)
        factor = tl.math.div_rn(most, tl.zeros_like(most) + FP8_MAX)
        factor = tl.minimum(tl.maximum(factor, SMALLEST_FACTOR), LIMIT_FP16).to(tl.float16)
        tl.store(factor_out, factor)
        scale = factor.to(tl.float32)
        if not PER_TOKEN:
            scale = scale[None]
        byte, value = _e4m3(tl.minimum(tl.maximum(x / scale, -FP8_MAX), FP8_MAX))
        tl.store(out + index, byte.to(tl.uint8), mask=there)
        kept = value * scale
    else:
        half = x.to(tl.float16)
        tl.store(out.to(tl.pointer_type(tl.float16)) + index, half, mask=there)
        kept = half.to(tl.float32)
    limit = LIMIT_FP16 * (FP8_MAX if FP8 else 1.0)
    return tl.where(there, kept, 0.0), tl.max(tl.ravel(tl.where(size <= limit, size, float("inf"))), 0)


@triton.constexpr_function
def _spread(bits, stride, fields):
    """The low `bits` of every field of `stride` bits, as an int32."""
    return (sum(bits << (stride * f) for f in range(fields)) + 2**31) % 2**32 - 2**31


@triton.jit
def _move_together(code):
    """Eight fields of 4 bits, of which the low two are used, to 16 bits."""
    code = (code | (code >> 2)) & 0x0F0F0F0F
    code = (code | (code >> 4)) & 0x00FF00FF
    return code | (code >> 8)


@triton.jit
def _word_index(column, row, WIDTH: tl.constexpr):
    """Where a word of a plane lies: keys [C / W, 16 rows, W], values [C, 16] (W = 1)."""
    return (column // WIDTH)[:, None] * (16 * WIDTH) + row[None] * WIDTH + (column % WIDTH)[:, None]


@triton.jit
def _store_planes(two, one, fields, axes, DP: tl.constexpr, TWO_COLUMNS: tl.constexpr, TWO_WIDTH: tl.constexpr, ONE_COLUMNS: tl.constexpr,
                  ONE_WIDTH: tl.constexpr, PAIRS: tl.constexpr):  # fmt: skip
    """Both planes of tiles of 128 tokens. fields: int32 [DP, 16], eight codes of at most 4 bits; rows are ordered so that the two axes that
    share a word of the one-bit plane are 8 rows apart (triton_pack._row_order)."""
    two, one = two.to(tl.pointer_type(tl.int16)), one.to(tl.pointer_type(tl.int16))
    r = tl.arange(0, DP)
    row = tl.arange(0, 16)
    if TWO_COLUMNS > 0:
        for pair in tl.static_range(PAIRS):
            column = tl.load(axes + (6 + pair) * DP + r)
            word = _move_together((fields >> (2 * pair)) & 0x33333333)
            tl.store(two + _word_index(column, row, TWO_WIDTH), word.to(tl.int16), mask=(column >= 0)[:, None])
    if ONE_COLUMNS > 0:
        half = _move_together((fields >> tl.load(axes + 8 * DP + r)[:, None]) & 0x11111111) << ((r // 8) % 2)[:, None]
        word = tl.reshape(tl.sum(tl.reshape(half, [DP // 16, 2, 8, 16]), 1), [DP // 2, 16])
        column = tl.arange(0, DP // 2)
        tl.store(one + _word_index(column, row, ONE_WIDTH), word.to(tl.int16), mask=(column < ONE_COLUMNS)[:, None])


@triton.jit
def _store_plane(out, scratch, slot_axis, slot_shift, BITS: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
                 HALVES: tl.constexpr, STRIDE: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """One bit plane from `scratch`, int32 [axes, HALVES, 16 rows]: the codes of the row's tokens, STRIDE bits for each."""
    W: tl.constexpr = 256 // TOKENS  # bits of a word that belong to one token
    F: tl.constexpr = TOKENS // 16 // HALVES
    column = tl.arange(0, PADDED)
    row = tl.arange(0, 16)
    words = tl.zeros([PADDED, 16], tl.int32)
    for e in tl.static_range(W // BITS):
        axis = tl.load(slot_axis + e * PADDED + column)
        shift = tl.load(slot_shift + e * PADDED + column)[:, None]
        for half in tl.static_range(HALVES):
            place = (tl.maximum(axis, 0) * HALVES + half)[:, None] * 16 + row[None]
            code = (tl.load(scratch + place, mask=(axis >= 0)[:, None], other=0) >> shift) & _spread((1 << BITS) - 1, STRIDE, F)
            if STRIDE > W:
                wide = code
                code = tl.zeros_like(wide)
                for f in tl.static_range(F):
                    code |= ((wide >> (STRIDE * f)) & ((1 << BITS) - 1)) << (W * f)
            words |= code << (e * BITS + W * F * half)
    tl.store(out.to(tl.pointer_type(tl.int16)) + _word_index(column, row, WIDTH), words.to(tl.int16), mask=(column < COLUMNS)[:, None])


@triton.jit
def _store_trits(out, scratch, code, first, COUNT: tl.constexpr, TOKENS: tl.constexpr, DP: tl.constexpr):
    """Five trits a byte, in the order of a two-bit plane's words: through memory, because neighbours lie in different threads."""
    E: tl.constexpr = 128 // TOKENS  # slots of a word
    C: tl.constexpr = COUNT // E
    slot = (tl.arange(0, DP) - first)[:, None]
    t = tl.arange(0, TOKENS)[None]
    place = (slot % C * 16 + t % 16) * 8 + t // 16 * E + slot // C
    tl.store(scratch + place, code.to(tl.uint8), mask=(slot >= 0) & (slot < COUNT))
    tl.debug_barrier()
    BYTES: tl.constexpr = (COUNT * TOKENS + 4) // 5
    for start in range(0, BYTES, 1024):
        byte = start + tl.arange(0, 1024)
        total = tl.zeros([1024], tl.int32)
        for i in tl.static_range(5):
            trit = tl.load(scratch + byte * 5 + i, mask=byte * 5 + i < COUNT * TOKENS, other=0).to(tl.int32)
            total += trit * 3**i
        tl.store(out + byte, total.to(tl.uint8), mask=byte < BYTES)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["room"])
def pack_tiles(x, weight, matrix, order, mean, skip, jobs, tiles, kept, error, status, scratch, axes, two_axis, two_shift, one_axis, one_shift,
               x_b, x_h, x_t, w_b, w_h, m_p, m_b, m_h, tiles_b, tiles_h, batch, heads, room,
               DUE: tl.constexpr, SKIP: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr, DOT: tl.constexpr, X_PARTS: tl.constexpr,
               MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr,
               GROUP: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr, FP8: tl.constexpr, TILE_BYTES: tl.constexpr,
               TWO: tl.constexpr, ONE: tl.constexpr, TRITS: tl.constexpr, STEPS: tl.constexpr, CENTRES: tl.constexpr, FACTORS: tl.constexpr,
               N_STEPS: tl.constexpr, N_CENTRES: tl.constexpr, TWO_COLUMNS: tl.constexpr, TWO_PADDED: tl.constexpr, TWO_WIDTH: tl.constexpr,
               ONE_COLUMNS: tl.constexpr, ONE_PADDED: tl.constexpr, ONE_WIDTH: tl.constexpr, FIRST_TRIT: tl.constexpr,
               N_TRITS: tl.constexpr, CODE_BITS: tl.constexpr, SCRATCH: tl.constexpr, SKIP_PADDED: tl.constexpr,
               DIRECT: tl.constexpr):  # fmt: skip
    """Programs (worker, sequence and head) pack one half (keys or values) of tiles worker, worker + workers, ... of their head.

    jobs, int32: [first token, tiles, first tile's index] x B; with DUE the counts of a store [sinks, tiles, tail, limit] x B, where the oldest
    tokens of the tail are one tile once it has grown to the limit. KEEP: also store the restored axes and their squared error (for the prompt).
    """
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    if DUE:
        first = 0
        count = (tl.load(jobs + 2 * batch + b) >= tl.load(jobs + 3 * batch + b)).to(tl.int32)
        place = tl.load(jobs + batch + b)
    else:
        first = tl.load(jobs + b)
        count = tl.load(jobs + batch + b)
        place = tl.load(jobs + 2 * batch + b)
    if worker >= count:
        return
    PER_TOKEN: tl.constexpr = BLOCK > 0
    AXIS: tl.constexpr = 1 if PER_TOKEN else 2
    N: tl.constexpr = BLOCK if PER_TOKEN else GROUP
    GROUPS: tl.constexpr = TOKENS // GROUP
    STRIDE: tl.constexpr = max(4 if CODE_BITS <= 4 else 8, 256 // TOKENS)  # bits of a code in scratch
    HALVES: tl.constexpr = 2 if TOKENS // 16 * STRIDE > 32 else 1
    FIELDS: tl.constexpr = TOKENS // 16 // HALVES
    ASM: tl.constexpr = tl.bfloat16 == DOT
    c = tl.arange(0, DP)
    a = tl.arange(0, DP)
    t = tl.arange(0, TOKENS)
    axis = tl.load(axes + 5 * DP + a)  # of every row
    inside = (c < D)[:, None] & (axis < D)[None]
    row = c
    if ORDER:
        channel = tl.load(order + bh * D + axis, mask=axis < D, other=0).to(tl.int32)
        hit = (channel[None] == c[:, None]) & inside
        row = tl.sum(tl.where(hit, axis[None], 0), 1)
    if MATRIX > 0:
        where = matrix + b * m_b + h * m_h + row[:, None] * D + axis[None]
        high = tl.load(where, mask=inside, other=0.0).to(DOT)
        if MATRIX > 1:
            low = tl.load(where + m_p, mask=inside, other=0.0).to(DOT)
    else:
        high = (hit if ORDER else (c[:, None] == axis[None]) & inside).to(DOT)
    offset = tl.zeros([DP], tl.float32)
    if MEAN:
        offset = tl.sum(high.to(tl.float32) * tl.load(mean + bh * D + c, mask=c < D, other=0.0)[:, None], 0)
    if PER_TOKEN:
        blocks = tl.arange(0, DP // BLOCK)
        rows = tl.full([1, 1], 0, tl.int32)
        step_index = t[None] * (D // BLOCK) + blocks[:, None]
        has_step = (blocks < D // BLOCK)[:, None] & (t < TOKENS)[None]
        centre_index = step_index
        has_centre = has_step & (N_CENTRES > 0)
        factor_index = 0
        offset_row = tl.zeros([1, 1], tl.float32)
    else:
        groups = tl.arange(0, GROUPS)
        rows = a[:, None]
        step_place = tl.load(axes + 2 * DP + a)
        centre_place = tl.load(axes + 3 * DP + a)
        step_index = groups[None] * N_STEPS + step_place[:, None]
        has_step = (step_place >= 0)[:, None] & (groups >= 0)[None]
        centre_index = groups[None] * N_CENTRES + centre_place[:, None]
        has_centre = (centre_place >= 0)[:, None] & (groups >= 0)[None]
        factor_index = groups * 2
        offset_row = offset[:, None]
    top = tl.load(axes + rows).to(tl.float32)
    level = tl.load(axes + DP + rows)
    sigma = tl.load(axes + 4 * DP + rows).to(tl.float32, bitcast=True)
    centred = tl.load(axes + 3 * DP + rows) >= 0
    own = scratch + (bh * workers + worker) * SCRATCH
    left_out = skipped(skip + bh * SKIP, SKIP, SKIP_PADDED)
    weights = weight + b * w_b + h * w_h
    grouped = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None]
    worst = 0.0
    for n in range(worker, count, workers):
        at = source_token(first + n * TOKENS + t, left_out, SKIP)
        source = x + b * x_b + h * x_h + at.to(tl.int64)[:, None] * x_t + c[None]
        tokens = tl.load(source, mask=(c < D)[None] & (at >= 0)[:, None], other=0.0)
        part = tokens.to(tl.bfloat16)
        y = tl.dot(tl.trans(high), tl.trans(part.to(DOT)), input_precision="ieee")
        if MATRIX > 1:
            y = tl.dot(tl.trans(low), tl.trans(part.to(DOT)), y, input_precision="ieee")
        if X_PARTS > 1:  # what a bfloat16 does not hold of a float16 or a float32
            rest = tokens.to(tl.float32)
            for _ in tl.static_range(X_PARTS - 1):
                rest = rest - part.to(tl.float32)
                part = rest.to(tl.bfloat16)
                y = tl.dot(tl.trans(high), tl.trans(part.to(DOT)), y, input_precision="ieee")
                if MATRIX > 1:
                    y = tl.dot(tl.trans(low), tl.trans(part.to(DOT)), y, input_precision="ieee")
        y = tl.reshape(y, [DP // BLOCK, BLOCK, TOKENS]) if PER_TOKEN else tl.reshape(y, [DP, GROUPS, GROUP])
        w = 1.0
        share = 1.0 / N
        if WEIGHTED:
            w = tl.load(weights + n * TOKENS + grouped)[None]
            share = 1.0 / tl.sum(w, 2)
        step, centre, base, z = _fit(y, w, share, offset_row, level, sigma, top, centred, AXIS, N, WEIGHTED, LEVELS, ASM)
        out = tiles + b * tiles_b + h * tiles_h + (place + n).to(tl.int64) * TILE_BYTES
        factor_out = (out + FACTORS).to(tl.pointer_type(tl.float16)) + factor_index
        step, step_most = _store_metadata(out + STEPS, factor_out, step, step_index, has_step, PER_TOKEN, FP8)
        centre, centre_most = _store_metadata(out + CENTRES, factor_out + 1, centre, centre_index, has_centre, PER_TOKEN, FP8)
        worst = tl.maximum(worst, tl.maximum(step_most, centre_most))
        beyond = base - offset_row - centre  # deviations are from the base, codes from the stored centre
        code = _codes(z, step, beyond, top, AXIS, ASM)
        if LEVELS & 16:
            deviation = z + tl.expand_dims(beyond, AXIS)
            limit = tl.expand_dims(tl.sum(tl.abs(deviation), AXIS) * (GAMMA / N), AXIS)
            trit = (deviation > limit).to(tl.float32) + (deviation >= -limit).to(tl.float32)
            code = tl.where(tl.expand_dims(level == TERNARY, AXIS), trit + ROUND, code)
        if KEEP:
            restored = (code - ROUND - tl.expand_dims(0.5 * top, AXIS)) * tl.expand_dims(step, AXIS)
            lost = z + tl.expand_dims(beyond, AXIS) - restored
            line = (bh * room + n) * DP + axis
            tl.store(error + line, tl.sum(tl.reshape(lost * lost, [DP, TOKENS]), 1))
            restored = tl.reshape(restored + tl.expand_dims(centre, AXIS), [DP, TOKENS])
            tl.store(kept + line[:, None] * TOKENS + t[None], restored.to(tl.bfloat16))
        code = tl.reshape(code.to(tl.int32, bitcast=True), [DP, HALVES, FIELDS, 16])
        shift = (tl.arange(0, FIELDS) * STRIDE)[None, None, :, None]
        fields = tl.reshape(tl.sum(code << shift, 2) - _spread(0x4B400000, STRIDE, FIELDS), [DP, HALVES * 16])  # less the bits of ROUND
        if DIRECT:
            _store_planes(out + TWO, out + ONE, fields, axes, DP, TWO_COLUMNS, TWO_WIDTH, ONE_COLUMNS, ONE_WIDTH, (CODE_BITS + 1) // 2)
        else:
            words = own.to(tl.pointer_type(tl.int32))
            tl.debug_barrier()  # all have read the last tile's
            tl.store(words + a[:, None] * (HALVES * 16) + tl.arange(0, HALVES * 16)[None], fields)
            tl.debug_barrier()
            if TWO_COLUMNS > 0:
                _store_plane(out + TWO, words, two_axis, two_shift, 2, TOKENS, TWO_COLUMNS, TWO_PADDED, HALVES, STRIDE, TWO_WIDTH)
            if ONE_COLUMNS > 0:
                _store_plane(out + ONE, words, one_axis, one_shift, 1, TOKENS, ONE_COLUMNS, ONE_PADDED, HALVES, STRIDE, ONE_WIDTH)
        if N_TRITS > 0:
            codes = own + DP * HALVES * 64
            _store_trits(out + TRITS, codes, tl.reshape(code & 63, [DP, TOKENS]), FIRST_TRIT, N_TRITS, TOKENS, DP)
    tl.atomic_max(status, worst.to(tl.int32, bitcast=True))
