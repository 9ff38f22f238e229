"""The Triton kernels that look at a whole prompt before and after it is packed: who draws attention, moments, sums for the map back.

Sums over tokens are split among programs, which write partial sums that the caller adds in a fixed order: reruns are bit-identical. Shape
letters: T tokens of a tile, D head_dim (DP: the next power of two), R query rows of a KV head (query heads x queries).
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

from .pack_kernels import skipped, source_token


@triton.jit
def _rows(q, bh, block, total, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """A block of query rows, and the newest place that each of them sees."""
    row = block * BLOCK + tl.arange(0, BLOCK)
    a = tl.arange(0, DP)
    x = tl.load(q + (bh * R + row)[:, None] * D + a[None], mask=(row < R)[:, None] & (a < D)[None], other=0.0).to(DOT)
    return x, row, tl.maximum(row % N + total - N, 0)


@triton.jit
def _keys(k, first, end, k_t, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    key = first + tl.arange(0, BLOCK)
    a = tl.arange(0, DP)
    return tl.load(k + key.to(tl.int64)[:, None] * k_t + a[None], mask=(key < end)[:, None] & (a < D)[None], other=0.0).to(DOT), key


@triton.jit
def query_sums(q, k, counts, most, sums, k_b, k_h, k_t, heads, scale_log2, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
               N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Maximum and sum of exp2 of a part of a row's scores: float32 [B h, splits, R] each. Program (block of rows, split, sequence and head)."""
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    bh = tl.program_id(2).to(tl.int64)
    total = tl.load(counts + bh // heads)
    x, row, own = _rows(q, bh, tl.program_id(0), total, D, DP, R, N, BLOCK, DOT)
    base = k + (bh // heads) * k_b + (bh % heads) * k_h
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    for first in range(split * BLOCK, total, splits * BLOCK):
        block, key = _keys(base, first, total, k_t, D, DP, BLOCK, DOT)
        s = tl.dot(x, tl.trans(block), input_precision="ieee") * scale_log2
        if first + BLOCK > total - N:  # keys that not every row sees
            s = tl.where(key[None] <= own[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1))
        safe = tl.where(new > float("-inf"), new, 0.0)
        norm = norm * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[:, None]), 1)
        m = new
    at = (bh * splits + split) * R + row
    tl.store(most + at, m, mask=row < R)
    tl.store(sums + at, norm, mask=row < R)


@triton.jit
def key_mass(q, k, counts, lse, row_weight, mass, k_b, k_h, k_t, mass_b, mass_h, heads, scale_log2, D: tl.constexpr, DP: tl.constexpr,
             R: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Mean probability that each key draws from the rows that see it. Program (block of keys, sequence and head)."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    total = tl.load(counts + b)
    first = tl.program_id(0) * BLOCK
    if first >= total:
        return
    block, key = _keys(k + b * k_b + (bh % heads) * k_h, first, total, k_t, D, DP, BLOCK, DOT)
    out = tl.zeros([BLOCK], tl.float32)
    for i in range(0, (R + BLOCK - 1) // BLOCK):
        x, row, own = _rows(q, bh, i, total, D, DP, R, N, BLOCK, DOT)
        s = tl.dot(block, tl.trans(x), input_precision="ieee") * scale_log2
        if first + BLOCK > total - N:
            s = tl.where(key[:, None] <= own[None], s, float("-inf"))
        norm = tl.load(lse + bh * R + row, mask=row < R, other=0.0)
        w = tl.load(row_weight + b * N + row % N, mask=row < R, other=0.0)
        out += tl.sum(tl.exp2(s - norm[None]) * w[None], 1)
    seen_by = tl.minimum(total - key, N).to(tl.float32)
    tl.store(mass + b * mass_b + (bh % heads) * mass_h + key, out / seen_by, mask=key < total)


@triton.jit
def diagonalize(matrices, vectors, sweeps, D: tl.constexpr, HALF: tl.constexpr):
    """Eigenvectors of symmetric float32 matrices [n, D, D] by Jacobi rotations, in place. Program: a matrix.

    D is even. Every round rotates D / 2 disjoint pairs (round-robin tournament, Brent and Luk, 1985), D - 1 rounds are a sweep.
    vectors: float32 [n, D, D], rows; the identity before.
    """
    a = matrices + tl.program_id(0).to(tl.int64) * D * D
    v = vectors + tl.program_id(0).to(tl.int64) * D * D
    i = tl.arange(0, HALF)
    there = i < D // 2
    both = there[:, None] & there[None]
    column = tl.arange(0, 2 * HALF)
    whole = there[:, None] & (column < D)[None]
    for step in range(sweeps * (D - 1)):
        r = step % (D - 1)
        p = tl.where(i == 0, D - 1, (r + i) % (D - 1))
        q = (r - i + D - 1) % (D - 1)
        pp = tl.load(a + p * (D + 1), mask=there, other=1.0)
        qq = tl.load(a + q * (D + 1), mask=there, other=1.0)
        pq = tl.load(a + p * D + q, mask=there, other=0.0)
        # the smaller angle that makes the entry (p, q) zero (Golub and Van Loan, section 8.5.2)
        tau = (qq - pp) / tl.where(pq != 0, 2.0 * pq, 1.0)
        t = tl.where(tau >= 0, 1.0, -1.0) / (tl.abs(tau) + tl.sqrt(1.0 + tau * tau))
        t = tl.where(pq != 0, t, 0.0)
        c = 1.0 / tl.sqrt(1.0 + t * t)
        s = t * c
        ci, si, cj, sj = c[:, None], s[:, None], c[None], s[None]
        at = p[:, None] * D
        bt = q[:, None] * D
        a_pp = tl.load(a + at + p[None], mask=both, other=0.0)
        a_pq = tl.load(a + at + q[None], mask=both, other=0.0)
        a_qp = tl.load(a + bt + p[None], mask=both, other=0.0)
        a_qq = tl.load(a + bt + q[None], mask=both, other=0.0)
        left_pp, left_pq = ci * a_pp - si * a_qp, ci * a_pq - si * a_qq
        left_qp, left_qq = si * a_pp + ci * a_qp, si * a_pq + ci * a_qq
        v_p = tl.load(v + at + column[None], mask=whole, other=0.0)
        v_q = tl.load(v + bt + column[None], mask=whole, other=0.0)
        tl.debug_barrier()  # all have read what is now written
        tl.store(a + at + p[None], left_pp * cj - left_pq * sj, mask=both)
        tl.store(a + at + q[None], left_pp * sj + left_pq * cj, mask=both)
        tl.store(a + bt + p[None], left_qp * cj - left_qq * sj, mask=both)
        tl.store(a + bt + q[None], left_qp * sj + left_qq * cj, mask=both)
        tl.store(v + at + column[None], ci * v_p - si * v_q, mask=whole)
        tl.store(v + bt + column[None], si * v_p + ci * v_q, mask=whole)
        tl.debug_barrier()


@triton.jit
def moments(x, weight, skip, jobs, totals, grams, x_b, x_h, x_t, w_b, w_h, batch, heads, SKIP: tl.constexpr, SKIP_PADDED: tl.constexpr, WEIGHTED: tl.constexpr,
            DOT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """Partial sums over the tokens that are packed: of w x, float32 [B h, workers, DP], and of the products of the deviations from the groups'
    means, float32 [B h, workers, DP, DP]. Program (worker, sequence and head); jobs as in pack_kernels.pack_tiles."""
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    first = tl.load(jobs + b)
    count = tl.load(jobs + batch + b)
    GROUPS: tl.constexpr = TOKENS // GROUP
    a = tl.arange(0, DP)
    t = tl.arange(0, TOKENS)
    total = tl.zeros([DP], tl.float32)
    gram = tl.zeros([DP, DP], tl.float32)
    left_out = skipped(skip + bh * SKIP, SKIP, SKIP_PADDED)
    for n in range(worker, count, workers):
        at = source_token(first + n * TOKENS + t, left_out, SKIP)
        tokens = tl.load(
            x + b * x_b + h * x_h + at.to(tl.int64)[:, None] * x_t + a[None], mask=(a < D)[None] & (at >= 0)[:, None], other=0.0
        )
        v = tl.reshape(tokens.to(tl.float32), [GROUPS, GROUP, DP])
        if WEIGHTED:
            w = tl.reshape(tl.load(weight + b * w_b + h * w_h + n * TOKENS + t), [GROUPS, GROUP])[:, :, None]
            shared = tl.sum(v * w, 1)
            z = v - (shared / tl.sum(w, 1))[:, None, :]
            zw = z * w
        else:
            shared = tl.sum(v, 1)
            z = v - (shared * (1.0 / GROUP))[:, None, :]
            zw = z
        total += tl.sum(shared, 0)
        left = tl.reshape(zw, [TOKENS, DP]).to(tl.bfloat16).to(DOT)
        gram = tl.dot(tl.trans(left), tl.reshape(z, [TOKENS, DP]).to(tl.bfloat16).to(DOT), gram, input_precision="ieee")
    line = bh * workers + worker
    tl.store(totals + line * DP + a, total)
    tl.store(grams + line * DP * DP + a[:, None] * DP + a[None], gram)


@triton.jit
def refit_sums(x, kept, mean, weight, skip, jobs, grams, crosses, x_b, x_h, x_t, w_b, w_h, batch, heads, room, SKIP: tl.constexpr, SKIP_PADDED: tl.constexpr,
               WEIGHTED: tl.constexpr, DOT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    """Partial sums of w y' y'^T and w y' (x - mean)^T, float32 [B h, workers, DP, DP], y' the restored axes (`kept`, as pack_tiles leaves them)."""
    worker = tl.program_id(0)
    workers = tl.num_programs(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    first = tl.load(jobs + b)
    count = tl.load(jobs + batch + b)
    a = tl.arange(0, DP)
    t = tl.arange(0, TOKENS)
    middle = tl.load(mean + bh * D + a, mask=a < D, other=0.0)
    gram = tl.zeros([DP, DP], tl.float32)
    cross = tl.zeros([DP, DP], tl.float32)
    left_out = skipped(skip + bh * SKIP, SKIP, SKIP_PADDED)
    for n in range(worker, count, workers):
        at = source_token(first + n * TOKENS + t, left_out, SKIP)
        tokens = tl.load(
            x + b * x_b + h * x_h + at.to(tl.int64)[:, None] * x_t + a[None], mask=(a < D)[None] & (at >= 0)[:, None], other=0.0
        )
        z = (tokens.to(tl.float32) - middle[None]).to(tl.bfloat16).to(DOT)
        y = tl.load(kept + ((bh * room + n) * DP + a)[:, None] * TOKENS + t[None])
        left = y.to(tl.float32)
        if WEIGHTED:
            left = left * tl.load(weight + b * w_b + h * w_h + n * TOKENS + t)[None]
        left = left.to(tl.bfloat16).to(DOT)
        gram = tl.dot(left, tl.trans(y.to(DOT)), gram, input_precision="ieee")
        cross = tl.dot(left, z, cross, input_precision="ieee")
    at = (bh * workers + worker) * DP * DP + a[:, None] * DP + a[None]
    tl.store(grams + at, gram)
    tl.store(crosses + at, cross)
