// The small dense algebra behind a head's basis, a CTA for each matrix, DIM <= 128: `principal_axes` (eigenvectors) and `map_back` (ridge
// regression). Constants in front: DIM, a multiple of 8; BLOCK, columns of a block, 4 or 8.

constexpr int ROWS = (DIM + 31) / 32, COLUMNS = 2 * BLOCK, WARPS = (DIM + COLUMNS - 1) / COLUMNS;
constexpr int SHARE = 32 / BLOCK;    // lanes that find the angle of one pair
constexpr unsigned ALL = 0xffffffffu;
constexpr float SMALLEST = 1e-10f;   // pivot, of the mean of the diagonal
constexpr float ORTHOGONAL = 1e-3f;  // cosine of two columns that are left alone

typedef float Columns[COLUMNS][ROWS];

#define EACH_ROW _Pragma("unroll") for (int r = 0, row = lane; r < ROWS; ++r, row += 32)
#define EACH_COLUMN _Pragma("unroll") for (int c = 0; c < COLUMNS; ++c)

// Approximate, with two units in the last place; below 1e-38 is zero.
__device__ __forceinline__ float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float inverse_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (int d = 16; d; d /= 2) x += __shfl_xor_sync(ALL, x, d);
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------- eigenvectors
// A Cholesky factor with pivoting, A = L L^T, whose columns are then made orthogonal by one-sided Jacobi rotations (Hestenes, 1958; on the
// factor: Veselic and Hari, 1989): L J = U sqrt(lambda), so that no eigenvectors are accumulated and small eigenvalues keep their accuracy.
// A warp holds two blocks of columns in registers; lane l holds the rows l, l + 32, ... A round rotates all pairs between the two; then the
// blocks move on as in a round-robin tournament (Brent and Luk, 1985), 2 WARPS - 1 rounds for a sweep.

// Pair i of BLOCK pairs of columns: with H = BLOCK between the two blocks, with smaller H within them; all R < H together meet all pairs.
template <int H> __device__ constexpr int left_of(int i) { return i / H * 2 * H + i % H; }
template <int H, int R> __device__ constexpr int right_of(int i) { return i / H * 2 * H + H + (i % H + R) % H; }

// Register c of a thread's columns, without a branch: the half that holds it is chosen by each bit of c.
template <int N> __device__ __forceinline__ float column_of(const Columns& a, int c, int r, int first = 0) {
    if constexpr (N == 1)
        return a[first][r];
    else {
        const float low = column_of<N / 2>(a, c, r, first), high = column_of<N / 2>(a, c, r, first + N / 2);
        return c & N / 2 ? high : low;
    }
}

// The factor's columns in the order of the pivots, in shared memory, float [DIM, DIM].
__device__ __forceinline__ void factorize(const float* gram, const float* scale, float* factor, int warp, int lane) {
    Columns a;
    float left[ROWS], lowest[ROWS], own_scale[ROWS], trace = 0;  // left: the diagonal of what is left to factorize, in every warp; -1: done
    EACH_ROW {
        own_scale[r] = row < DIM ? scale[row] : 0.0f;
        left[r] = row < DIM ? gram[row * (DIM + 1)] * own_scale[r] * own_scale[r] : -1.0f;
        trace += fmaxf(left[r], 0.0f);
    }
    const float unit = DIM / fmaxf(warp_sum(trace), 1e-30f);
    EACH_ROW {
        left[r] = row < DIM ? left[r] * unit : -1.0f;
        lowest[r] = row < DIM ? 0.0f : -1.0f;
        EACH_COLUMN {
            const int k = COLUMNS * warp + c;
            a[c][r] = row < DIM && k < DIM ? 0.5f * unit * (gram[k * DIM + row] + gram[row * DIM + k]) * own_scale[r] * scale[k] : 0.0f;
        }
    }
    int p;
    float pivot, inverse, most[ROWS];  // most: a larger entry would be rounding, what is left would not be semidefinite
    auto find_pivot = [&] {
        int best = 0;  // the largest one's bits, with the row in the lowest seven; those of -1 are negative
        EACH_ROW best = max(best, (__float_as_int(left[r]) & ~127) | row);
        p = min(__reduce_max_sync(ALL, best) & 127, DIM - 1);
        pivot = left[0];
#pragma unroll
        for (int r = 1; r < ROWS; ++r) pivot = p >= 32 * r ? left[r] : pivot;
        pivot = fmaxf(__shfl_sync(ALL, pivot, p % 32), SMALLEST);
        inverse = inverse_root(pivot);
        EACH_ROW most[r] = left[r] > 0 ? left[r] * inverse_root(left[r]) : 0.0f;
    };
    find_pivot();
    for (int step = 0; step < DIM; ++step) {
        float* l = factor + step * DIM;
        if (p / COLUMNS == warp) {
            EACH_ROW {
                const float entry = fminf(fmaxf(column_of<COLUMNS>(a, p % COLUMNS, r) * inverse, -most[r]), most[r]);
                if (row < DIM) l[row] = row == p ? pivot * inverse : entry;
            }
        }
        __syncthreads();
        float own[ROWS];
        EACH_ROW {
            own[r] = row < DIM ? l[row] : 0.0f;
            lowest[r] = row == p ? -1.0f : lowest[r];
            left[r] = row == p ? -1.0f : fmaxf(left[r] - own[r] * own[r], lowest[r]);
        }
        find_pivot();
#pragma unroll
        for (int c = 0; c < COLUMNS; c += 4) {
            const float4 other = *(const float4*)(l + COLUMNS * warp + c);  // beyond DIM: columns that nobody reads
            EACH_ROW {
                a[c][r] -= own[r] * other.x;
                a[c + 1][r] -= own[r] * other.y;
                a[c + 2][r] -= own[r] * other.z;
                a[c + 3][r] -= own[r] * other.w;
            }
        }
    }
}

// Rotate BLOCK pairs of columns; SHARE neighbouring lanes find the angle of a pair. Columns are scaled: column c is w[c] times the `scale` of
// the lanes c, c + COLUMNS, ..., which also hold its squared norm, so that a rotation takes two operations for two elements (fast Givens).
// That roots and quotients are approximate does no harm: later rotations put an angle right, and cosine and tangent agree.
template <int H, int R> __device__ __forceinline__ bool rotate(Columns& w, float& norm, float& scale, int lane) {
    float dot[BLOCK];
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        dot[i] = 0;
        EACH_ROW dot[i] += w[left_of<H>(i)][r] * w[right_of<H, R>(i)][r];
    }
#pragma unroll
    for (int n = BLOCK / 2; n; n /= 2) {  // sums over the lanes: each half of them goes on with half of the pairs
        const bool upper = lane & SHARE * n;
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const float other = upper ? dot[i] : dot[i + n];
            dot[i] = (upper ? dot[i + n] : dot[i]) + __shfl_xor_sync(ALL, other, SHARE * n);
        }
    }
    for (int d = SHARE / 2; d; d /= 2) dot[0] += __shfl_xor_sync(ALL, dot[0], d);
    const int pair = lane / SHARE, x = left_of<H>(pair), y = right_of<H, R>(pair);
    const float norm_x = __shfl_sync(ALL, norm, x), norm_y = __shfl_sync(ALL, norm, y);
    const float scale_x = __shfl_sync(ALL, scale, x), scale_y = __shfl_sync(ALL, scale, y);
    const float g = dot[0] * scale_x * scale_y, gap = norm_y - norm_x;
    const bool turn = g * g > ORTHOGONAL * ORTHOGONAL * norm_x * norm_y;
    const float reach = gap * gap + 4 * g * g + 1e-37f;
    const float t = (turn ? copysignf(2 * g, g * gap) : 0.0f) * inverse_of(fabsf(gap) + reach * inverse_root(reach));  // of the smaller angle
    const float cosine = inverse_root(1 + t * t), moved = t * g;  // (Golub and Van Loan, section 8.5.2)
    const float to_x = t * (scale_y * inverse_of(scale_x)), to_y = t * (scale_x * inverse_of(scale_y));
#pragma unroll
    for (int i = 0; i < BLOCK; ++i) {
        const float px = __shfl_sync(ALL, to_x, SHARE * i), py = __shfl_sync(ALL, to_y, SHARE * i);
        EACH_ROW {
            float &u = w[left_of<H>(i)][r], &v = w[right_of<H, R>(i)][r];
            const float before = u;
            u -= px * v;
            v += py * before;
        }
    }
    const int column = lane % COLUMNS, k = column % (2 * H);
    const int from = SHARE * (column / (2 * H) * H + (k < H ? k : (k - R) % H));  // the pair that this lane's column belongs to
    scale *= __shfl_sync(ALL, cosine, from);
    const float change = __shfl_sync(ALL, moved, from);
    norm += k < H ? -change : change;
    return turn;
}

template <int H, int R = 0> __device__ __forceinline__ bool rotate_all(Columns& w, float& norm, float& scale, int lane) {
    bool turned = rotate<H, R>(w, norm, scale, lane);
    if constexpr (R + 1 < H) turned |= rotate_all<H, R + 1>(w, norm, scale, lane);
    return turned;
}

template <int H = BLOCK / 2> __device__ __forceinline__ bool rotate_within(Columns& w, float& norm, float& scale, int lane) {
    bool turned = rotate_all<H>(w, norm, scale, lane);
    if constexpr (H > 1) turned |= rotate_within<H / 2>(w, norm, scale, lane);
    return turned;
}

// Move every block of columns to its next place; blocks: float [2 WARPS, BLOCK, DIM], state: float [2 WARPS, BLOCK, 2] of shared memory.
__device__ __forceinline__ void move_on(Columns& w, float& norm, float& scale, float* blocks, float* state, int warp, int lane) {
    const int to[2] = {warp == 0 ? 0 : warp == WARPS - 1 ? 2 * WARPS - 1 : warp + 1, warp == 0 ? 1 : WARPS + warp - 1};
    EACH_COLUMN EACH_ROW if (row < DIM) blocks[(BLOCK * to[c / BLOCK] + c % BLOCK) * DIM + row] = w[c][r];
    if (lane < COLUMNS) {
        const int place = BLOCK * (lane < BLOCK ? to[0] : to[1]) + lane % BLOCK;
        state[2 * place] = norm, state[2 * place + 1] = scale;
    }
    __syncthreads();
    EACH_COLUMN EACH_ROW w[c][r] = row < DIM ? blocks[(BLOCK * (c / BLOCK * WARPS + warp) + c % BLOCK) * DIM + row] : 0.0f;
    const int place = BLOCK * (lane % COLUMNS / BLOCK * WARPS + warp) + lane % BLOCK;
    norm = state[2 * place], scale = state[2 * place + 1];
    __syncthreads();
}

__device__ __forceinline__ void apply_scales(Columns& w, float& norm, float& scale, int lane) {
    EACH_COLUMN {
        const float own = __shfl_sync(ALL, scale, c);
        float square = 0;
        EACH_ROW {
            w[c][r] *= own;
            square += w[c][r] * w[c][r];
        }
        square = warp_sum(square);
        norm = lane % COLUMNS == c ? square : norm;
    }
    scale = 1;
}

// axes: float [n, DIM, DIM], a row for each eigenvector of scale gram scale, by falling eigenvalue.
// Dynamic shared memory: COLUMNS WARPS (DIM + 2) floats.
extern "C" __global__ void __launch_bounds__(WARPS * 32) principal_axes(const float* gram, const float* scales, float* axes, int sweeps) {
    extern __shared__ float shared[];
    float* state = shared + COLUMNS * WARPS * DIM;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const long long n = blockIdx.x;
    factorize(gram + n * DIM * DIM, scales + n * DIM, shared, warp, lane);
    __syncthreads();
    Columns w;
    float norm = 0, scale = 1;
    EACH_COLUMN EACH_ROW w[c][r] = row < DIM && COLUMNS * warp + c < DIM ? shared[(COLUMNS * warp + c) * DIM + row] : 0.0f;
    __syncthreads();
    for (int sweep = 0; sweep < sweeps; ++sweep) {
        apply_scales(w, norm, scale, lane);
        bool turned = rotate_within(w, norm, scale, lane);
        for (int round = 0; round < 2 * WARPS - 1; ++round) {
            turned |= rotate_all<BLOCK>(w, norm, scale, lane);
            if (WARPS > 1) move_on(w, norm, scale, shared, state, warp, lane);
        }
        if (!__syncthreads_or(turned)) break;
    }
    apply_scales(w, norm, scale, lane);
    if (lane < COLUMNS) state[COLUMNS * warp + lane] = norm;
    __syncthreads();
    EACH_COLUMN {
        const float own = __shfl_sync(ALL, norm, c);
        int place = 0;  // how many eigenvalues come before this one
        for (int k = lane; k < COLUMNS * WARPS; k += 32) place += state[k] > own || (state[k] == own && k < COLUMNS * warp + c);
        place = __reduce_add_sync(ALL, place);
        const float length = inverse_root(own);
        EACH_ROW if (row < DIM && place < DIM) axes[(n * DIM + place) * DIM + row] = w[c][r] * length;
    }
}

// ---------------------------------------------------------------------------------------------------------------------- ridge regression

__device__ __forceinline__ float from_bfloat16(unsigned short x) { return __int_as_float(x << 16); }

__device__ __forceinline__ unsigned short to_bfloat16(float x) {
    const unsigned bits = __float_as_int(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// (G + R) X = C + R B by Gauss and Jordan, with R = diag(share G + 1e-6 mean of G's diagonal): X is the ridge regression towards B.
// gram [n, DIM, DIM], cross [n, DIM axes, DIM channels]: float; axes in [n, DIM channels, DIM axes]: B^T, and out: X^T, bfloat16.
// Symmetric and positive definite, so no pivots are looked for. A thread holds 8 x 8 numbers of (G + R | C + R B): eight neighbouring columns,
// and of the rows four in each half, so that a warp reads whole lines of shared memory. DIM / 4 x DIM / 8 threads.
extern "C" __global__ void __launch_bounds__(DIM * DIM / 32) map_back(const float* gram, const float* cross, const unsigned short* axes,
                                                                      unsigned short* out, float share) {
    __shared__ float4 pivots[2][DIM / 4], lines[2][DIM / 2];  // of the step: pivot's column (1 is taken off the pivot) and row
    const int rows = threadIdx.x % (DIM / 8), group = threadIdx.x / (DIM / 8), column = 8 * group % DIM;
    const bool left = group < DIM / 8;  // of the two matrices
    const long long n = blockIdx.x * (long long)(DIM * DIM);
    gram += n, cross += n, axes += n, out += n;
    auto row_of = [&](int r) { return r / 4 * (DIM / 2) + 4 * rows + r % 4; };
    float m[8][8], mean = 0;
    for (int i = 0; i < DIM; ++i) mean += gram[i * (DIM + 1)] / DIM;
#pragma unroll
    for (int r = 0; r < 8; ++r) {
        const int row = row_of(r);
        const float ridge = share * gram[row * (DIM + 1)] + 1e-6f * mean + 1e-30f;
#pragma unroll
        for (int c = 0; c < 8; ++c) {
            const int k = column + c;
            m[r][c] = left ? 0.5f * (gram[k * DIM + row] + gram[row * DIM + k]) + (row == k ? ridge : 0.0f)
                           : cross[row * DIM + k] + ridge * from_bfloat16(axes[k * DIM + row]);
        }
    }
    for (int first = 0; first < DIM; first += 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {  // so that the column's registers are known when this is compiled
            const int j = first + i, upper = j >= DIM / 2;
            float4 *pivot = pivots[i % 2], *line = lines[i % 2];
            if (left && column == first) {
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int r = 0; r < 4; ++r) {
                        const int at = half * (DIM / 2) + 4 * rows + r;
                        ((float*)pivot)[at] = m[4 * half + r][i] - (at == j ? 1.0f : 0.0f);
                    }
            }
            if (row_of(4 * upper + i % 4) == j) {
#pragma unroll
                for (int c = 0; c < 8; ++c) ((float*)line)[8 * group + c] = upper ? m[4 + i % 4][c] : m[i % 4][c];
            }
            __syncthreads();
            if (left && column + 8 <= first) continue;  // done: these columns are those of the identity
            const float inverse = inverse_of(((const float*)line)[j]);
            const float4 f0 = pivot[rows], f1 = pivot[DIM / 8 + rows], l0 = line[2 * group], l1 = line[2 * group + 1];
            const float factors[8] = {f0.x, f0.y, f0.z, f0.w, f1.x, f1.y, f1.z, f1.w}, pivot_row[8] = {l0.x, l0.y, l0.z, l0.w, l1.x, l1.y, l1.z, l1.w};
#pragma unroll
            for (int r = 0; r < 8; ++r) {
                const float factor = factors[r] * inverse;
#pragma unroll
                for (int c = 0; c < 8; ++c) m[r][c] -= factor * pivot_row[c];
            }
        }
    }
    if (left) return;
#pragma unroll
    for (int r = 0; r < 8; ++r)
#pragma unroll
        for (int c = 0; c < 8; ++c) out[(column + c) * DIM + row_of(r)] = to_bfloat16(m[r][c]);
}
