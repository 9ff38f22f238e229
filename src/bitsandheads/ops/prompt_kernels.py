"""The Triton kernels that look at a whole prompt before and after it is packed: who draws attention, moments, sums for the map back.

Sums over tokens are split among programs, which write partial sums that the caller adds in a fixed order: reruns are bit-identical. Numbers that follow
the prompt's length are not specialized: a prompt of another length finds its kernels compiled. Shape letters: T tokens of a tile,
D head_dim (DP: the next power of two), R query rows of a KV head (query heads x queries).
"""

# mypy: ignore-errors
# (kernels are written in Triton's language, not in Python: arguments are blocks)

import triton
import triton.language as tl

from .pack_kernels import skipped, source_token


@triton.jit
def _rows(q, bh, block, total, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """A block of query rows, and the newest place that each of them sees."""
    row = block * ROWS + tl.arange(0, ROWS)
    a = tl.arange(0, DP)
    x = tl.load(q + (bh * R + row)[:, None] * D + a[None], mask=(row < R)[:, None] & (a < D)[None], other=0.0).to(DOT)
    return x, row, tl.maximum(row % N + total - N, 0)


@triton.jit
def _keys(k, first, end, k_t, D: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr):
    key = first + tl.arange(0, KEYS)
    a = tl.arange(0, DP)
    return tl.load(k + key.to(tl.int64)[:, None] * k_t + a[None], mask=(key < end)[:, None] & (a < D)[None], other=0.0).to(DOT), key


@triton.jit
def query_sums(q, k, counts, sums, k_b, k_h, k_t, heads, scale_log2, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
               N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """log2 of the sum of exp2 of a part of a row's scores: float32 [B h, splits, R]. Program (block of rows, split, sequence and head)."""
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    bh = tl.program_id(2).to(tl.int64)
    total = tl.load(counts + bh // heads)
    x, row, own = _rows(q, bh, tl.program_id(0), total, D, DP, R, N, ROWS, DOT)
    base = k + (bh // heads) * k_b + (bh % heads) * k_h
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for first in range(split * KEYS, total, splits * KEYS):
        block, key = _keys(base, first, total, k_t, D, DP, KEYS, DOT)
        s = tl.dot(x, tl.trans(block), input_precision="ieee")
        if first + KEYS > total - N:  # keys that not every row sees
            s = tl.where(key[None] <= own[:, None], s, float("-inf"))
        new = tl.maximum(m, tl.max(s, 1) * scale_log2)
        safe = tl.where(new > float("-inf"), new, 0.0)
        norm = norm * tl.exp2(m - safe) + tl.sum(tl.exp2(s * scale_log2 - safe[:, None]), 1)
        m = new
    tl.store(sums + (bh * splits + split) * R + row, m + tl.log2(norm), mask=row < R)


@triton.jit(do_not_specialize=["splits"])
def row_norms(sums, row_weight, norms, heads, splits, R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """What key_mass takes off a row's scores: log2 of the sum over all keys, less log2 of the row's weight; float32 [B h, R]. Program (block of
    rows, sequence and head); PARTS: at least `splits`."""
    bh = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, PARTS)[:, None]
    part = tl.load(sums + (bh * splits + p) * R + row[None], mask=(p < splits) & (row < R)[None], other=float("-inf"))
    most = tl.max(part, 0)
    total = most + tl.log2(tl.sum(tl.exp2(part - most[None]), 0))
    weight = tl.load(row_weight + bh // heads * N + row % N, mask=row < R, other=0.0)
    tl.store(norms + bh * R + row, total - tl.log2(weight), mask=row < R)


@triton.jit(do_not_specialize=["mass_b", "mass_h"])
def key_mass(q, k, counts, norms, mass, k_b, k_h, k_t, mass_b, mass_h, heads, scale_log2, D: tl.constexpr, DP: tl.constexpr,
             R: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """Mean probability that each key draws from the rows that see it. Program (block of keys, sequence and head)."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    total = tl.load(counts + b)
    first = tl.program_id(0) * KEYS
    if first >= total:
        return
    block, key = _keys(k + b * k_b + (bh % heads) * k_h, first, total, k_t, D, DP, KEYS, DOT)
    out = tl.zeros([KEYS], tl.float32)
    for i in range(0, (R + ROWS - 1) // ROWS):
        x, row, own = _rows(q, bh, i, total, D, DP, R, N, ROWS, DOT)
        s = tl.dot(block, tl.trans(x), input_precision="ieee")
        if first + KEYS > total - N:
            s = tl.where(key[:, None] <= own[None], s, float("-inf"))
        norm = tl.load(norms + bh * R + row, mask=row < R, other=float("inf"))
        out += tl.sum(tl.exp2(s * scale_log2 - norm[None]), 1)
    seen_by = tl.minimum(total - key, N).to(tl.float32)
    tl.store(mass + b * mass_b + (bh % heads) * mass_h + key, out / seen_by, mask=key < total)


@triton.jit(do_not_specialize=["mass_b", "mass_h"])
def choose(mass, ends, packed, heavy, key_weight, value_weight, mass_b, mass_h, heads, room, key_share, value_share, FIRST: tl.constexpr,
           HEAVY: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The HEAVY places from FIRST to ends[b] with the largest mass, ascending, int32 [B h, HEAVY], and what the error of the packed tokens
    counts for the keys and the values (HalfCodec.weights), float32 [B h, room] in the order of packing. mass is overwritten at these places.
    Program (sequence and head); packed: int32 [B], tokens that are packed."""
    bh = tl.program_id(0).to(tl.int64)
    b = bh // heads
    end = tl.load(ends + b)
    count = tl.load(packed + b)
    own = mass + b * mass_b + (bh % heads) * mass_h
    i = tl.arange(0, BLOCK)
    j = tl.arange(0, PADDED)
    chosen = tl.full([PADDED], 1 << 30, tl.int32)
    for n in range(HEAVY):
        best = tl.full([BLOCK], -1.0, tl.float32)
        place = tl.full([BLOCK], 1 << 30, tl.int32)
        for start in range(FIRST, end, BLOCK):
            x = tl.load(own + start + i, mask=start + i < end, other=-1.0)
            place = tl.where(x > best, start + i, place)
            best = tl.maximum(best, x)
        first = tl.min(tl.where(best == tl.max(best, 0), place, 1 << 30), 0)
        first = tl.minimum(first, tl.maximum(end - 1, 0))  # nothing is above -1: not a number
        chosen = tl.where(j == n, first, chosen)
        tl.debug_barrier()
        tl.store(own + first, -1.0)
        tl.debug_barrier()
    if HEAVY > 0:
        before = tl.sum(((chosen[None] < chosen[:, None]) | ((chosen[None] == chosen[:, None]) & (j[None] < j[:, None]))).to(tl.int32), 1)
        tl.store(heavy + bh * HEAVY + before, chosen, mask=j < HEAVY)
        tl.debug_barrier()
    if KEYS or VALUES:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(FIRST, end, BLOCK):
            total += tl.maximum(tl.load(own + start + i, mask=start + i < end, other=0.0), 0.0)
        scale = count.to(tl.float32) / tl.maximum(tl.sum(total, 0), 1e-30)
        left_out = skipped(heavy + bh * HEAVY, HEAVY, PADDED)
        for start in range(0, count, BLOCK):
            at = source_token(FIRST + start + i, left_out, HEAVY)
            relative = tl.load(own + at, mask=start + i < count, other=0.0) * scale
            line = bh * room + start + i
            if KEYS:
                tl.store(key_weight + line, 1 - key_share + key_share * relative, mask=start + i < count)
            if VALUES:
                tl.store(value_weight + line, 1 - value_share + value_share * relative, mask=start + i < count)


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


@triton.jit(do_not_specialize=["room"])
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
