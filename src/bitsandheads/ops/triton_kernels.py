"""The Triton kernels of decode attention: rotate the queries, attend to splits, merge the splits, rotate back.

Shape letters: N query rows of a program (ROWS), D head_dim (DP: the next power of two), S splits. Longer than other files because a kernel must stand
in one piece with its constants.
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

NEVER = tl.constexpr(-1.0e30)


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


@triton.constexpr_function
def _interpreted():
    return triton.knobs.runtime.interpret


@triton.jit
def _shift_right(w, by):
    """Two words at once; the upper one leaves bits in the lower one that no mask asks for."""
    if _interpreted():
        return w >> by
    w, by = tl.broadcast(w, by)
    return tl.inline_asm_elementwise(
        "{ .reg .b32 n, a, b; and.b32 n, $2, 31; shr.u32 a, $1, n; shr.u32 n, $2, 16; shr.u32 b, $1, n; prmt.b32 $0, a, b, 0x7610; }",
        "=r,r,r",
        [w, by],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )


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
def _words(
    ptr,
    slots,
    rows,
    N: tl.constexpr,
    PADDED: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUES: tl.constexpr,
):
    """The word of every (slot, row), shifted so that the slot's code of field 0 is at bit 0 (int16)."""
    E: tl.constexpr = 256 // TOKENS // BITS
    C: tl.constexpr = (N + E - 1) // E
    s = slots if PADDED == N else tl.minimum(slots, N - 1)
    c = s if E == 1 else s % C
    offset = c * 16 + rows if VALUES else (c // WIDTH) * (16 * WIDTH) + rows * WIDTH + c % WIDTH
    w = tl.load(ptr.to(tl.pointer_type(tl.int16)) + offset)
    if E > 1:
        w = _shift_right(w, ((s // C) * BITS).to(tl.int16))
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
    SHIFT: tl.constexpr = _direct(TOKENS) * (256 // TOKENS) if f >= _direct(TOKENS) else 0
    MASK: tl.constexpr = ((1 << BITS) - 1) << _bit(f, TOKENS)
    return _masked(w, SHIFT, MASK)


@triton.jit
def _trits(ptr, slots, token, N: tl.constexpr, BIT: tl.constexpr):
    """Trits as fp16 subnormals at bit BIT."""
    i = token * N + tl.minimum(slots, N - 1)
    b = tl.load(ptr + i // 5).to(tl.int32)
    d = i % 5
    b = tl.where(d == 1, b // 3, tl.where(d == 2, b // 9, tl.where(d == 3, b // 27, tl.where(d == 4, b // 81, b))))
    return ((b % 3) << BIT).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def rotate_query(q, out, constant, row_scale, matrix, order, mean, noise, q_b, q_h, q_t, m_b, m_h, heads, kv_heads, scale_log2, noise_log2, peak,
                  GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                  MATRIX: tl.constexpr, ORDER: tl.constexpr, MEAN: tl.constexpr, NOISE: tl.constexpr):  # fmt: skip
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
        y = tl.zeros([ROWS, DP], tl.float32)
        for c0 in tl.static_range(0, DP, BLOCK):
            c = c0 + tl.arange(0, BLOCK)
            there = c < D
            source = tl.load(order + bh * D + c, mask=there, other=0).to(tl.int32) if ORDER else c
            x = tl.load(base[:, None] + source[None], mask=ok[:, None] & there[None], other=0.0).to(tl.float32)
            m = tl.load(matrix + b * m_b + h * m_h + c[:, None] * D + a[None], mask=there[:, None] & (a < D)[None], other=0.0).to(
                tl.float32
            )
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
            k_axis, k_step, k_weight, k_centre, v_step, q_b, q_h, q_t, tiles_b, tiles_h, sink_b, sink_h, tail_b, tail_h, batch, heads, window, scale_log2,
            GROUP: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
            SINK: tl.constexpr, HIDDEN: tl.constexpr, TILES: tl.constexpr, TILE_BYTES: tl.constexpr, TOKENS: tl.constexpr,
            GROUPS: tl.constexpr, FP8: tl.constexpr,
            K_TWO: tl.constexpr, K_ONE: tl.constexpr, K_TRIT: tl.constexpr, K_STEPS: tl.constexpr, K_CENTRES: tl.constexpr, K_FACTORS: tl.constexpr,
            K2: tl.constexpr, K1: tl.constexpr, K3: tl.constexpr, KC: tl.constexpr, K2P: tl.constexpr, K1P: tl.constexpr,
            K3P: tl.constexpr, KCP: tl.constexpr, KN: tl.constexpr, W2: tl.constexpr, W1: tl.constexpr,
            V_TWO: tl.constexpr, V_ONE: tl.constexpr, V_TRIT: tl.constexpr, V_STEPS: tl.constexpr, V_CENTRES: tl.constexpr, V_FACTORS: tl.constexpr,
            V2: tl.constexpr, V1: tl.constexpr, V3: tl.constexpr, VC: tl.constexpr, V2P: tl.constexpr, V1P: tl.constexpr,
            V3P: tl.constexpr, VCP: tl.constexpr, VN: tl.constexpr,
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
                top = tl.full([16, ROWS], NEVER, tl.float32)
                for j in tl.static_range(GF):
                    s = tl.zeros([16, ROWS], tl.float32)
                    if K2:
                        s = tl.dot(_codes(w2, (g * GF + j), 2, TOKENS), e2, s)
                    if K1:
                        s = tl.dot(_codes(w1, (g * GF + j), 1, TOKENS), e1, s)
                    if K3:
                        s = tl.dot(
                            _trits(base + K_TRIT, s3[None], ((g * GF + j) * 16 + i16)[:, None], K3, _bit((g * GF + j), TOKENS)), e3, s
                        )
                    s = (s * (by_step * (16777216.0 / (1 << _bit((g * GF + j), TOKENS)))) + bias) * scale_row[None] + shift[None]
                    top = tl.maximum(top, s)
                    scores = scores + (s,)  # noqa: RUF005
                top = tl.maximum(m, tl.max(top, 0))
                alpha = tl.exp2(m - top)
                m = top
                norm_sum *= alpha
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
                total = tl.zeros([16, ROWS], tl.float32)
                r2 = tl.zeros([V2P if V2 else 16, ROWS], tl.float32)
                r1 = tl.zeros([V1P if V1 else 16, ROWS], tl.float32)
                r3 = tl.zeros([V3P if V3 else 16, ROWS], tl.float32)
                for j in tl.static_range(GF):
                    # a common scale of 2^-9 for code * P: P = 2^(15 - bit) * 2^(score - maximum) fits fp16
                    p = tl.exp2(scores[j] - m[None] + (15 - _bit((g * GF + j), TOKENS))).to(tl.float16)
                    p32 = p.to(tl.float32) * ((1 << _bit((g * GF + j), TOKENS)) / 32768.0)
                    total += p32
                    if PER_TOKEN:
                        token = (g * GF + j) * 16 + i16
                        for k in tl.static_range(D // VBLOCK):
                            step = _stored(base + V_STEPS, token * (D // VBLOCK) + k, token < TOKENS, FP8) * _factor(
                                base + V_FACTORS, 0, FP8
                            )
                            pk = p32 * step[:, None]
                            offset = -0.5 * V_TOP * tl.sum(pk, 0)
                            if VC:
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
                                r2 += (
                                    tl.where((u2 % D // VBLOCK == k)[:, None], tl.dot(_codes(x2, (g * GF + j), 2, TOKENS), ph), 0.0) * undo
                                )
                            if V1:
                                r1 += (
                                    tl.where((u1 % D // VBLOCK == k)[:, None], tl.dot(_codes(x1, (g * GF + j), 1, TOKENS), ph), 0.0) * undo
                                )
                    else:
                        if V2:
                            r2 = tl.dot(_codes(x2, (g * GF + j), 2, TOKENS), p, r2)
                        if V1:
                            r1 = tl.dot(_codes(x1, (g * GF + j), 1, TOKENS), p, r1)
                        if V3:
                            r3 = tl.dot(
                                _trits(base + V_TRIT, u3[:, None], ((g * GF + j) * 16 + i16)[None], V3, _bit((g * GF + j), TOKENS)), p, r3
                            )
                sums = tl.sum(total, 0)
                norm_sum += sums
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
                        accc += (
                            sums[None]
                            * (_stored(base + V_CENTRES, g * VC + uc, uc < VC, FP8) * _factor(base + V_FACTORS, g * 2 + 1, FP8))[:, None]
                        )
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
):
    """Merge the splits of one block of query rows, CHUNK columns for each program, in a fixed order."""
    at = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    n = tl.arange(0, ROWS)
    j = tl.arange(0, TOGETHER)
    column = tl.where(c >= WIDTH - DP, 3, 0)  # whole-precision channels have their own maximum
    first = tl.min(column)
    m = tl.full([ROWS], NEVER, tl.float32)
    for s in range(0, splits, TOGETHER):
        row = (at * splits + s + j[:, None]) * ROWS + n[None]
        there = (s + j < splits)[:, None] & (n >= 0)[None]
        m = tl.maximum(
            m,
            tl.max(tl.maximum(tl.load(stats + row * 4, mask=there, other=NEVER), tl.load(stats + row * 4 + 3, mask=there, other=NEVER)), 0),
        )
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
            mt = tl.load(matrix + b * m_b + h * m_h + c[None] * D + a[:, None], mask=there[None] & (a < D)[:, None], other=0.0).to(
                tl.float32
            )
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
