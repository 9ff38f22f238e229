// Packs one half (keys or values) of tiles of 128 bfloat16 tokens, in one pass, for maps to principal axes, gaussian levels of at most 4 bits and
// fp8 metadata; the formulas are those of quant/levels.py. A CTA loads its map once and takes tiles in turn, two in flight. A warp owns 16 axes
// of all tokens as the fragments of its product: thread (i8 = lane / 4, l4 = lane % 4) holds the axes i8 and i8 + 8 of the tokens 8 j + 2 l4 and
// 8 j + 2 l4 + 1. So an axis's statistics are sums of one thread and its three neighbours, and a word of a plane lies in one thread.
//
// Constants in front: DIM, WEIGHTED, KEEP; of the half's bytes: NBYTES, TWO, ONE, STEPS, CENTRES, FACTORS; TWO_WIDTH, ONE_WIDTH (words of a
// plane's row side by side), ONE_COLUMNS; TILE_BYTES. table: int [9, DIM], see triton_pack._axis_table.

constexpr int TOKENS = 128, CHUNKS = DIM / 8, WARPS = DIM / 16, THREADS = 32 * WARPS, N_TILES = TOKENS / 8;
constexpr unsigned ALL = 0xffffffffu;
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest whole number, ties to even
constexpr float FP8_MAX = 448.0f, FP16_MAX = 65504.0f, SMALLEST_FACTOR = 5.9604644775390625e-8f;
enum Table { TOP, LEVEL, STEP, CENTRE, SIGMA, AXIS, LOW_COLUMN, HIGH_COLUMN, ONE_BIT, ENTRIES };

struct Params {
    const unsigned short *x, *map;
    const float *weight, *mean;
    const int *skip, *jobs, *table;
    unsigned char* tiles;
    unsigned short* kept;
    float* error;
    int* status;
    long long x_b, x_h, x_t, map_b, map_h, weight_b, weight_h, tiles_b, tiles_h;
    int batch, heads, skips, room, workers;
};

struct Shared {
    unsigned short map[DIM * DIM], x[2][TOKENS * DIM];
    float weight[2][TOKENS];
    alignas(16) unsigned char bytes[NBYTES];
    int place[2][TOKENS], table[ENTRIES][DIM];
    float offset[DIM], most[2][WARPS];
};

// -- instructions ------------------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from));
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)));
}

__device__ __forceinline__ void load_transposed(unsigned (&r)[4], const void* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address(p)));
}

__device__ __forceinline__ void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float between(float x, float slope, float shift) {  // x * slope + shift, between 0 and 1
    float y;
    asm("fma.rn.sat.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(x), "f"(slope), "f"(shift));
    return y;
}

__device__ __forceinline__ unsigned short to_half(float x) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

__device__ __forceinline__ float from_half(unsigned short h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

__device__ __forceinline__ unsigned two_bfloat16(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// -- parts -------------------------------------------------------------------------------------------------------------------------------

// Where 16 bytes of a row of DIM bfloat16 numbers lie, such that eight rows' equal chunks lie in different banks.
__device__ __forceinline__ int chunk_at(int row, int chunk) { return row * DIM + 8 * (chunk ^ row & 7); }

__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}

// A number of at most 448 rounded to e4m3: its byte and its value. In arithmetic, for GPUs without the type.
__device__ __forceinline__ int to_e4m3(float x, float& value) {
    const float a = fabsf(x);
    const int bits = __float_as_int(a), rounded = (bits + 0x7ffff + (bits >> 20 & 1)) >> 20;
    const float small = (a * 512 + ROUND) - ROUND;  // below 2^-6: multiples of 2^-9
    const bool normal = a >= 0.015625f;
    value = copysignf(normal ? __int_as_float(rounded << 20) : small * 0.001953125f, x);
    return (normal ? rounded - 960 : (int)small) | (x < 0 ? 128 : 0);
}

// Eight fields of 4 bits, of which the low two are used, to 16 bits.
__device__ __forceinline__ unsigned move_together(unsigned x) {
    x = (x | x >> 2) & 0x0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff;
    return x | x >> 8;
}

// What a thread knows of its two axes (q = 0, 1): `z` are deviations from `base`; `offset` is the head's mean on these axes.
struct Axes {
    float z[N_TILES][4], mean[2], base[2], offset[2], top[2], sigma[2];
    bool centred[2];
};

#define EACH_AXIS _Pragma("unroll") for (int q = 0; q < 2; ++q)
#define EACH_PAIR _Pragma("unroll") for (int j = 0; j < N_TILES; ++j)
#define EACH_TOKEN _Pragma("unroll") for (int e = 0; e < 2; ++e)

__device__ __forceinline__ float2 weights_of(const float* weight, int j, int l4) {
    return WEIGHTED ? *(const float2*)(weight + 8 * j + 2 * l4) : make_float2(1, 1);
}

// The nearest code of z / step + top / 2 + beyond / step in 0..top, plus ROUND.
struct Coder {
    float slope, shift, top;
    __device__ __forceinline__ Coder(float step, float beyond, float top) : top(top) {
        slope = 1 / ((step > 0 ? step : 1.0f) * fmaxf(top, 1.0f));
        shift = beyond * slope + 0.5f;
    }
    __device__ __forceinline__ float operator()(float z) const { return fmaf(between(z, slope, shift), top, ROUND); }
};

// Steps and centres before they are rounded (levels.fit), and z; coded: whether an axis of the warp has codes.
__device__ __forceinline__ void fit(Axes& a, const float* weight, float share, bool coded, int l4, float (&step)[2], float (&centre)[2]) {
    float sum[2] = {}, square[2] = {};
    EACH_PAIR {
        const float2 w = weights_of(weight, j, l4);
        EACH_AXIS sum[q] += a.z[j][2 * q] * w.x + a.z[j][2 * q + 1] * w.y;
    }
    EACH_AXIS {
        a.mean[q] = quad_sum(sum[q]) * share;
        a.base[q] = a.centred[q] ? a.mean[q] : a.offset[q];
        step[q] = 0;
        centre[q] = a.centred[q] ? a.mean[q] - a.offset[q] : 0;
    }
    EACH_PAIR {
        const float2 w = weights_of(weight, j, l4);
        EACH_AXIS EACH_TOKEN {
            float& z = a.z[j][2 * q + e];
            z -= a.base[q];
            square[q] += z * z * (e ? w.y : w.x);
        }
    }
    if (!coded) return;
    EACH_AXIS {
        const float first = sqrtf(quad_sum(square[q]) * share) * a.sigma[q];
        const Coder code(first, 0, a.top[q]);
        float codes = 0, squares = 0, products = 0;
        EACH_PAIR {
            const float2 w = weights_of(weight, j, l4);
            EACH_TOKEN {
                const float z = a.z[j][2 * q + e], c = code(z) - ROUND, weighted = c * (e ? w.y : w.x);
                codes += weighted, squares += weighted * c, products += weighted * z;
            }
        }
        const float mean_code = quad_sum(codes) * share, mean_z = a.mean[q] - a.base[q], middle = mean_code - 0.5f * a.top[q];
        float spread = quad_sum(squares) * share - mean_code * mean_code, product = quad_sum(products) * share - mean_code * mean_z;
        if (!a.centred[q]) spread += middle * middle, product += middle * mean_z;  // a centre that is not free is zero
        const float slope = product / fmaxf(spread, 1e-9f);
        const bool good = spread > 1e-6f && slope > 0;
        if (a.top[q] > 0) {
            step[q] = good ? slope : first;
            if (a.centred[q] && good) centre[q] = mean_z - slope * middle + (a.base[q] - a.offset[q]);
        }
    }
}

// Round steps and centres to what is stored, and store them; returns the largest magnitude, infinite where one cannot be stored.
__device__ __forceinline__ float round_metadata(Shared& s, int warp, int lane, float (&step)[2], float (&centre)[2]) {
    const int l4 = lane % 4, q = l4 % 2, row = 16 * warp + lane / 4 + 8 * q;
    const bool centres = l4 / 2;  // one number for each of the four lanes: steps of both axes, centres of both
    const int place = s.table[centres ? CENTRE : STEP][row];
    const float x = centres ? (q ? centre[1] : centre[0]) : (q ? step[1] : step[0]);
    float size = place >= 0 ? fabsf(x) : 0;
    const float worst = size <= FP16_MAX * FP8_MAX ? size : __int_as_float(0x7f800000);
    size = fmaxf(size, __shfl_xor_sync(ALL, size, 1));
    for (int d = 4; d < 32; d *= 2) size = fmaxf(size, __shfl_xor_sync(ALL, size, d));
    if (lane == 0 || lane == 2) s.most[centres][warp] = size;
    __syncthreads();  // from here on the tile's tokens are no longer needed
    float most = 0;
    for (int w = 0; w < WARPS; ++w) most = fmaxf(most, s.most[centres][w]);
    const unsigned short factor = to_half(fminf(fmaxf(__fdiv_rn(most, FP8_MAX), SMALLEST_FACTOR), FP16_MAX));
    if (warp == 0 && (lane == 0 || lane == 2)) *(unsigned short*)(s.bytes + FACTORS + lane) = factor;
    float value;
    const float scale = from_half(factor);
    const int byte = to_e4m3(fminf(fmaxf(__fdiv_rn(x, scale), -FP8_MAX), FP8_MAX), value);
    if (place >= 0) s.bytes[(centres ? CENTRES : STEPS) + place] = byte;
    value = place >= 0 ? value * scale : 0;
    const int first = lane & ~3;
    step[0] = __shfl_sync(ALL, value, first), step[1] = __shfl_sync(ALL, value, first + 1);
    centre[0] = __shfl_sync(ALL, value, first + 2), centre[1] = __shfl_sync(ALL, value, first + 3);
    return worst;
}

// The words of both planes. fields: eight codes of 4 bits for each axis, half of the 16 rows (8 i + ..) and token of a pair.
__device__ __forceinline__ void store_planes(Shared& s, int warp, int lane, const unsigned (&fields)[2][2][2]) {
    const int i8 = lane / 4, l4 = lane % 4, row = 16 * warp + i8;
    auto index = [](int column, int i, int width) { return column / width * 16 * width + i * width + column % width; };
    unsigned short *two = (unsigned short*)(s.bytes + TWO), *one = (unsigned short*)(s.bytes + ONE);
    EACH_AXIS {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
            const int column = s.table[LOW_COLUMN + pair][row + 8 * q];
            if (column < 0) continue;
#pragma unroll
            for (int half = 0; half < 2; ++half)
                EACH_TOKEN two[index(column, 8 * half + 2 * l4 + e, TWO_WIDTH)] = move_together(fields[q][half][e] >> 2 * pair & 0x33333333);
        }
    }
    const int column = 8 * warp + i8, bits[2] = {s.table[ONE_BIT][row], s.table[ONE_BIT][row + 8]};
    if (column >= ONE_COLUMNS) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        EACH_TOKEN {
            const unsigned low = fields[0][half][e] >> bits[0] & 0x11111111, high = fields[1][half][e] >> bits[1] & 0x11111111;
            one[index(column, 8 * half + 2 * l4 + e, ONE_WIDTH)] = move_together(low | high << 1);
        }
}

// jobs: int [3, batch]: first token, tiles, first tile's index. kept: bfloat16 [batch, heads, room, DIM, TOKENS], the restored axes; error:
// float [batch, heads, room, DIM], their squared error.
extern "C" __global__ void __launch_bounds__(THREADS, 2) pack_tiles(const Params p) {
    extern __shared__ __align__(16) unsigned char raw[];
    Shared& s = *(Shared*)raw;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i8 = lane / 4, l4 = lane % 4;
    const int workers = p.workers, worker = blockIdx.x % workers;
    const long long bh = blockIdx.x / workers, b = bh / p.heads, h = bh % p.heads;
    const int first = p.jobs[b], count = p.jobs[p.batch + b], place = p.jobs[2 * p.batch + b];
    if (worker >= count) return;
    const unsigned short* x = p.x + b * p.x_b + h * p.x_h;
    const float* weight = p.weight + b * p.weight_b + h * p.weight_h;
    auto find_places = [&](int n, int slot) {  // of the tile's tokens, when some places are left out
        if (threadIdx.x >= TOKENS) return;
        const int i = first + n * TOKENS + threadIdx.x;
        int at = i;
        for (int j = 0; j < p.skips; ++j) at += i >= p.skip[bh * p.skips + j] - j;
        s.place[slot][threadIdx.x] = at;
    };
    auto fetch = [&](int n, int slot) {
        const int own = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS, x_t = p.x_t;
#pragma unroll
        for (int t = 0; t < TOKENS; t += THREADS / CHUNKS)  // a multiple of 8, so that the place in a row stays
            copy_16(s.x[slot] + chunk_at(own, chunk) + t * DIM, x + (long long)s.place[slot][own + t] * x_t + 8 * chunk);
        if (WEIGHTED && threadIdx.x < TOKENS / 4) copy_16(s.weight[slot] + 4 * threadIdx.x, weight + (long long)n * TOKENS + 4 * threadIdx.x);
    };
    find_places(worker, 0);
    for (int i = threadIdx.x; i < ENTRIES * DIM; i += THREADS) s.table[i / DIM][i % DIM] = p.table[i];
    for (int i = threadIdx.x; i < NBYTES / 4; i += THREADS) ((unsigned*)s.bytes)[i] = 0;  // what lies between the parts of a half stays zero
    __syncthreads();
    fetch(worker, 0);
    for (int i = threadIdx.x; i < DIM * CHUNKS; i += THREADS) {  // eight neighbouring rows are eight neighbouring axes
        const int channel = i / CHUNKS, chunk = i % CHUNKS;
        copy_16(s.map + chunk_at(channel, chunk), p.map + b * p.map_b + h * p.map_h + channel * DIM + s.table[AXIS][8 * chunk]);
    }
    if (worker + workers < count) find_places(worker + workers, 1);
    copies_done();
    __syncthreads();
    for (int r = threadIdx.x; r < DIM; r += THREADS) {
        float sum = 0;
        for (int c = 0; c < DIM; ++c) sum += __int_as_float(s.map[chunk_at(c, r / 8) + r % 8] << 16) * p.mean[bh * DIM + c];
        s.offset[r] = sum;
    }
    float worst = 0;
    for (int n = worker, slot = 0; n < count; n += workers, slot ^= 1) {
        copies_done();
        __syncthreads();  // the tile is there, and all are done with the one before
        if (n + workers < count) fetch(n + workers, slot ^ 1);
        if (n + 2 * workers < count) find_places(n + 2 * workers, slot);
        Axes a;
        EACH_PAIR EACH_AXIS EACH_TOKEN a.z[j][2 * q + e] = 0;
        const int mate = lane / 8, line = lane % 8;
#pragma unroll
        for (int k = 0; k < DIM; k += 16) {
            unsigned left[4];
            load_transposed(left, s.map + chunk_at(k + mate / 2 * 8 + line, 2 * warp + mate % 2));
#pragma unroll
            for (int j = 0; j < N_TILES; j += 2) {
                unsigned right[4];
                load_matrices(right, s.x[slot] + chunk_at(8 * (j + mate / 2) + line, k / 8 + mate % 2));
                multiply(a.z[j], left, right[0], right[1]);
                multiply(a.z[j + 1], left, right[2], right[3]);
            }
        }
        bool coded = false;
        EACH_AXIS {
            const int row = 16 * warp + i8 + 8 * q;
            a.top[q] = s.table[TOP][row], a.sigma[q] = __int_as_float(s.table[SIGMA][row]);
            a.centred[q] = s.table[CENTRE][row] >= 0, a.offset[q] = s.offset[row];
            coded |= a.top[q] > 0;
        }
        coded = __any_sync(ALL, coded);
        float share = 1.0f / TOKENS, step[2], centre[2];
        if (WEIGHTED) {
            const float4 w = *(const float4*)(s.weight[slot] + 4 * lane);
            float total = w.x + w.y + w.z + w.w;
            for (int d = 16; d; d /= 2) total += __shfl_xor_sync(ALL, total, d);
            share = 1 / total;
        }
        fit(a, s.weight[slot], share, coded, l4, step, centre);
        worst = fmaxf(worst, round_metadata(s, warp, lane, step, centre));
        unsigned fields[2][2][2] = {};
        EACH_AXIS {
            const float beyond = a.base[q] - a.offset[q] - centre[q];  // deviations are from the base, codes from the stored centre
            const Coder code(step[q], beyond, a.top[q]);
            float lost = 0;
            EACH_PAIR {
                float restored[2];
                EACH_TOKEN {
                    const float z = a.z[j][2 * q + e], c = code(z);
                    fields[q][j % 2][e] += (unsigned)__float_as_int(c) << 4 * (j / 2);
                    if (KEEP) {
                        restored[e] = (c - ROUND) * step[q] - 0.5f * a.top[q] * step[q];
                        const float away = z + beyond - restored[e];
                        lost += away * away;
                    }
                }
                if (KEEP) {  // in the place of the warp's share of the tokens
                    const unsigned both = two_bfloat16(restored[0] + centre[q], restored[1] + centre[q]);
                    *(unsigned*)(s.x[slot] + (16 * warp + i8 + 8 * q) * TOKENS + 8 * (j ^ i8) + 2 * l4) = both;
                }
            }
            if (KEEP) {
                lost = quad_sum(lost);
                if (l4 == 0) p.error[(bh * p.room + n) * DIM + s.table[AXIS][16 * warp + i8 + 8 * q]] = lost;
            }
#pragma unroll
            for (int half = 0; half < 2; ++half)
                EACH_TOKEN fields[q][half][e] -= 0x4b400000u * 0x11111111u;  // the bits of ROUND in eight fields
        }
        store_planes(s, warp, lane, fields);
        if (KEEP) {
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const int own = 2 * i + lane / 16, chunk = lane % 16, row = 16 * warp + own;
                const uint4 part = *(const uint4*)(s.x[slot] + row * TOKENS + 8 * (chunk ^ own % 8));
                *(uint4*)(p.kept + ((bh * p.room + n) * DIM + s.table[AXIS][row]) * TOKENS + 8 * chunk) = part;
            }
        }
        __syncthreads();
        uint4* out = (uint4*)(p.tiles + b * p.tiles_b + h * p.tiles_h + (long long)(place + n) * TILE_BYTES);
        for (int i = threadIdx.x; i < NBYTES / 16; i += THREADS) out[i] = ((const uint4*)s.bytes)[i];
    }
    for (int d = 16; d; d /= 2) worst = fmaxf(worst, __shfl_xor_sync(ALL, worst, d));
    if (lane == 0) atomicMax(p.status, __float_as_int(worst));
}
