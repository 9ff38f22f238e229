"""The Triton kernels of decode attention: rotate the queries, attend to splits, merge the splits, rotate back.

Shape letters: N query rows of a program (ROWS), D head_dim (DP: the next power of two), S splits. Longer than other files because a kernel must stand
in one piece with its constants.
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)


@triton.constexpr_function
def _interpreted():
    return triton.knobs.runtime.interpret


@triton.jit
def _stored(ptr, index, mask, FP8: tl.constexpr):
    """Steps or centres as fp16; e4m3 by its bits, for GPUs without the conversion, four at once."""
    if not FP8:
        return tl.load(ptr.to(tl.pointer_type(tl.float16)) + index, mask=mask, other=0.0)
    b = tl.load(ptr + index, mask=mask, other=0)
    if _interpreted():
        b = b.to(tl.int16)
        return (((b & 0x7F) << 7) | ((b & 0x80) << 8)).to(tl.float16, bitcast=True) * 256.0
    return tl.inline_asm_elementwise(
        """{ .reg .b32 a, b, c, d, k; mov.b32 k, 0x5c005c00;
        prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;
        shr.u32 c, a, 1; shr.u32 d, b, 1; and.b32 c, c, 0x3f803f80; and.b32 d, d, 0x3f803f80;
        lop3.b32 a, a, 0x80008000, c, 0xea; lop3.b32 b, b, 0x80008000, d, 0xea;
        mul.f16x2 $0, a, k; mul.f16x2 $1, b, k; }""",
        "=r,=r,r",
        [b],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def _prefetch(ptr, BYTES: tl.constexpr):
    """Ask for steps and centres, which are read by index and so cannot be copied ahead like the planes."""
    if not _interpreted():
        lines = ptr + tl.minimum(tl.arange(0, 8) * 128, BYTES - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _factor(ptr, index, FP8: tl.constexpr):
    if FP8:
        return tl.load(ptr.to(tl.pointer_type(tl.float16)) + index).to(tl.float32)
    return 1.0


@triton.jit
def _masked(w, SHIFT: tl.constexpr, MASK: tl.constexpr):
    """(w >> SHIFT) & MASK as fp16; two words at once, for 16-bit operations would unpack the operands of the tensor cores."""
    if _interpreted():
        return ((w >> SHIFT) & MASK).to(tl.float16, bitcast=True)
    if SHIFT > 0:
        text: tl.constexpr = f"{{ .reg .b32 n; shr.u32 n, $1, {SHIFT}; and.b32 $0, n, {MASK * 0x10001}; }}"
    else:
        text: tl.constexpr = f"and.b32 $0, $1, {MASK * 0x10001};"
    return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _words(ptr, columns, rows, N: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, WIDTH: tl.constexpr, VALUES: tl.constexpr):
    """The words of a plane of N slots, E of each word, by (word column, row), int16."""
    C: tl.constexpr = (N + E - 1) // E
    c = columns if PADDED == C else tl.minimum(columns, C - 1)
    offset = c * 16 + rows if VALUES else (c // WIDTH) * (16 * WIDTH) + rows * WIDTH + c % WIDTH
    return tl.load(ptr.to(tl.pointer_type(tl.int16)) + offset)


@triton.jit
def _funnel(low, high, shift):
    """The low half of (high, low) >> shift % 32."""
    if _interpreted():
        return (((high.to(tl.uint64) << 32) | low) >> (shift & 31)).to(tl.uint32)
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, shift], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _ten(x):
    """Bytes of five trits in the low bits of both halves of x -> their two-bit codes, ten bits of each half (quant/planes.py)."""
    thirds, ninths = (x * 171 >> 9) & 0x7F007F, (x * 57 >> 7) & 0x7C007C  # quotients times 1, 4, 16, 64
    return x + thirds + ninths + ((x * 19 >> 5) & 0xF000F0) + ((x * 203 >> 8) & 0xC000C0)


@triton.jit
def _trit_places(count, PADDED: tl.constexpr):
    """For `_trit_words`: where the pairs of words [PADDED, 8] begin in a byte, and 0 and 1, uint32.

    count: memory with 0, 1, 2, ... Triton changes to the layout of the tensor cores before all arithmetic only if that begins with loads.
    """
    pair = tl.load(count + tl.arange(0, PADDED))[:, None] * 8 + tl.load(count + tl.arange(0, 8))[None]
    return pair.to(tl.uint32) % 5, tl.load(count + tl.arange(0, 2)).to(tl.uint32)


@triton.jit
def _trit_words(ptr, places, N: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr):
    """The words of N slots of trits as those of a two-bit plane, by (word column, row), int16.

    The 16 trits of a pair of words k = 5 u + r begin with trit r of byte 16 u + 3 r, so they lie in four bytes, of two aligned numbers.
    """
    LAST: tl.constexpr = (N // E * 32 + 4) // 5 - 1
    row = tl.arange(0, PADDED // 4)[None]
    k = row % 5 * 32 + tl.arange(0, 32)[:, None]  # pairs that are 160 apart have addresses that differ by a constant
    numbers = ptr.to(tl.pointer_type(tl.uint32))
    low = tl.load(numbers + tl.minimum(row // 5 * 128 + 4 * k // 5, LAST))
    high = tl.load(numbers + tl.minimum(row // 5 * 128 + (4 * k + 3) // 5, LAST))
    r, half = places
    b = _funnel(tl.reshape(tl.trans(low), [PADDED, 8]), tl.reshape(tl.trans(high), [PADDED, 8]), 24 * r)
    even, odd = _ten(b & 0xFF00FF), _ten((b >> 8) & 0xFF00FF)
    first, second = (even & 0x3FF) | ((odd & 0x3FF) << 10), (even >> 16) | ((odd >> 16) << 10)
    words = _funnel(first | (second << 20), second >> 12, 2 * r)
    return tl.reshape((words[:, :, None] >> (16 * half)[None, None]).to(tl.int16), [PADDED, 16])


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
def _codes(w, f: tl.constexpr, e: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Codes of field f, slot e of the words, as fp16 subnormals: code * 2^(bit - 24), bit = _bit(f)."""
    SHIFT: tl.constexpr = e * BITS + (_direct(TOKENS) * (256 // TOKENS) if f >= _direct(TOKENS) else 0)
    MASK: tl.constexpr = ((1 << BITS) - 1) << _bit(f, TOKENS)
    return _masked(w, SHIFT, MASK)


@triton.jit
def _query(q, k_axis, k_weight, slots, D: tl.constexpr):
    """The queries' entries of slots, weights folded in: fp16 [slots, N]. q: rows of D axes, [1, N] pointers."""
    return (tl.load(q + tl.load(k_axis + slots)[:, None]) * tl.load(k_weight + slots)[:, None]).to(tl.float16)


@triton.jit
def _queries(q, k_axis, k_weight, first, slots, E: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """`_query` of the slots of a plane from `first` on, for every slot of a word."""
    out = ()
    for e in tl.static_range(E):
        out = out + (_query(q, k_axis, k_weight, first + e * PADDED + slots, D),)  # noqa: RUF005
    return out


@triton.jit
def _times_steps(queries, steps, first, at, E: tl.constexpr, FP8: tl.constexpr):
    """Queries times the steps of their slots in a group."""
    out = ()
    for e in tl.static_range(E):
        out = out + (queries[e] * _stored(steps, first + at[e], True, FP8)[:, None],)  # noqa: RUF005
    return out


@triton.jit
def _add_offsets(bias, queries, TOP: tl.constexpr, E: tl.constexpr):
    """bias [16, N] - top / 2 times the sum of the queries over a plane's slots."""
    for e in tl.static_range(E):
        bias = tl.dot(tl.full([16, queries[e].shape[0]], -0.5 * TOP, tl.float16), queries[e], bias)
    return bias


@triton.jit
def _add_keys(scores, w, queries, f: tl.constexpr, E: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """scores + codes of field f times queries, over every slot of the words."""
    for e in tl.static_range(E):
        scores = tl.dot(_codes(w, f, e, BITS, TOKENS), queries[e], scores)
    return scores


@triton.jit
def _zeros(E: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr):
    out = ()
    for _ in tl.static_range(E):
        out = out + (tl.zeros([SLOTS, ROWS], tl.float32),)  # noqa: RUF005
    return out


@triton.jit
def _scaled(parts, by, E: tl.constexpr):
    out = ()
    for e in tl.static_range(E):
        out = out + (parts[e] * by,)  # noqa: RUF005
    return out


@triton.jit
def _sum(x, y, E: tl.constexpr):
    out = ()
    for e in tl.static_range(E):
        out = out + (x[e] + y[e],)  # noqa: RUF005
    return out


@triton.jit
def _add_values(sums, w, p, f: tl.constexpr, E: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """sums + codes of field f times probabilities, for every slot of the words."""
    out = ()
    for e in tl.static_range(E):
        out = out + (tl.dot(_codes(w, f, e, BITS, TOKENS), p, sums[e]),)  # noqa: RUF005
    return out


@triton.jit
def _add_block(sums, w, p, undo, f: tl.constexpr, k, columns, N: tl.constexpr, D: tl.constexpr, VBLOCK: tl.constexpr,
               E: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """The same for the slots of the k-th block of VBLOCK channels alone."""
    out = ()
    for e in tl.static_range(E):
        mine = ((e * ((N + E - 1) // E) + columns) % D // VBLOCK == k)[:, None]
        out = out + (sums[e] + tl.where(mine, tl.dot(_codes(w, f, e, BITS, TOKENS), p), 0.0) * undo,)  # noqa: RUF005
    return out


@triton.jit
def _add_steps(acc, sums, total, TOP: tl.constexpr, steps, first, at, by, E: tl.constexpr, FP8: tl.constexpr):
    """acc + the tile's values of a plane: step * (sum of code * P - top / 2 * sum of P)."""
    out = ()
    for e in tl.static_range(E):
        step = _stored(steps, first + at[e], True, FP8) * by
        out = out + (acc[e] + (sums[e] * 512.0 - 0.5 * TOP * total[None]) * step[:, None],)  # noqa: RUF005
    return out


@triton.jit
def _store(row, acc, columns, E: tl.constexpr, PADDED: tl.constexpr):
    for e in tl.static_range(E):
        tl.store(row + e * PADDED + columns[:, None], acc[e])


@triton.jit
def _steps_at(steps, first, columns, E: tl.constexpr, PADDED: tl.constexpr):
    out = ()
    for e in tl.static_range(E):
        out = out + (tl.load(steps + first + e * PADDED + columns),)  # noqa: RUF005
    return out


@triton.jit
def rotate_query(q, out, constant, row_scale, matrix, order, mean, noise, q_b, q_h, q_t, m_b, m_h, heads, kv_heads, scale_log2, noise_log2, peak,
                  GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  PRECISION: tl.constexpr, MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr):  # fmt: skip
    """Queries -> axes, float32 [B h, blocks * ROWS, D], each row scaled so that its largest entry is `peak`.

    Also the constant q . mean with the correction for noise, and what undoes the scaling, for each row.
    """
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
        y = tl.zeros([DP, ROWS], tl.float32)
        for c0 in tl.static_range(0, DP, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            there = c < D
            source = tl.load(order + bh * D + c, mask=there, other=0).to(tl.int32) if ORDER else c
            x = tl.load(base[None] + source[:, None], mask=ok[None] & there[:, None], other=0.0).to(tl.float32)
            m = tl.load(matrix + b * m_b + h * m_h + c[None] * D + a[:, None], mask=there[None] & (a < D)[:, None], other=0.0)
            y = tl.dot(m.to(tl.float32), x, y, input_precision=PRECISION)
    else:
        source = tl.load(order + bh * D + a, mask=a < D, other=0).to(tl.int32) if ORDER else a
        y = tl.load(base[None] + source[:, None], mask=ok[None] & (a < D)[:, None], other=0.0).to(tl.float32)
    biggest = tl.max(tl.abs(y), 0)
    inverse = tl.where(biggest > 0, peak / tl.where(biggest > 0, biggest, 1.0), 0.0)
    at = (bh * tl.num_programs(1) + block) * ROWS + tl.arange(0, ROWS)
    tl.store(out + at[None] * D + a[:, None], y * inverse[None], mask=(a < D)[:, None])
    tl.store(row_scale + at, biggest / peak * scale_log2)
    total = tl.zeros([ROWS], tl.float32)
    if MEAN:
        x = tl.load(base[None] + a[:, None], mask=ok[None] & (a < D)[:, None], other=0.0).to(tl.float32)
        total = tl.sum(x * tl.load(mean + bh * D + a, mask=a < D, other=0.0)[:, None], 0) * scale_log2
    if NOISE:
        total += tl.sum(y * y * tl.load(noise + bh * D + a, mask=a < D, other=0.0)[:, None], 0) * noise_log2
    tl.store(constant + at, total)


@triton.jit
def _attend_raw(
    qt,
    m,
    norm_sum,
    acc,
    k,
    v,
    count,
    newest,
    back,
    window,
    split,
    splits,
    scale_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    RAW: tl.constexpr,
    TAIL: tl.constexpr,
):
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
        norm_sum = norm_sum * alpha + tl.sum(p, 0)
        acc = acc * alpha[None]
        vt = tl.trans(tl.load(v + t.to(tl.int64)[:, None] * D + a[None], mask=there, other=0.0))
        high = p.to(vt.dtype)
        acc = tl.dot(vt, high, acc, input_precision="ieee")
        if vt.dtype == tl.bfloat16:
            acc = tl.dot(vt, (p - high.to(tl.float32)).to(vt.dtype), acc, input_precision="ieee")
    return m, norm_sum, acc


@triton.jit
def attend(q, q_axes, constant, row_scale, tiles, sink_k, sink_v, tail_k, tail_v, lengths, hidden, partial, stats, kv_heads,
            k_axis, k_step, k_weight, k_centre, v_step, numbers, q_b, q_h, q_t, tiles_b, tiles_h, sink_b, sink_h, tail_b, tail_h,
            batch, heads, window, scale_log2,
            GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
            SINK: tl.constexpr, HIDDEN: tl.constexpr, TILES: tl.constexpr, TILE_BYTES: tl.constexpr, TOKENS: tl.constexpr,
            GROUPS: tl.constexpr, FP8: tl.constexpr,
            K_TWO: tl.constexpr, K_ONE: tl.constexpr, K_TRIT: tl.constexpr, K_STEPS: tl.constexpr, K_CENTRES: tl.constexpr, K_FACTORS: tl.constexpr,
            K2: tl.constexpr, K1: tl.constexpr, K3: tl.constexpr, KC: tl.constexpr, K2P: tl.constexpr, K1P: tl.constexpr,
            K3P: tl.constexpr, KCP: tl.constexpr, KN: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr,
            V_TWO: tl.constexpr, V_ONE: tl.constexpr, V_TRIT: tl.constexpr, V_STEPS: tl.constexpr, V_CENTRES: tl.constexpr, V_FACTORS: tl.constexpr,
            V2: tl.constexpr, V1: tl.constexpr, V3: tl.constexpr, VC: tl.constexpr, V2P: tl.constexpr, V1P: tl.constexpr,
            V3P: tl.constexpr, VCP: tl.constexpr, VN: tl.constexpr,
            RESIDUAL: tl.constexpr, PER_TOKEN: tl.constexpr, V_CENTRED: tl.constexpr, VBLOCK: tl.constexpr, V_TOP: tl.constexpr):  # fmt: skip
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
    norm_sum = tl.zeros([ROWS], tl.float32)
    raw = tl.zeros([DP, ROWS], tl.float32)
    # whole-precision tokens
    qt = tl.load(
        q + b * q_b + head.to(tl.int64)[None] * q_h + (rows % Q)[None] * q_t + a[:, None], mask=ok[None] & (a < D)[:, None], other=0.0
    )
    back = Q - 1 - rows % Q
    if HIDDEN:
        back = tl.load(hidden + b * Q + rows % Q).to(tl.int32)
    tail = tl.load(lengths + 2 * batch + b)
    if SINK:
        sink = tl.load(lengths + b)
        m, l_raw, raw = _attend_raw(
            qt,
            m,
            l_raw,
            raw,
            sink_k + b * sink_b + h * sink_h,
            sink_v + b * sink_b + h * sink_h,
            sink,
            tail + sink,
            back,
            window,
            split,
            splits,
            scale_log2,
            D,
            DP,
            RAW,
            False,
        )
    m, l_raw, raw = _attend_raw(
        qt,
        m,
        l_raw,
        raw,
        tail_k + b * tail_b + h * tail_h,
        tail_v + b * tail_b + h * tail_h,
        tail,
        tail,
        back,
        window,
        split,
        splits,
        scale_log2,
        D,
        DP,
        RAW,
        True,
    )
    at = ((bh * tl.num_programs(2) + block) * splits + split) * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, ROWS)
    tl.store(partial + at[None] * WIDTH + (WIDTH - DP) + a[:, None], raw)
    tl.store(stats + at * 4 + 2, l_raw)
    tl.store(stats + at * 4 + 3, m)
    m = tl.full([ROWS], NEVER, tl.float32)
    if TILES:
        FIELDS: tl.constexpr = TOKENS // 16
        GF: tl.constexpr = FIELDS // GROUPS
        E2: tl.constexpr = 128 // TOKENS  # slots of a word; trits are words of two-bit codes once restored
        E1: tl.constexpr = 256 // TOKENS
        count = tl.load(lengths + batch + b)
        per = tl.cdiv(count, splits)
        qrow = (bh * tl.num_programs(2) + block) * ROWS + n
        scale_row = tl.load(row_scale + qrow)
        shift = tl.load(constant + qrow)
        i16 = tl.arange(0, 16)
        acc2 = _zeros(E2 if V2 else 1, V2P if V2 else 16, ROWS)
        acc1 = _zeros(E1 if V1 else 1, V1P if V1 else 16, ROWS)
        acc3 = _zeros(E2 if V3 else 1, V3P if V3 else 16, ROWS)
        accc = tl.zeros([VCP if VC else 16, ROWS], tl.float32)
        q_rows = q_axes + qrow[None] * D
        if K2:
            s2 = tl.arange(0, K2P)
            at2 = _steps_at(k_step, 0, s2, E2, K2P)
            q2 = _queries(q_rows, k_axis, k_weight, 0, s2, E2, K2P, D)
        if K1:
            s1 = tl.arange(0, K1P)
            at1 = _steps_at(k_step, E2 * K2P, s1, E1, K1P)
            q1 = _queries(q_rows, k_axis, k_weight, E2 * K2P, s1, E1, K1P, D)
        if K3:
            s3 = tl.arange(0, K3P)
            k_places = _trit_places(numbers, K3P)
            at3 = _steps_at(k_step, E2 * K2P + E1 * K1P, s3, E2, K3P)
            q3 = _queries(q_rows, k_axis, k_weight, E2 * K2P + E1 * K1P, s3, E2, K3P, D)
        if KC:
            sc = tl.arange(0, KCP)
            qc = tl.load(q_rows + tl.load(k_centre + sc)[:, None])
            qc = tl.where((sc < KC)[:, None], qc, 0.0)
            qch = qc.to(tl.float16)
            if RESIDUAL:
                qcl = (qc - qch.to(tl.float32)).to(tl.float16)
        if V2:
            u2 = tl.arange(0, V2P)
            vat2 = _steps_at(v_step, 0, u2, E2, V2P)
        if V1:
            u1 = tl.arange(0, V1P)
            vat1 = _steps_at(v_step, E2 * V2P, u1, E1, V1P)
        if V3:
            u3 = tl.arange(0, V3P)
            v_places = _trit_places(numbers, V3P)
            vat3 = _steps_at(v_step, E2 * V2P + E1 * V1P, u3, E2, V3P)
        if VC:
            uc = tl.arange(0, VCP)
        for tile in range(split * per, tl.minimum(count, (split + 1) * per)):
            base = tiles + b * tiles_b + h * tiles_h + tile * TILE_BYTES
            ahead = tiles + b * tiles_b + h * tiles_h + tl.minimum(tile + 1, count - 1) * TILE_BYTES
            _prefetch(ahead + K_STEPS, V_TWO - K_STEPS)
            _prefetch(ahead + V_STEPS, TILE_BYTES - V_STEPS)
            if K2:
                w2 = _words(base + K_TWO, s2[None], i16[:, None], K2, E2, K2P, W2, False)
            if K1:
                w1 = _words(base + K_ONE, s1[None], i16[:, None], K1, E1, K1P, W1, False)
            if K3:
                w3 = tl.trans(_trit_words(base + K_TRIT, k_places, K3, E2, K3P))
            for g in tl.static_range(GROUPS):
                by_step = _factor(base + K_FACTORS, g * 2, FP8)
                bias = tl.zeros([16, ROWS], tl.float32)
                if K2:
                    e2 = _times_steps(q2, base + K_STEPS, g * KN, at2, E2, FP8)
                    bias = _add_offsets(bias, e2, 3, E2)
                if K1:
                    e1 = _times_steps(q1, base + K_STEPS, g * KN, at1, E1, FP8)
                    bias = _add_offsets(bias, e1, 1, E1)
                if K3:
                    e3 = _times_steps(q3, base + K_STEPS, g * KN, at3, E2, FP8)
                    bias = _add_offsets(bias, e3, 2, E2)
                bias = bias * by_step
                if KC:
                    c = _stored(base + K_CENTRES, g * KC + sc, sc < KC, FP8)
                    c = tl.broadcast_to(c[None], [16, KCP])
                    from_centres = tl.dot(c, qch)
                    if RESIDUAL:
                        from_centres = tl.dot(c, qcl, from_centres)
                    bias += from_centres * _factor(base + K_FACTORS, g * 2 + 1, FP8)
                bias = bias * scale_row[None] + shift[None]
                slope = by_step * scale_row
                scores = ()
                top = tl.full([16, ROWS], NEVER, tl.float32)
                for j in tl.static_range(GF):
                    s = tl.zeros([16, ROWS], tl.float32)
                    if K2:
                        s = _add_keys(s, w2, e2, g * GF + j, E2, 2, TOKENS)
                    if K1:
                        s = _add_keys(s, w1, e1, g * GF + j, E1, 1, TOKENS)
                    if K3:
                        s = _add_keys(s, w3, e3, g * GF + j, E2, 2, TOKENS)
                    s = s * (slope * (16777216.0 / (1 << _bit((g * GF + j), TOKENS))))[None] + bias
                    top = tl.maximum(top, s)
                    scores = scores + (s,)  # noqa: RUF005
                top = tl.maximum(m, tl.max(top, 0))
                alpha = tl.exp2(m - top)
                m = top
                norm_sum *= alpha
                if V2:
                    acc2 = _scaled(acc2, alpha[None], E2)
                if V1:
                    acc1 = _scaled(acc1, alpha[None], E1)
                if V3:
                    acc3 = _scaled(acc3, alpha[None], E2)
                if VC:
                    accc *= alpha[None]
                if V2:
                    x2 = _words(base + V_TWO, u2[:, None], i16[None], V2, E2, V2P, 1, True)
                if V1:
                    x1 = _words(base + V_ONE, u1[:, None], i16[None], V1, E1, V1P, 1, True)
                if V3 and g == 0:
                    x3 = _trit_words(base + V_TRIT, v_places, V3, E2, V3P)
                total = tl.zeros([16, ROWS], tl.float32)
                r2 = _zeros(E2 if V2 else 1, V2P if V2 else 16, ROWS)
                r1 = _zeros(E1 if V1 else 1, V1P if V1 else 16, ROWS)
                r3 = _zeros(E2 if V3 else 1, V3P if V3 else 16, ROWS)
                for j in tl.static_range(GF):
                    # a common scale of 2^-9 for code * P: P = 2^(15 - bit) * 2^(score - maximum) fits fp16
                    p = tl.exp2(scores[j] - m[None] + (15 - _bit((g * GF + j), TOKENS))).to(tl.float16)
                    total = tl.dot(tl.full([16, 16], (1 << _bit((g * GF + j), TOKENS)) / 32768.0, tl.float16), p, total)
                    if PER_TOKEN:
                        p32 = p.to(tl.float32) * ((1 << _bit((g * GF + j), TOKENS)) / 32768.0)
                        token = (g * GF + j) * 16 + i16
                        for k in tl.static_range(D // VBLOCK):
                            step = _stored(base + V_STEPS, token * (D // VBLOCK) + k, token < TOKENS, FP8) * _factor(
                                base + V_FACTORS, 0, FP8
                            )
                            pk = p32 * step[:, None]
                            offset = -0.5 * V_TOP * tl.sum(pk, 0)
                            if V_CENTRED:
                                centre = _stored(base + V_CENTRES, token * (D // VBLOCK) + k, token < TOKENS, FP8) * _factor(
                                    base + V_FACTORS, 1, FP8
                                )
                                offset += tl.sum(p32 * centre[:, None], 0)
                            accc += tl.where((uc // VBLOCK == k)[:, None] & (uc < D)[:, None], offset[None], 0.0)
                            # |step| <= 65504 would overflow fp16: a power of two of its own for each product
                            big = tl.max(tl.abs(pk))
                            norm = tl.where(big > 0, 1024.0 / big, 0.0)
                            ph = (pk * norm).to(tl.float16)
                            undo = tl.where(big > 0, big / 1024.0, 0.0) * (16777216.0 / (1 << _bit((g * GF + j), TOKENS)))
                            if V2:
                                r2 = _add_block(r2, x2, ph, undo, (g * GF + j), k, u2, V2, D, VBLOCK, E2, 2, TOKENS)
                            if V1:
                                r1 = _add_block(r1, x1, ph, undo, (g * GF + j), k, u1, V1, D, VBLOCK, E1, 1, TOKENS)
                    else:
                        if V2:
                            r2 = _add_values(r2, x2, p, (g * GF + j), E2, 2, TOKENS)
                        if V1:
                            r1 = _add_values(r1, x1, p, (g * GF + j), E1, 1, TOKENS)
                        if V3:
                            r3 = _add_values(r3, x3, p, (g * GF + j), E2, 2, TOKENS)
                sums = tl.max(total, 0)  # all rows are equal
                norm_sum += sums
                if PER_TOKEN:
                    if V2:
                        acc2 = _sum(acc2, r2, E2)
                    if V1:
                        acc1 = _sum(acc1, r1, E1)
                else:
                    by = _factor(base + V_FACTORS, g * 2, FP8)
                    if V2:
                        acc2 = _add_steps(acc2, r2, sums, 3, base + V_STEPS, g * VN, vat2, by, E2, FP8)
                    if V1:
                        acc1 = _add_steps(acc1, r1, sums, 1, base + V_STEPS, g * VN, vat1, by, E1, FP8)
                    if V3:
                        acc3 = _add_steps(acc3, r3, sums, 2, base + V_STEPS, g * VN, vat3, by, E2, FP8)
                    if VC:
                        accc += (
                            sums[None]
                            * (_stored(base + V_CENTRES, g * VC + uc, uc < VC, FP8) * _factor(base + V_FACTORS, g * 2 + 1, FP8))[:, None]
                        )
        row = partial + at[None] * WIDTH
        if V2:
            _store(row, acc2, u2, E2, V2P)
        row += E2 * V2P
        if V1:
            _store(row, acc1, u1, E1, V1P)
        row += E1 * V1P
        if V3:
            _store(row, acc3, u3, E2, V3P)
        row += E2 * V3P
        if VC:
            tl.store(row + uc[:, None], accc)
    tl.store(stats + at * 4, m)
    tl.store(stats + at * 4 + 1, norm_sum)


@triton.jit
def reduce(
    partial,
    stats,
    merged,
    merged_stats,
    splits,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,
    TOGETHER: tl.constexpr,
    STATS: tl.constexpr,
):
    """Merge the splits of one block of query rows, CHUNK columns for each program, in a fixed order."""
    at = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    n = tl.arange(0, ROWS)
    column = tl.where(c >= WIDTH - DP, 3, 0)  # whole-precision channels have their own maximum
    first = tl.min(column)
    m = tl.full([ROWS], NEVER, tl.float32)
    j = tl.arange(0, STATS)
    for s in range(0, splits, STATS):
        row = (at * splits + s + j[:, None]) * ROWS + n[None]
        there = (s + j < splits)[:, None] & (n >= 0)[None]
        m = tl.maximum(
            m,
            tl.max(tl.maximum(tl.load(stats + row * 4, mask=there, other=NEVER), tl.load(stats + row * 4 + 3, mask=there, other=NEVER)), 0),
        )
    y = tl.zeros([ROWS, CHUNK], tl.float32)
    packed = tl.zeros([ROWS], tl.float32)
    raw = tl.zeros([ROWS], tl.float32)
    j = tl.arange(0, TOGETHER)
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
        y += tl.sum(
            e[:, :, None]
            * tl.load(partial + row[:, :, None] * WIDTH + c[None, None], mask=there[:, :, None] & (c >= 0)[None, None], other=0.0),
            0,
        )
    tl.store(merged + (at * ROWS + n)[:, None] * WIDTH + c[None], y)
    if tl.program_id(1) == 0:
        tl.store(merged_stats + (at * ROWS + n) * 4, m)
        tl.store(merged_stats + (at * ROWS + n) * 4 + 1, packed)
        tl.store(merged_stats + (at * ROWS + n) * 4 + 2, raw)


@triton.jit
def finish(partial, stats, out, lse, collect, weights, matrix, order, mean, m_b, m_h, heads, kv_heads, q_heads,
           GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
           TILES: tl.constexpr, TERMS: tl.constexpr,
           MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Gather the axes of one block of query rows from its partial sums, rotate BLOCK channels of the packed part back, write output and lse."""
    bh = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    b = bh // heads
    h = bh % heads
    n = tl.arange(0, ROWS)
    rows = block * ROWS + n
    ok = rows < GROUP * Q
    head = tl.load(kv_heads + h) * GROUP + rows // Q
    at = (bh * tl.num_programs(1) + block) * ROWS + n
    m = tl.load(stats + at * 4)
    mass = tl.load(stats + at * 4 + 1)
    total = mass + tl.load(stats + at * 4 + 2)
    inverse = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    there = c < D
    z = tl.zeros([BLOCK, ROWS], tl.float32)
    if TILES:
        a = tl.arange(0, DP) if MATRIX else c
        y = tl.zeros([DP if MATRIX else BLOCK, ROWS], tl.float32)
        for j in tl.static_range(TERMS):
            index = tl.load(collect + a * 4 + j, mask=a < D, other=-1)
            w = tl.load(weights + a * 4 + j, mask=a < D, other=0.0)
            y += tl.load(partial + at[None] * WIDTH + index[:, None], mask=(index >= 0)[:, None] & (n >= 0)[None], other=0.0) * w[:, None]
        if MATRIX:
            turn = tl.load(matrix + b * m_b + h * m_h + c[:, None] * D + a[None], mask=there[:, None] & (a < D)[None], other=0.0)
            z = tl.dot(turn.to(tl.float32), y, input_precision="tf32x3")
        else:
            z = y
        if MEAN:
            z += mass[None] * tl.load(mean + bh * D + c, mask=there, other=0.0)[:, None]
    to = tl.load(order + bh * D + c, mask=there, other=0).to(tl.int32) if ORDER else c
    z += tl.load(partial + at[None] * WIDTH + (WIDTH - DP) + to[:, None])
    target = out + ((b * q_heads + head) * Q + rows % Q)[None] * D
    tl.store(target + to[:, None], z * inverse[None], mask=ok[None] & there[:, None])
    if tl.program_id(2) == 0:
        natural = tl.where(total > 0, (m + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453, -float("inf"))
        tl.store(lse + (b * q_heads + head) * Q + rows % Q, natural, mask=ok)
