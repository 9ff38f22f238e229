"""The Triton kernels that look at a whole prompt before and after it is packed: who draws attention, moments, sums for the map back.

Sums over tokens are split among programs, which write partial sums that the caller adds in a fixed order: reruns are bit-identical. Shape
letters: T tokens of a tile, D head_dim (DP: the next power of two), R query rows of a KV head (query heads x queries).
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

from .pack_kernels import source_token


@triton.jit
def _scores(q, k, scale_log2, own, key):
    """q k^T in units of log2, [keys, rows]; what a row does not see is -inf."""
    s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale_log2
    return tl.where(key[:, None] <= own[None], s, float("-inf"))


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
        s = _scores(x, block, scale_log2, own, key)
        new = tl.maximum(m, tl.max(s, 0))
        safe = tl.where(new > float("-inf"), new, 0.0)
        norm = norm * tl.exp2(m - safe) + tl.sum(tl.exp2(s - safe[None]), 0)
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
        s = _scores(x, block, scale_log2, own, key)
        norm = tl.load(lse + bh * R + row, mask=row < R, other=0.0)
        w = tl.load(row_weight + b * N + row % N, mask=row < R, other=0.0)
        out += tl.sum(tl.exp2(s - norm[None]) * w[None], 1)
    seen_by = tl.minimum(total - key, N).to(tl.float32)
    tl.store(mass + b * mass_b + (bh % heads) * mass_h + key, out / seen_by, mask=key < total)


@triton.jit
def moments(x, weight, skip, jobs, totals, grams, x_b, x_h, x_t, w_b, w_h, batch, heads, SKIP: tl.constexpr, WEIGHTED: tl.constexpr,
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
    for n in range(worker, count, workers):
        at = source_token(first + n * TOKENS + t, skip + bh * SKIP, SKIP)
        tokens = tl.load(
            x + b * x_b + h * x_h + at.to(tl.int64)[:, None] * x_t + a[None], mask=(a < D)[None] & (at >= 0)[:, None], other=0.0
        )
        v = tl.reshape(tokens.to(tl.float32), [GROUPS, GROUP, DP])
        if WEIGHTED:
            w = tl.reshape(tl.load(weight + b * w_b + h * w_h + at), [GROUPS, GROUP])[:, :, None]
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
def refit_sums(x, kept, mean, weight, skip, jobs, grams, crosses, x_b, x_h, x_t, w_b, w_h, batch, heads, room, SKIP: tl.constexpr,
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
    for n in range(worker, count, workers):
        at = source_token(first + n * TOKENS + t, skip + bh * SKIP, SKIP)
        tokens = tl.load(
            x + b * x_b + h * x_h + at.to(tl.int64)[:, None] * x_t + a[None], mask=(a < D)[None] & (at >= 0)[:, None], other=0.0
        )
        z = (tokens.to(tl.float32) - middle[None]).to(tl.bfloat16).to(DOT)
        y = tl.load(kept + ((bh * room + n) * DP + a)[:, None] * TOKENS + t[None])
        left = y.to(tl.float32)
        if WEIGHTED:
            left = left * tl.load(weight + b * w_b + h * w_h + at)[None]
        left = left.to(tl.bfloat16).to(DOT)
        gram = tl.dot(left, tl.trans(y.to(DOT)), gram, input_precision="ieee")
        cross = tl.dot(left, z, cross, input_precision="ieee")
    at = (bh * workers + worker) * DP * DP + a[:, None] * DP + a[None]
    tl.store(grams + at, gram)
    tl.store(crosses + at, cross)
