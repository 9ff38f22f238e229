// Decode attention on packed bits, for Hopper GPUs. docs/kernels.md explains the ideas; quant/planes.py and quant/tile.py are the layout's only definition.
//
// One launch serves all KV heads of a layer. Work is counted in *units*: one packed tile, or 16 whole-precision tokens (about as many bytes). The units of
// all (set, sequence, KV head, block of 8 query rows) form one line, raw ones before packed ones in every head; CTA c takes S of them: either
// every head is split into equal parts of at most S units, one for each CTA, or (when that would waste much) CTA c takes the units [c S, (c + 1) S) wherever
// heads begin and end; there every head begins with `lead` empty positions that stand for its fixed cost. Every CTA finds its part from the lengths: nothing is
// planned on the host. The part of one head that falls into one CTA is a *segment*: its warps attend independently, their results are merged in shared
// memory and written as two partial results (raw tokens by channel, packed ones by axis) at slot = CTA + head. The CTA that completes a head merges that
// head's partials in a fixed order (reruns are bit-identical) and rotates back.
//
// MMA fragments below are those of mma.m16n8k16: lane = 4 * (row of A, column of B) + (pair of k): `i8` = lane / 4, `l4` = lane % 4.
// The file is one unit, longer than others of the project, because its device functions share the constants generated from one layout.
//
// Generated in front of this file (cuda_decode.py): HEAD_DIM, MODEL_FP16, GROUP, N_QUERY, WARPS, STAGES, HAS_TILES, FIELDS, GROUPS, META_FP8,
// CENTRE_RESIDUAL, TILE_BYTES, SHARED_BYTES, PARAMS_BYTES; and, for the namespaces keys and values: byte offsets TWO, ONE, STEPS, CENTRES, FACTORS; N_STEPS, N_CENTRES; word columns C2, C1 and slots per
// word E2, E1; for each run of 8 slots run_axis (its axes' run of 8), run_shift (log2 of its weight), run_step (run of its steps); keys::centre_axis
// (axis run of a run of centres), values::centre_run (centre run of an axis run, or -1); which parts of a basis there are (MATRIX, RESIDUAL, ORDER, MEAN, NOISE).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int BLOCKS = (GROUP * N_QUERY + 7) / 8;             // blocks of 8 query rows of a KV head
constexpr int D = HEAD_DIM, THREADS = WARPS * 32, ROWS = 8;   // ROWS: query rows of a head that are served together (N of the MMA)
constexpr int MAX_SETS = 4, MAX_HEADS = 128, MAX_ENTRIES = 256;
constexpr int SEPARATE_PARTS = 8;                            // parts of a head from which raw and packed units get CTAs of their own
constexpr int RAW_TOKENS = 16;                                // whole-precision tokens of a unit
constexpr int PAD = 4, ROW = D + PAD;                         // floats of a row in shared memory
constexpr float NEVER = -1e30f, LN2 = 0.6931471805599453f;
constexpr u32 ALL = 0xffffffffu;

// ---- what the host passes -------------------------------------------------------------------------------------------------------------------
struct Rotation {            // x[order] = matrix axes + mean; what the layout does not have is null (and its constant of the namespace false)
  const u16* matrix;         // bf16 [.., channel, axis]
  const u16* residual;       // bf16, what rounding the matrix to bf16 lost
  i64 stride_b, stride_h;    // of the matrices, in elements
  const u8* order;           // [B, h, D]
  const float* mean;         // [B, h, D]
  const float* noise;        // [B, h, D]: mean squared error of each axis of the keys
};
struct SetParams {
  const u8* tiles; i64 tiles_b, tiles_h;
  const u16 *sink_k, *sink_v, *tail_k, *tail_v;
  i64 sink_b, sink_h, tail_b, tail_h;
  const int* lengths;        // [3, B]: sink tokens, tiles, tail tokens
  Rotation key, value;
  int heads, window;         // window <= 0: all
  u8 kv_heads[MAX_HEADS];
};
struct Params {
  SetParams sets[MAX_SETS];
  const u16* q; i64 q_b, q_h, q_t;
  u16* out; float* lse;      // [B, Hq, Q, D], [B, Hq, Q]
  const i64* hidden;         // [B, Q] or null
  float *partial, *partial_lse;
  int* arrived;
  int n_sets, batch, q_heads, min_units, lead;   // lead: positions on the line that stand for a head's fixed cost
  float scale_log2, noise_log2;   // scale of the scores times log2(e); what packed scores are raised by for each (query axis)^2 * noise
};

// ---- instructions ---------------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void mma_fp16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_model(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (MODEL_FP16) mma_fp16(c, a0, a1, a2, a3, b0, b1); else mma_bf16(c, a0, a1, a2, a3, b0, b1);
}
__device__ __forceinline__ float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_approx(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 mul_fp16x2(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 pack_fp16(float lo, float hi) { u32 d; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) { u32 d; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
__device__ __forceinline__ float fp16_to_float(u16 h) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h)); return f; }
__device__ __forceinline__ float bf16_low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float bf16_high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ float model_low(u32 v) { return MODEL_FP16 ? fp16_to_float((u16)v) : bf16_low(v); }
__device__ __forceinline__ float model_high(u32 v) { return MODEL_FP16 ? fp16_to_float((u16)(v >> 16)) : bf16_high(v); }
__device__ __forceinline__ u16 to_model(float x) { return (u16)(MODEL_FP16 ? pack_fp16(x, 0.f) : pack_bf16(x, 0.f)); }
__device__ __forceinline__ u32 e4m3_to_fp16x2(u32 two) { u32 d; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((u16)two)); return d; }
__device__ __forceinline__ u32 transpose8x8(u32 a) { u32 d; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a)); return d; }
__device__ __forceinline__ uint4 lds128(u32 a) { uint4 v; asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a)); return v; }
__device__ __forceinline__ uint2 lds64(u32 a) { uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v; }
__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ u16 lds16(u32 a) { u16 v; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a)); return v; }
__device__ __forceinline__ u32 lds8(u32 a) { u32 v; asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ uint4 ldg128(const void* a) { uint4 v; asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a)); return v; }
__device__ __forceinline__ void bulk_copy(u32 dst, const void* src, u32 bytes, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 phase) {
  u32 done;
  do asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
  while (!done);
}
// Words of a 4 x 32-bit vector by a constant index
__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- shared memory --------------------------------------------------------------------------------------------------------------------------
struct Plan { int start[MAX_ENTRIES + 1], tiles[MAX_ENTRIES], raw[MAX_ENTRIES], head[MAX_ENTRIES]; u16 set[MAX_ENTRIES], sequence[MAX_ENTRIES], parts[MAX_ENTRIES];
  int first_cta[MAX_ENTRIES]; int share; bool split; };
// entry = (set, sequence): its first unit, the units of one of its heads, its first head; with `split`, the CTAs of a head and the entry's first CTA
struct Segment {
  int entry, set, b, h, block;        // block: of 8 query rows
  int head;                           // number of (entry, KV head, block) over the whole launch
  int begin, end, length;             // units of the head; positions on the line
  int raw, raw_end;                   // raw units of the head; those of the segment are begin .. raw_end - 1
  int tiles;                          // packed units of the head
};


struct Shared {
  float red[WARPS][ROWS][ROW];        // partial results of the warps; scratch of the rotations
  float query[ROWS][ROW];             // rotated queries
  float max[WARPS][ROWS], sum[WARPS][ROWS];
  float constant[ROWS], inverse[ROWS], row_scale[ROWS], mass[ROWS];
  u64 barrier[WARPS * STAGES];
  Plan plan;
  Segment pending;
  int pending_first, pending_last, last;
};

static_assert(sizeof(Shared) <= SHARED_BYTES && sizeof(Params) == PARAMS_BYTES, "cuda_decode.py counts the same bytes");

__device__ __forceinline__ int raw_units(int tokens) { return (tokens + RAW_TOKENS - 1) / RAW_TOKENS; }

// The segment that starts at unit `pos`, at most up to unit `end`; `entry` is where the search begins.
__device__ __forceinline__ Segment locate(const Plan& plan, int lead, int pos, int end, int entry) {
  Segment s;
  while (plan.start[entry + 1] <= pos) entry++;
  s.entry = entry;
  s.set = plan.set[entry];
  s.b = plan.sequence[entry];
  const int raw = plan.raw[entry], units = raw + plan.tiles[entry];
  const u32 span = lead + units, x = pos - plan.start[entry], hb = x / span;
  const int within = x - hb * span;
  s.h = hb / BLOCKS;
  s.block = hb - s.h * BLOCKS;
  s.head = hb + plan.head[entry];
  s.raw = raw;
  s.tiles = units - raw;
  s.length = min((int)span - within, end - pos);
  s.begin = max(within - lead, 0);
  s.end = within + s.length - lead;                           // at most 0: nothing but the head's fixed cost
  s.raw_end = min(s.end, raw);
  return s;
}

// Units of every entry and their running sum (one warp).
__device__ __forceinline__ void make_plan(const Params& p, Plan& plan, int lane) {
  const int entries = p.n_sets * p.batch;
  int total = 0, heads = 0;
  for (int e0 = 0; e0 < entries; e0 += 32) {
    const int e = e0 + lane;
    int units = 0, mine = 0;
    if (e < entries) {
      const int s = e / p.batch, b = e - s * p.batch;
      const int* len = p.sets[s].lengths + b;
      const int sink = p.sets[s].sink_k ? len[0] : 0, tiles = p.sets[s].tiles ? len[p.batch] : 0, tail = len[2 * p.batch];
      const int raw = max(raw_units(sink) + raw_units(tail), tiles ? 0 : 1);   // an empty head has one masked unit, so that its output is written
      mine = p.sets[s].heads * BLOCKS;
      units = (p.lead + tiles + raw) * mine;
      plan.set[e] = (u16)s;
      plan.sequence[e] = (u16)b;
      plan.tiles[e] = tiles;
      plan.raw[e] = raw;
    }
    int sum = units, before = mine;
    #pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
      const int n = __shfl_up_sync(ALL, sum, o), k = __shfl_up_sync(ALL, before, o);
      if (lane >= o) { sum += n; before += k; }
    }
    if (e < entries) { plan.start[e] = total + sum - units; plan.head[e] = heads + before - mine; }
    total += __shfl_sync(ALL, sum, 31);
    heads += __shfl_sync(ALL, before, 31);
  }
  // The smallest share with which every head can have CTAs of its own
  const int grid = gridDim.x, even = max((int)((u32)(total + grid - 1) / (u32)grid), p.min_units);
  int share = max(even - p.lead, 1), longest = 0;
  bool split = false;
  #pragma unroll 1
  for (int attempt = 0; attempt < 6 && heads <= grid && !split; attempt++) {
    u32 ctas = 0, most = 0;
    for (int e = lane; e < entries; e += 32) {
      const u32 units = plan.tiles[e] + plan.raw[e], parts = (units + share - 1) / (u32)share;
      ctas += p.sets[plan.set[e]].heads * BLOCKS * parts;
      most = max(most, (units + parts - 1) / parts);
    }
    ctas = __reduce_add_sync(ALL, ctas);
    longest = __reduce_max_sync(ALL, most);
    split = ctas <= grid;
    if (!split) share = max((u32)share + 1, (u32)share * ctas / (u32)grid);
  }
  split = split && longest <= even + even / 16;
  for (int e0 = 0, before = 0; split && e0 < entries; e0 += 32) {
    const int e = e0 + lane;
    int parts = 0, mine = 0;
    if (e < entries) {
      parts = (u32)(plan.tiles[e] + plan.raw[e] + share - 1) / (u32)share;
      mine = parts * p.sets[plan.set[e]].heads * BLOCKS;
    }
    int sum = mine;
    #pragma unroll
    for (int o = 1; o < 32; o <<= 1) { const int n = __shfl_up_sync(ALL, sum, o); if (lane >= o) sum += n; }
    if (e < entries) { plan.parts[e] = (u16)parts; plan.first_cta[e] = before + sum - mine; }
    before += __shfl_sync(ALL, sum, 31);
  }
  if (lane == 0) {
    plan.start[entries] = total;
    plan.share = even;
    plan.split = split;
  }
}

// Query row `row` of a segment -> element offset of its first channel, or -1.
__device__ __forceinline__ int query_row(const Params& p, const Segment& s, int row, int& head, int& token) {
  const int r = s.block * ROWS + row;
  token = r % N_QUERY;
  head = p.sets[s.set].kv_heads[s.h] * GROUP + r / N_QUERY;
  return r < GROUP * N_QUERY;
}

// ---- whole-precision tokens -----------------------------------------------------------------------------------------------------------------
// A warp attends to 16 tokens at a time. Keys are operand A as they lie (8 channels of a lane are two k-chunks); values are transposed by byte permutes.
__device__ __forceinline__ void attend_raw(const Params& p, const Segment& s, Shared& sm, int w, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  const SetParams& set = p.sets[s.set];
  constexpr int KV = D / 32, HALVES = D / 64;
  u32 q[KV][4];
  int back0 = 0, back1 = 0;
  {
    int head, token;
    const bool ok = query_row(p, s, i8, head, token);
    const u16* src = p.q + s.b * p.q_b + head * p.q_h + token * p.q_t;
    #pragma unroll
    for (int c = 0; c < KV; c++) {
      const uint4 v = ok ? ldg128(src + c * 32 + l4 * 8) : make_uint4(0, 0, 0, 0);
      q[c][0] = v.x; q[c][1] = v.y; q[c][2] = v.z; q[c][3] = v.w;
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
      query_row(p, s, l4 * 2 + i, head, token);
      const int back = p.hidden ? (int)p.hidden[s.b * N_QUERY + token] : N_QUERY - 1 - token;
      (i ? back1 : back0) = back;
    }
  }
  const int sink = set.sink_k ? set.lengths[s.b] : 0, tail = set.lengths[2 * p.batch + s.b], sink_blocks = raw_units(sink);
  float m0 = NEVER, m1 = NEVER, l0 = 0.f, l1 = 0.f, acc[D / 16][4];
  #pragma unroll
  for (int i = 0; i < D / 16; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
  for (int unit = s.begin + w; unit < s.raw_end; unit += WARPS) {
    const bool in_sink = unit < sink_blocks;
    const int t0 = (in_sink ? unit : unit - sink_blocks) * RAW_TOKENS, count = in_sink ? sink : tail;
    const u16* k = in_sink ? set.sink_k + s.b * set.sink_b + s.h * set.sink_h : set.tail_k + s.b * set.tail_b + s.h * set.tail_h;
    const u16* v = in_sink ? set.sink_v + s.b * set.sink_b + s.h * set.sink_h : set.tail_v + s.b * set.tail_b + s.h * set.tail_h;
    const int top = max(count - 1, 0);
    uint4 kl[KV], kh[KV], vv[HALVES][4];
    #pragma unroll
    for (int c = 0; c < KV; c++) {
      kl[c] = ldg128(k + (i64)min(t0 + i8, top) * D + c * 32 + l4 * 8);
      kh[c] = ldg128(k + (i64)min(t0 + i8 + 8, top) * D + c * 32 + l4 * 8);
    }
    #pragma unroll
    for (int half = 0; half < HALVES; half++)
      #pragma unroll
      for (int i = 0; i < 4; i++) vv[half][i] = ldg128(v + (i64)min(t0 + l4 * 2 + (i & 1) + (i >> 1) * 8, top) * D + half * 64 + i8 * 8);
    float x[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll
    for (int c = 0; c < KV; c++)
      #pragma unroll
      for (int j = 0; j < 2; j++)
        mma_model(x, word(kl[c], 2 * j), word(kh[c], 2 * j), word(kl[c], 2 * j + 1), word(kh[c], 2 * j + 1), q[c][2 * j], q[c][2 * j + 1]);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const int t = t0 + i8 + (i >> 1) * 8, back = i & 1 ? back1 : back0, age = (in_sink ? tail + count : tail) - 1 - t;
      const bool seen = t < count && age >= back && (in_sink || set.window <= 0 || age - back < set.window);
      x[i] = seen ? x[i] * p.scale_log2 : NEVER;
    }
    float n0 = fmaxf(x[0], x[2]), n1 = fmaxf(x[1], x[3]);
    #pragma unroll
    for (int o = 4; o < 32; o <<= 1) { n0 = fmaxf(n0, __shfl_xor_sync(ALL, n0, o)); n1 = fmaxf(n1, __shfl_xor_sync(ALL, n1, o)); }
    n0 = fmaxf(n0, m0); n1 = fmaxf(n1, m1);
    const float a0 = exp2_approx(m0 - n0), a1 = exp2_approx(m1 - n1);
    m0 = n0; m1 = n1;
    #pragma unroll
    for (int i = 0; i < 4; i++) x[i] = x[i] > 0.5f * NEVER ? exp2_approx(x[i] - (i & 1 ? m1 : m0)) : 0.f;
    l0 = l0 * a0 + x[0] + x[2]; l1 = l1 * a1 + x[1] + x[3];
    #pragma unroll
    for (int i = 0; i < D / 16; i++) { acc[i][0] *= a0; acc[i][1] *= a1; acc[i][2] *= a0; acc[i][3] *= a1; }
    const u32 p0 = MODEL_FP16 ? pack_fp16(x[0], x[1]) : pack_bf16(x[0], x[1]), p1 = MODEL_FP16 ? pack_fp16(x[2], x[3]) : pack_bf16(x[2], x[3]);
    const u32 b0 = transpose8x8(p0), b1 = transpose8x8(p1);
    u32 r0 = 0, r1 = 0;                                        // what rounding to bf16 lost
    if (!MODEL_FP16) {
      r0 = transpose8x8(pack_bf16(x[0] - bf16_low(p0), x[1] - bf16_high(p0)));
      r1 = transpose8x8(pack_bf16(x[2] - bf16_low(p1), x[3] - bf16_high(p1)));
    }
    #pragma unroll
    for (int j = 0; j < D / 16; j++) {                         // rows i8, i8 + 8 of A: channels raw_channel(j, 0), raw_channel(j, 1)
      const int jh = HALVES == 2 ? j : j + 4;
      const u32 sel = j & 1 ? 0x7632 : 0x5410;
      const u32 a0 = __byte_perm(word(vv[0][0], j >> 1), word(vv[0][1], j >> 1), sel), a1 = __byte_perm(word(vv[HALVES - 1][0], jh >> 1), word(vv[HALVES - 1][1], jh >> 1), sel);
      const u32 a2 = __byte_perm(word(vv[0][2], j >> 1), word(vv[0][3], j >> 1), sel), a3 = __byte_perm(word(vv[HALVES - 1][2], jh >> 1), word(vv[HALVES - 1][3], jh >> 1), sel);
      mma_model(acc[j], a0, a1, a2, a3, b0, b1);
      if (!MODEL_FP16) mma_model(acc[j], a0, a1, a2, a3, r0, r1);
    }
  }
  #pragma unroll
  for (int o = 4; o < 32; o <<= 1) { l0 += __shfl_xor_sync(ALL, l0, o); l1 += __shfl_xor_sync(ALL, l1, o); }
  #pragma unroll
  for (int j = 0; j < D / 16; j++) {
    const int c0 = i8 * 8 + j, c1 = HALVES == 2 ? c0 + 64 : c0 + 4;
    sm.red[w][l4 * 2][c0] = acc[j][0]; sm.red[w][l4 * 2 + 1][c0] = acc[j][1];
    sm.red[w][l4 * 2][c1] = acc[j][2]; sm.red[w][l4 * 2 + 1][c1] = acc[j][3];
  }
  if (i8 == 0) { sm.max[w][l4 * 2] = m0; sm.max[w][l4 * 2 + 1] = m1; sm.sum[w][l4 * 2] = l0; sm.sum[w][l4 * 2 + 1] = l1; }
}

// ---- rotations ------------------------------------------------------------------------------------------------------------------------------
__device__ __forceinline__ void split_bf16(float a, float b, u32& hi, u32& lo) {
  hi = pack_bf16(a, b);
  lo = pack_bf16(a - bf16_low(hi), b - bf16_high(hi));
}

// Rotated queries of a segment -> sm.query [row, axis], sm.constant (q . mean). Warp w multiplies channels 16 w .. 16 w + 15; high and low halves of q are
// the two halves of operand A's rows. Then sm.inverse makes the largest entry `peak`, so that q * step fits fp16, and sm.row_scale undoes it.
__device__ __forceinline__ void rotate_query(const Params& p, const Segment& s, Shared& sm, int w, int lane, float peak) {
  const int i8 = lane >> 2, l4 = lane & 3;
  const SetParams& set = p.sets[s.set];
  const Rotation& rot = set.key;
  const int bh = s.b * set.heads + s.h;
  constexpr int HALVES = D / 64, CHUNKS = D / 16;
  int head, token;
  constexpr int TURNS = (ROWS + WARPS - 1) / WARPS;           // rows of a warp
  float constant[TURNS];
  #pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    constant[turn] = 0.f;
    const int row = w + turn * WARPS;
    if (!keys::MEAN || row >= ROWS || !query_row(p, s, row, head, token)) continue;
    const u16* src = p.q + s.b * p.q_b + head * p.q_h + token * p.q_t;
    #pragma unroll
    for (int i = 0; i < D / 32; i++) constant[turn] += model_low(src[lane + 32 * i]) * rot.mean[(i64)bh * D + lane + 32 * i];
  }
  if (keys::MATRIX) {
    const bool ok = query_row(p, s, i8, head, token);
    const u16* src = p.q + s.b * p.q_b + head * p.q_h + token * p.q_t;
    for (int chunk = w; chunk < CHUNKS; chunk += WARPS) {
      float x[4];
      uint4 m[HALVES][4];
      const u16* base = rot.matrix + s.b * rot.stride_b + s.h * rot.stride_h;
      #pragma unroll
      for (int half = 0; half < HALVES; half++)
        #pragma unroll
        for (int i = 0; i < 4; i++) m[half][i] = ldg128(base + (chunk * 16 + l4 * 2 + (i & 1) + (i >> 1) * 8) * D + half * 64 + i8 * 8);
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = chunk * 16 + l4 * 2 + (i & 1) + (i >> 1) * 8, from = keys::ORDER ? rot.order[(i64)bh * D + c] : c;
        x[i] = ok ? model_low(src[from]) : 0.f;
      }
      u32 a[4];
      split_bf16(x[0], x[1], a[0], a[1]);
      split_bf16(x[2], x[3], a[2], a[3]);
      float c[HALVES][8][4];
      #pragma unroll
      for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
          if (!keys::RESIDUAL) break;
          #pragma unroll
          for (int half = 0; half < HALVES; half++)
            #pragma unroll
            for (int i = 0; i < 4; i++) m[half][i] = ldg128(rot.residual + s.b * rot.stride_b + s.h * rot.stride_h + (chunk * 16 + l4 * 2 + (i & 1) + (i >> 1) * 8) * D + half * 64 + i8 * 8);
        }
        #pragma unroll
        for (int half = 0; half < HALVES; half++)
          #pragma unroll
          for (int j = 0; j < 8; j++) {
            const u32 sel = j & 1 ? 0x7632 : 0x5410;
            if (pass == 0) c[half][j][0] = c[half][j][1] = c[half][j][2] = c[half][j][3] = 0.f;
            mma_bf16(c[half][j], a[0], a[1], a[2], a[3], __byte_perm(word(m[half][0], j >> 1), word(m[half][1], j >> 1), sel),
              __byte_perm(word(m[half][2], j >> 1), word(m[half][3], j >> 1), sel));
          }
      }
      #pragma unroll
      for (int half = 0; half < HALVES; half++)
        #pragma unroll
        for (int j = 0; j < 8; j++) {
          const float y0 = c[half][j][0] + c[half][j][2], y1 = c[half][j][1] + c[half][j][3];
          float* dst = &sm.red[w][i8][half * 64 + l4 * 16 + j];
          if (chunk == w) { dst[0] = y0; dst[8] = y1; } else { dst[0] += y0; dst[8] += y1; }
        }
    }
    __syncthreads();
  }
  constexpr int SOURCES = CHUNKS < WARPS ? CHUNKS : WARPS;
  #pragma unroll
  for (int turn = 0; turn < TURNS; turn++) {
    const int row = w + turn * WARPS;
    if (row >= ROWS) break;
    const bool ok = query_row(p, s, row, head, token);
    const u16* src = p.q + s.b * p.q_b + head * p.q_h + token * p.q_t;
    float biggest = 0.f, raised = 0.f;
    #pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const int a = lane + 32 * i;
      float y = 0.f;
      if (keys::MATRIX) {
        #pragma unroll
        for (int k = 0; k < SOURCES; k++) y += sm.red[k][row][a];
      } else if (ok) y = model_low(src[keys::ORDER ? rot.order[(i64)bh * D + a] : a]);
      sm.query[row][a] = y;
      biggest = fmaxf(biggest, fabsf(y));
      if (keys::NOISE) raised = fmaf(y * y, rot.noise[(i64)bh * D + a], raised);
    }
    #pragma unroll
    for (int o = 16; o; o >>= 1) {
      biggest = fmaxf(biggest, __shfl_xor_sync(ALL, biggest, o));
      constant[turn] += __shfl_xor_sync(ALL, constant[turn], o);
      raised += __shfl_xor_sync(ALL, raised, o);
    }
    if (lane == 0) {
      sm.constant[row] = constant[turn] * p.scale_log2 + raised * p.noise_log2;
      sm.inverse[row] = biggest > 0.f ? peak / biggest : 0.f;
      sm.row_scale[row] = biggest / peak * p.scale_log2;
    }
  }
  __syncthreads();
}

#if HAS_TILES
// ---- packed tiles ---------------------------------------------------------------------------------------------------------------------------
constexpr int FIELD_BITS = 16 / FIELDS;                       // bits of a word that one field of 16 tokens takes
constexpr int DIRECT = 11 / FIELD_BITS;                       // fields whose masked words are fp16 subnormals or the first binade: n * 2^-24 with n < 2^11
constexpr int UPPER_SHIFT = DIRECT * FIELD_BITS;              // the other fields are shifted down by this
constexpr int GROUP_FIELDS = FIELDS / GROUPS;
constexpr float SUBNORMAL = 16777216.f;                       // 2^24
constexpr float LAZY = 4.f;                                   // the running maximum (log2) may lag by this
constexpr float TOP_SHIFT = 11.f;                             // P is 2^(11 - bit) * 2^score: at most 2^15, and code * P = 2^-13 of its value
constexpr float P_SHIFT = 13.f;
constexpr int META = META_FP8 ? 1 : 2;                        // bytes of a step or centre
constexpr float QUERY_PEAK = (META_FP8 ? 128.f : 1.f) / (float)(1 << keys::TOP_SHIFT);   // largest query entry: times its weight and the largest step (448 or 65504) it fits fp16

__device__ __forceinline__ constexpr int field_bit(int f) { return (f < DIRECT ? f : f - DIRECT) * FIELD_BITS; }
__device__ __forceinline__ constexpr float power2(int n) { return n >= 0 ? (float)(1 << n) : 1.f / (float)(1 << -n); }
__device__ __forceinline__ constexpr int blocks32(int columns) { return (columns + 31) / 32; }
__device__ __forceinline__ constexpr int tiles16(int columns) { return (columns + 15) / 16; }

constexpr int K_BLOCKS2 = blocks32(keys::C2), K_BLOCKS1 = blocks32(keys::C1);
constexpr int K_BLOCKS = K_BLOCKS2 + K_BLOCKS1;               // blocks of 32 word columns of the key planes
constexpr int K_PAIRS = K_BLOCKS2 * keys::E2 + K_BLOCKS1 * keys::E1;   // pairs of k-chunks (32 slots)
constexpr int K_CENTRES = blocks32(keys::N_CENTRES);          // pairs of k-chunks of centres

// block of 32 columns -> its plane and what follows from it
__device__ __forceinline__ constexpr bool is_two(int block) { return block < K_BLOCKS2; }
__device__ __forceinline__ constexpr int in_plane(int block) { return is_two(block) ? block : block - K_BLOCKS2; }
__device__ __forceinline__ constexpr int plane_columns(int block) { return is_two(block) ? keys::C2 : keys::C1; }
__device__ __forceinline__ constexpr int plane_slots(int block) { return is_two(block) ? keys::E2 : keys::E1; }
__device__ __forceinline__ constexpr int pair_index(int block, int e) { return is_two(block) ? block * keys::E2 + e : K_BLOCKS2 * keys::E2 + in_plane(block) * keys::E1 + e; }
__device__ __forceinline__ constexpr int block_width(int columns) { return columns % 32 == 0 ? 32 : columns % 16 == 0 ? 16 : 8; }

__device__ __forceinline__ void four_fp16x2(u32 address, u32* out) {   // 8 steps or centres of a lane -> fp16 pairs
  if (META_FP8) {
    const uint2 v = lds64(address);
    out[0] = e4m3_to_fp16x2(v.x); out[1] = e4m3_to_fp16x2(v.x >> 16); out[2] = e4m3_to_fp16x2(v.y); out[3] = e4m3_to_fp16x2(v.y >> 16);
  } else {
    const uint4 v = lds128(address);
    out[0] = v.x; out[1] = v.y; out[2] = v.z; out[3] = v.w;
  }
}
__device__ __forceinline__ float one_float(u32 address, float factor) {
  if (META_FP8) return fp16_to_float((u16)e4m3_to_fp16x2(lds8(address))) * factor;
  return fp16_to_float(lds16(address));
}

struct Packed {                       // a warp's state over the packed tiles of a segment
  float m0, m1, l0, l1;               // lane's query rows 2 l4, 2 l4 + 1: maximum (log2) and sum
  bool first;
  float acc[D / 8][2];                // [run of 8 axes][row]: axis 8 run + i8
  u32 q[K_PAIRS][4];                  // query slots as operand B, weights of the slots folded in
  u32 qc[K_CENTRES ? K_CENTRES : 1][4], qr[K_CENTRES && CENTRE_RESIDUAL ? K_CENTRES : 1][4];   // query axes of the centres, and what fp16 lost of them
  float s0, s1;                       // what undoes the scaling of the rows, times the scale of the scores
  u32 words[K_BLOCKS], steps[K_PAIRS], centres[K_CENTRES ? K_CENTRES : 1];   // the lane's byte offsets in a tile
};

__device__ __forceinline__ void load_query(Packed& st, const Shared& sm, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3, row = ((i8 >> 1) << 2) + (i8 & 1);
  const float inverse = sm.inverse[i8];
  #pragma unroll
  for (int block = 0; block < K_BLOCKS; block++) {
    const int columns = plane_columns(block), width = block_width(columns), wanted = in_plane(block) * 32 + l4 * 8;
    const bool ok = wanted < columns;
    const int column = ok ? wanted : 0;
    st.words[block] = (is_two(block) ? keys::TWO : keys::ONE) + 2 * ((column / width) * 16 * width + row * width + column % width);
    #pragma unroll
    for (int e = 0; e < plane_slots(block); e++) {
      const int pair = pair_index(block, e), bits = is_two(block) ? 2 : 1;
      const int run = (is_two(block) ? 0 : keys::C2 * keys::E2 / 8) + (e * columns + column) / 8;
      const float weight = ok ? inverse * exp2f((float)(keys::run_shift(run) - e * bits)) : 0.f;
      const float* src = &sm.query[i8][keys::run_axis(run) * 8];
      #pragma unroll
      for (int i = 0; i < 4; i++) st.q[pair][i] = pack_fp16(src[2 * i] * weight, src[2 * i + 1] * weight);
      st.steps[pair] = keys::STEPS + keys::run_step(run) * 8 * META;
    }
  }
  #pragma unroll
  for (int c = 0; c < K_CENTRES; c++) {
    const int wanted = c * 4 + l4;
    const bool ok = wanted * 8 < keys::N_CENTRES;
    const int run = ok ? wanted : 0;
    const float* src = &sm.query[i8][keys::centre_axis(run) * 8];
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const float x = ok ? src[2 * i] * inverse : 0.f, y = ok ? src[2 * i + 1] * inverse : 0.f;
      st.qc[c][i] = pack_fp16(x, y);
      if (CENTRE_RESIDUAL) st.qr[c][i] = pack_fp16(x - fp16_to_float((u16)st.qc[c][i]), y - fp16_to_float((u16)(st.qc[c][i] >> 16)));
    }
    st.centres[c] = keys::CENTRES + run * 8 * META;
  }
  st.s0 = sm.row_scale[l4 * 2]; st.s1 = sm.row_scale[l4 * 2 + 1];
  st.m0 = st.m1 = st.l0 = st.l1 = 0.f;
  st.first = true;
  #pragma unroll
  for (int i = 0; i < D / 8; i++) st.acc[i][0] = st.acc[i][1] = 0.f;
}

// Scores of the tile's tokens: s[f] is the C fragment of field f (rows: tokens, columns: query rows), in log2 units less the running maximum.
__device__ __forceinline__ void tile_scores(Packed& st, u32 tile, float (&s)[FIELDS][4]) {
  uint4 lo[K_BLOCKS], hi[K_BLOCKS];
  #pragma unroll
  for (int block = 0; block < K_BLOCKS; block++) {
    lo[block] = lds128(tile + st.words[block]);
    hi[block] = lds128(tile + st.words[block] + 4 * block_width(plane_columns(block)));   // two rows on
  }
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) s[f][0] = s[f][1] = s[f][2] = s[f][3] = 0.f;
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    u32 qs[K_PAIRS][4];
    float offset[4] = {0.f, 0.f, 0.f, 0.f}, offset1[4] = {0.f, 0.f, 0.f, 0.f}, centre[4] = {0.f, 0.f, 0.f, 0.f}, centre1[4] = {0.f, 0.f, 0.f, 0.f};
    #pragma unroll
    for (int block = 0; block < K_BLOCKS; block++)
      #pragma unroll
      for (int e = 0; e < plane_slots(block); e++) {
        const int pair = pair_index(block, e), bits = is_two(block) ? 2 : 1;
        u32 step[4];
        four_fp16x2(tile + st.steps[pair] + g * keys::N_STEPS * META, step);
        #pragma unroll
        for (int i = 0; i < 4; i++) qs[pair][i] = mul_fp16x2(st.q[pair][i], step[i]);
        // -top / 2 of the slot: -1.5 or -0.5, times the 2^(e bits) that the query was divided by
        const u32 half = (is_two(block) ? 0xbe00u : 0xb800u) + ((u32)(e * bits) << 10), minus = half | half << 16;
        mma_fp16(offset, minus, minus, minus, minus, qs[pair][0], qs[pair][1]);
        mma_fp16(offset1, minus, minus, minus, minus, qs[pair][2], qs[pair][3]);
      }
    #pragma unroll
    for (int c = 0; c < K_CENTRES; c++) {
      u32 x[4];
      four_fp16x2(tile + st.centres[c] + g * keys::N_CENTRES * META, x);
      mma_fp16(centre, x[0], x[0], x[1], x[1], st.qc[c][0], st.qc[c][1]);
      mma_fp16(centre1, x[2], x[2], x[3], x[3], st.qc[c][2], st.qc[c][3]);
      if (CENTRE_RESIDUAL) {
        mma_fp16(centre, x[0], x[0], x[1], x[1], st.qr[c][0], st.qr[c][1]);
        mma_fp16(centre1, x[2], x[2], x[3], x[3], st.qr[c][2], st.qr[c][3]);
      }
    }
    #pragma unroll
    for (int block = 0; block < K_BLOCKS; block++)
      #pragma unroll
      for (int j = 0; j < 2; j++) {
        const u32 a[4] = {word(lo[block], 2 * j), word(hi[block], 2 * j), word(lo[block], 2 * j + 1), word(hi[block], 2 * j + 1)};
        const u32 up[4] = {a[0] >> UPPER_SHIFT, a[1] >> UPPER_SHIFT, a[2] >> UPPER_SHIFT, a[3] >> UPPER_SHIFT};
        #pragma unroll
        for (int e = 0; e < plane_slots(block); e++) {
          const int pair = pair_index(block, e), bits = is_two(block) ? 2 : 1;
          #pragma unroll
          for (int f0 = 0; f0 < GROUP_FIELDS; f0++) {         // innermost: independent chains of MMAs
            const int f = g * GROUP_FIELDS + f0;
            const u32 mask = (is_two(block) ? 0x00030003u : 0x00010001u) << (field_bit(f) + e * bits);
            const u32* x = f < DIRECT ? a : up;
            mma_fp16(s[f], x[0] & mask, x[1] & mask, x[2] & mask, x[3] & mask, qs[pair][2 * j], qs[pair][2 * j + 1]);
          }
        }
      }
    float by_step = 1.f, by_centre = 1.f;
    if (META_FP8) {
      const u32 factors = lds32(tile + keys::FACTORS + g * 4);
      by_step = fp16_to_float((u16)factors);
      by_centre = fp16_to_float((u16)(factors >> 16));
    }
    const float step0 = st.s0 * by_step, step1 = st.s1 * by_step;
    const float bias0 = (offset[0] + offset1[0]) * step0 + (centre[0] + centre1[0]) * (st.s0 * by_centre) - st.m0;
    const float bias1 = (offset[1] + offset1[1]) * step1 + (centre[1] + centre1[1]) * (st.s1 * by_centre) - st.m1;
    #pragma unroll
    for (int f0 = 0; f0 < GROUP_FIELDS; f0++) {
      const int f = g * GROUP_FIELDS + f0;
      const float c0 = step0 * (SUBNORMAL * power2(-field_bit(f))), c1 = step1 * (SUBNORMAL * power2(-field_bit(f)));
      s[f][0] = fmaf(s[f][0], c0, bias0); s[f][1] = fmaf(s[f][1], c1, bias1);
      s[f][2] = fmaf(s[f][2], c0, bias0); s[f][3] = fmaf(s[f][3], c1, bias1);
    }
  }
}

// One 16-slot row block of a value plane: its words in a lane, and the sums of P * code for its slots.
template <bool TWO>
struct ValueRows {
  static constexpr int C = TWO ? values::C2 : values::C1, E = TWO ? values::E2 : values::E1, BITS = TWO ? 2 : 1;
  static constexpr int FIRST_RUN = TWO ? 0 : values::C2 * values::E2 / 8;
  uint2 x[2];
  float r[E][4];

  __device__ __forceinline__ void load(u32 tile, int mt, int i8, int l4) {
    #pragma unroll
    for (int h = 0; h < 2; h++)
      x[h] = mt * 16 + h * 8 < C ? lds64(tile + (TWO ? values::TWO : values::ONE) + (mt * 16 + h * 8 + i8) * 32 + l4 * 8) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void start(float sum0, float sum1) {   // -top / 2 of the slots
    #pragma unroll
    for (int e = 0; e < E; e++) {
      const float offset = -(TWO ? 1.5f : 0.5f) * power2(e * BITS);
      r[e][0] = r[e][2] = offset * sum0;
      r[e][1] = r[e][3] = offset * sum1;
    }
  }
  __device__ __forceinline__ void shift() { x[0].x >>= UPPER_SHIFT; x[0].y >>= UPPER_SHIFT; x[1].x >>= UPPER_SHIFT; x[1].y >>= UPPER_SHIFT; }
  __device__ __forceinline__ void multiply(int f, const u32 (&p)[2]) {
    #pragma unroll
    for (int e = 0; e < E; e++) {
      const u32 mask = (TWO ? 0x00030003u : 0x00010001u) << (field_bit(f) + e * BITS);
      mma_fp16(r[e], x[0].x & mask, x[1].x & mask, x[0].y & mask, x[1].y & mask, p[0], p[1]);
    }
  }
  __device__ __forceinline__ void add(Packed& st, u32 tile, int mt, int g, float factor, int i8) const {
    #pragma unroll
    for (int e = 0; e < E; e++)
      #pragma unroll
      for (int h = 0; h < 2; h++)
        if (mt * 16 + h * 8 < C) {
          const int run = FIRST_RUN + (e * C + mt * 16 + h * 8) / 8, axis = values::run_axis(run);
          const float step = one_float(tile + values::STEPS + (g * values::N_STEPS + values::run_step(run) * 8 + i8) * META, factor) * power2(values::run_shift(run) - e * BITS);
          st.acc[axis][0] = fmaf(r[e][2 * h], step, st.acc[axis][0]);
          st.acc[axis][1] = fmaf(r[e][2 * h + 1], step, st.acc[axis][1]);
        }
  }
};

// acc += P . values for N2 row blocks of the two-bit plane from A2 and N1 of the one-bit plane from A1: N2 * E2 + N1 * E1 independent chains of MMAs
template <int A2, int N2, int A1, int N1>
__device__ __forceinline__ void value_rows(Packed& st, u32 tile, const u32 (&pb)[FIELDS][2], const float (&sums)[GROUPS][4], const float (&factor)[GROUPS], int i8, int l4) {
  ValueRows<true> two[N2 > 0 ? N2 : 1];
  ValueRows<false> one[N1 > 0 ? N1 : 1];
  #pragma unroll
  for (int i = 0; i < N2; i++) two[i].load(tile, A2 + i, i8, l4);
  #pragma unroll
  for (int i = 0; i < N1; i++) one[i].load(tile, A1 + i, i8, l4);
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    #pragma unroll
    for (int i = 0; i < N2; i++) two[i].start(sums[g][0], sums[g][1]);
    #pragma unroll
    for (int i = 0; i < N1; i++) one[i].start(sums[g][0], sums[g][1]);
    #pragma unroll
    for (int f0 = 0; f0 < GROUP_FIELDS; f0++) {
      const int f = g * GROUP_FIELDS + f0;
      #pragma unroll
      for (int i = 0; i < N2; i++) { if (f == DIRECT) two[i].shift(); two[i].multiply(f, pb[f]); }
      #pragma unroll
      for (int i = 0; i < N1; i++) { if (f == DIRECT) one[i].shift(); one[i].multiply(f, pb[f]); }
    }
    #pragma unroll
    for (int i = 0; i < N2; i++) two[i].add(st, tile, A2 + i, g, factor[g], i8);
    #pragma unroll
    for (int i = 0; i < N1; i++) one[i].add(st, tile, A1 + i, g, factor[g], i8);
  }
}
__device__ __forceinline__ constexpr int at_most(int a, int b) { return a < b ? (a > 0 ? a : 0) : b; }
template <int A2, int A1>
__device__ __forceinline__ void all_value_rows(Packed& st, u32 tile, const u32 (&pb)[FIELDS][2], const float (&sums)[GROUPS][4], const float (&factor)[GROUPS], int i8, int l4) {
  constexpr int MT2 = tiles16(values::C2), MT1 = tiles16(values::C1), STEP2 = values::E2 >= 4 ? 1 : 4 / values::E2, STEP1 = values::E1 >= 4 ? 1 : 4 / values::E1;
  if constexpr (A2 < MT2 || A1 < MT1) {
    value_rows<A2, at_most(MT2 - A2, STEP2), A1, at_most(MT1 - A1, STEP1)>(st, tile, pb, sums, factor, i8, l4);
    all_value_rows<A2 + STEP2, A1 + STEP1>(st, tile, pb, sums, factor, i8, l4);
  }
}

__device__ __forceinline__ void attend_tile(Packed& st, u32 tile, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  float s[FIELDS][4];
  tile_scores(st, tile, s);
  float x0 = NEVER, x1 = NEVER;
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) { x0 = fmaxf(x0, fmaxf(s[f][0], s[f][2])); x1 = fmaxf(x1, fmaxf(s[f][1], s[f][3])); }
  if (__any_sync(ALL, st.first || fmaxf(x0, x1) > LAZY)) {
    #pragma unroll
    for (int o = 4; o < 32; o <<= 1) { x0 = fmaxf(x0, __shfl_xor_sync(ALL, x0, o)); x1 = fmaxf(x1, __shfl_xor_sync(ALL, x1, o)); }
    const float d0 = (st.first || x0 > LAZY) ? x0 : 0.f, d1 = (st.first || x1 > LAZY) ? x1 : 0.f;
    const float a0 = st.first ? 0.f : exp2_approx(-d0), a1 = st.first ? 0.f : exp2_approx(-d1);
    st.m0 += d0; st.m1 += d1;
    st.l0 *= a0; st.l1 *= a1;
    #pragma unroll
    for (int f = 0; f < FIELDS; f++) { s[f][0] -= d0; s[f][1] -= d1; s[f][2] -= d0; s[f][3] -= d1; }
    #pragma unroll
    for (int i = 0; i < D / 8; i++) { st.acc[i][0] *= a0; st.acc[i][1] *= a1; }
    st.first = false;
  }
  u32 pb[FIELDS][2];
  float sums[GROUPS][4], factor[GROUPS];
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) { sums[g][0] = sums[g][1] = sums[g][2] = sums[g][3] = 0.f; factor[g] = 1.f; }
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) {
    const float shift = TOP_SHIFT - field_bit(f);
    pb[f][0] = transpose8x8(pack_fp16(exp2_approx(s[f][0] + shift), exp2_approx(s[f][1] + shift)));
    pb[f][1] = transpose8x8(pack_fp16(exp2_approx(s[f][2] + shift), exp2_approx(s[f][3] + shift)));
    const u32 one = 0x00010001u << field_bit(f);              // a code of 1 for every token: row sums of the rounded P, so that offsets cancel exactly
    mma_fp16(sums[f / GROUP_FIELDS], one, one, one, one, pb[f][0], pb[f][1]);
  }
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    st.l0 += sums[g][0]; st.l1 += sums[g][1];
    float by_centre = 1.f;
    if (META_FP8) {
      const u32 factors = lds32(tile + values::FACTORS + g * 4);
      factor[g] = fp16_to_float((u16)factors);
      by_centre = fp16_to_float((u16)(factors >> 16));
    }
    #pragma unroll
    for (int axis = 0; axis < D / 8; axis++)
      if (values::centre_run(axis) >= 0) {
        const float c = one_float(tile + values::CENTRES + (g * values::N_CENTRES + values::centre_run(axis) * 8 + i8) * META, by_centre);
        st.acc[axis][0] = fmaf(sums[g][0], c, st.acc[axis][0]);
        st.acc[axis][1] = fmaf(sums[g][1], c, st.acc[axis][1]);
      }
  }
  all_value_rows<0, 0>(st, tile, pb, sums, factor, i8, l4);
}

__device__ __forceinline__ void store_state(const Packed& st, Shared& sm, int w, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  #pragma unroll
  for (int axis = 0; axis < D / 8; axis++) {
    sm.red[w][l4 * 2][axis * 8 + i8] = st.acc[axis][0];
    sm.red[w][l4 * 2 + 1][axis * 8 + i8] = st.acc[axis][1];
  }
  if (i8 == 0) {
    sm.max[w][l4 * 2] = st.first ? NEVER : st.m0 + P_SHIFT; sm.max[w][l4 * 2 + 1] = st.first ? NEVER : st.m1 + P_SHIFT;
    sm.sum[w][l4 * 2] = st.l0; sm.sum[w][l4 * 2 + 1] = st.l1;
  }
}

// The units of a segment go round the warps; raw ones come first.
__device__ __forceinline__ int first_tile(const Segment& s, int w) {
  const int lead = max(s.raw_end - s.begin, 0);               // raw units in front
  return max(s.begin, s.raw) - s.raw + (w + WARPS - lead % WARPS) % WARPS;
}
// The tiles that a warp will read, over all segments of the CTA, in order: its copies run ahead of the arithmetic, across the segments' borders.
struct Prefetch {
  int pos, end, tile, stop, entry;
  const u8* base;
};
__device__ __forceinline__ void settle(const Params& p, const Plan& plan, Prefetch& f, int w) {   // move on to a segment with a tile for this warp
  while (f.tile >= f.stop && f.pos < f.end) {
    const Segment s = locate(plan, p.lead, f.pos, f.end, f.entry);
    f.entry = s.entry;
    f.pos += s.length;
    const SetParams& set = p.sets[s.set];
    f.base = set.tiles + s.b * set.tiles_b + s.h * set.tiles_h;
    f.tile = first_tile(s, w);
    f.stop = s.end - s.raw;
  }
}
__device__ __forceinline__ void fetch(const Params& p, const Plan& plan, Prefetch& f, int w, u32 stage, u32 barrier) {
  settle(p, plan, f, w);
  if (f.tile < f.stop) {
    bulk_copy(stage, f.base + (i64)f.tile * TILE_BYTES, TILE_BYTES, barrier);
    f.tile += WARPS;
  }
}
#endif

// ---- merging --------------------------------------------------------------------------------------------------------------------------------
enum Kind { RAW = 0, PACKED = 1 };
constexpr int LANE_FLOATS = D / 32;                           // neighbouring channels of a lane when a warp holds one row

__device__ __forceinline__ i64 partial_row(int slot, Kind kind, int row) { return (i64)(slot * 2 + kind) * ROWS + row; }

template <bool GLOBAL>
__device__ __forceinline__ void load_lane(const float* src, float (&v)[LANE_FLOATS]) {
  if (LANE_FLOATS == 4) {
    const float4 x = GLOBAL ? __ldcg((const float4*)src) : *(const float4*)src;
    v[0] = x.x; v[1] = x.y; v[LANE_FLOATS - 2] = x.z; v[LANE_FLOATS - 1] = x.w;
  } else {
    const float2 x = GLOBAL ? __ldcg((const float2*)src) : *(const float2*)src;
    v[0] = x.x; v[1] = x.y;
  }
}
__device__ __forceinline__ void store_lane(float* dst, const float (&v)[LANE_FLOATS]) {
  if (LANE_FLOATS == 4) *(float4*)dst = make_float4(v[0], v[1], v[LANE_FLOATS - 2], v[LANE_FLOATS - 1]);
  else *(float2*)dst = make_float2(v[0], v[1]);
}

// o += sum of the partials of up to 32 CTAs from `first`, lane j holding the weight of CTA first + j; returns the sum of the weights.
template <Kind KIND>
__device__ __forceinline__ float add_partials(const Params& p, int head, int first, int row, int lane, float weight, float (&o)[LANE_FLOATS]) {
  constexpr int IN_FLIGHT = KIND == PACKED ? 16 : 8;          // no more: this code runs once, from a cold instruction cache
  float total = 0.f;
  const u32 some = __ballot_sync(ALL, weight > 0.f);
  const float* base = p.partial + partial_row(first + head, KIND, row) * D + lane * LANE_FLOATS;
  #pragma unroll 1
  for (int j0 = 0; j0 < 32; j0 += IN_FLIGHT) {
    if (!(some >> j0)) break;
    float v[IN_FLIGHT][LANE_FLOATS];
    #pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      #pragma unroll
      for (int i = 0; i < LANE_FLOATS; i++) v[j][i] = 0.f;
      if (some >> (j0 + j) & 1) load_lane<true>(base + (i64)(j0 + j) * (2 * ROWS * D), v[j]);
    }
    #pragma unroll
    for (int j = 0; j < IN_FLIGHT; j++) {
      const float e = __shfl_sync(ALL, weight, j0 + j);
      total += e;
      #pragma unroll
      for (int i = 0; i < LANE_FLOATS; i++) o[i] = fmaf(e, v[j][i], o[i]);
    }
  }
  return total;
}

// The last CTA of a head: merge its partials, rotate the packed part back, write output and lse.
__device__ __forceinline__ void finish_head(const Params& p, const Segment& s, Shared& sm, int w, int lane, int first, int last) {
  const int i8 = lane >> 2, l4 = lane & 3;
  const SetParams& set = p.sets[s.set];
  const Rotation& rot = set.value;
  const int bh = s.b * set.heads + s.h;
  float (*axes)[ROW] = sm.red[0], (*channels)[ROW] = sm.red[1];
  int head, token;
  constexpr int CHUNKS = D / 16, KV = D / 32;
  const bool packed = s.tiles > 0, turn = packed && values::MATRIX;
  uint4 lo[KV], hi[KV];                                       // rows of the matrix; the first are loaded ahead
  const auto load = [&](const u16* matrix, int chunk) {
    const u16* from = matrix + s.b * rot.stride_b + s.h * rot.stride_h + (chunk * 16 + i8) * D + l4 * 8;
    #pragma unroll
    for (int c = 0; c < KV; c++) { lo[c] = ldg128(from + c * 32); hi[c] = ldg128(from + 8 * D + c * 32); }
  };
  if (turn && w < CHUNKS) load(rot.matrix, w);
  for (int row = w; row < ROWS; row += WARPS) {
    float m = NEVER, mass = 0.f, total = 0.f, y[LANE_FLOATS], o[LANE_FLOATS];
    #pragma unroll
    for (int i = 0; i < LANE_FLOATS; i++) y[i] = o[i] = 0.f;
    for (int c0 = first; c0 <= last; c0 += 32) {
      const bool in = c0 + lane <= last;
      const float raw = in ? __ldcg(p.partial_lse + partial_row(c0 + lane + s.head, RAW, row)) : NEVER;
      const float tiles = in ? __ldcg(p.partial_lse + partial_row(c0 + lane + s.head, PACKED, row)) : NEVER;
      float n = fmaxf(raw, tiles);
      #pragma unroll
      for (int k = 16; k; k >>= 1) n = fmaxf(n, __shfl_xor_sync(ALL, n, k));
      n = fmaxf(n, m);
      const float scale = exp2_approx(m - n);
      m = n;
      mass *= scale; total *= scale;
      #pragma unroll
      for (int i = 0; i < LANE_FLOATS; i++) { y[i] *= scale; o[i] *= scale; }
      mass += add_partials<PACKED>(p, s.head, c0, row, lane, tiles > 0.5f * NEVER ? exp2_approx(tiles - m) : 0.f, y);
      total += add_partials<RAW>(p, s.head, c0, row, lane, raw > 0.5f * NEVER ? exp2_approx(raw - m) : 0.f, o);
    }
    total += mass;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    #pragma unroll
    for (int i = 0; i < LANE_FLOATS; i++) { y[i] *= inverse; o[i] *= inverse; }
    store_lane(&axes[row][lane * LANE_FLOATS], y);
    store_lane(&channels[row][lane * LANE_FLOATS], o);
    if (lane == 0) {
      sm.mass[row] = mass * inverse;
      if (query_row(p, s, row, head, token))
        p.lse[((i64)s.b * p.q_heads + head) * N_QUERY + token] = total > 0.f ? (m + log2_approx(total)) * LN2 : __uint_as_float(0xff800000u);
    }
  }
  __syncthreads();
  if (turn) {
    for (int chunk = w; chunk < CHUNKS; chunk += WARPS) {
      float x[4] = {0.f, 0.f, 0.f, 0.f};
      if (chunk != w) load(rot.matrix, chunk);
      #pragma unroll
      for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) { if (!values::RESIDUAL) break; load(rot.residual, chunk); }
        #pragma unroll
        for (int c = 0; c < KV; c++)
          #pragma unroll
          for (int j = 0; j < 2; j++) {
            const float* y = &axes[i8][c * 32 + l4 * 8 + j * 4];
            u32 h0, r0, h1, r1;
            split_bf16(y[0], y[1], h0, r0);
            split_bf16(y[2], y[3], h1, r1);
            mma_bf16(x, word(lo[c], 2 * j), word(hi[c], 2 * j), word(lo[c], 2 * j + 1), word(hi[c], 2 * j + 1), h0, h1);
            mma_bf16(x, word(lo[c], 2 * j), word(hi[c], 2 * j), word(lo[c], 2 * j + 1), word(hi[c], 2 * j + 1), r0, r1);
          }
      }
      #pragma unroll
      for (int i = 0; i < 4; i++) {
        const int row = l4 * 2 + (i & 1), c = chunk * 16 + i8 + (i >> 1) * 8, to = values::ORDER ? rot.order[(i64)bh * D + c] : c;
        if (!query_row(p, s, row, head, token)) continue;
        float v = x[i];
        if (values::MEAN) v = fmaf(sm.mass[row], rot.mean[(i64)bh * D + c], v);
        p.out[(((i64)s.b * p.q_heads + head) * N_QUERY + token) * D + to] = to_model(v + channels[row][to]);
      }
    }
  } else {
    for (int row = w; row < ROWS; row += WARPS) {
      if (!query_row(p, s, row, head, token)) continue;
      #pragma unroll
      for (int i = 0; i < D / 32; i++) {
        const int a = lane + 32 * i, to = packed && values::ORDER ? rot.order[(i64)bh * D + a] : a;
        p.out[(((i64)s.b * p.q_heads + head) * N_QUERY + token) * D + to] = to_model(axes[row][a] + channels[row][to]);
      }
    }
  }
  __syncthreads();
}

// Merge the warps' results of one kind and write them as a partial. All warps have written sm.red, sm.max and sm.sum.
__device__ __forceinline__ void write_partial(const Params& p, const Segment& s, Shared& sm, int w, int lane, Kind kind) {
  __syncthreads();
  const int slot = blockIdx.x + s.head;
  for (int row = w; row < ROWS; row += WARPS) {
    float m = NEVER, sum = 0.f, o[LANE_FLOATS];
    #pragma unroll
    for (int k = 0; k < WARPS; k++) m = fmaxf(m, sm.max[k][row]);
    #pragma unroll
    for (int i = 0; i < LANE_FLOATS; i++) o[i] = 0.f;
    #pragma unroll
    for (int k = 0; k < WARPS; k++) {
      const float e = sm.max[k][row] > 0.5f * NEVER ? exp2_approx(sm.max[k][row] - m) : 0.f;
      sum = fmaf(e, sm.sum[k][row], sum);
      float v[LANE_FLOATS];
      load_lane<false>(&sm.red[k][row][lane * LANE_FLOATS], v);
      #pragma unroll
      for (int i = 0; i < LANE_FLOATS; i++) o[i] = fmaf(e, v[i], o[i]);
    }
    const float inverse = sum > 0.f ? 1.f / sum : 0.f;
    #pragma unroll
    for (int i = 0; i < LANE_FLOATS; i++) o[i] *= inverse;
    store_lane(p.partial + partial_row(slot, kind, row) * D + lane * LANE_FLOATS, o);
    if (lane == 0) p.partial_lse[partial_row(slot, kind, row)] = sum > 0.f ? m + log2_approx(sum) + (kind == RAW ? 0.f : sm.constant[row]) : NEVER;
  }
}

// Announce the segment's partials; whether they complete the head, whose CTAs are first .. last.
__device__ __forceinline__ bool close_segment(const Params& p, const Segment& s, Shared& sm, int first, int last) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    sm.last = first == last || atomicAdd(p.arrived + s.head, 1) == last - first;
    if (sm.last) p.arrived[s.head] = 0;                       // ready for the next launch
  }
  __syncthreads();
  const bool complete = sm.last;
  if (complete) __threadfence();
  return complete;
}

__device__ __forceinline__ void prefetch_l2(const void* from, int bytes) {
  for (int i = threadIdx.x * 128; i < bytes; i += THREADS * 128) asm volatile("prefetch.global.L2 [%0];" :: "l"((const u8*)from + i));
}
template <bool MATRIX, bool RESIDUAL, bool MEAN, bool NOISE>
__device__ __forceinline__ void prefetch_rotation(const Rotation& r, int b, int h, int bh) {
  if (MATRIX) prefetch_l2(r.matrix + b * r.stride_b + h * r.stride_h, D * D * 2);
  if (RESIDUAL) prefetch_l2(r.residual + b * r.stride_b + h * r.stride_h, D * D * 2);
  if (MEAN) prefetch_l2(r.mean + (i64)bh * D, D * 4);
  if (NOISE) prefetch_l2(r.noise + (i64)bh * D, D * 4);
}

// What a segment will read beside its tiles
__device__ __forceinline__ void prefetch_segment(const Params& p, const Segment& s) {
  const SetParams& set = p.sets[s.set];
  const int bh = s.b * set.heads + s.h;
#if HAS_TILES
  if (s.end > s.raw) {
    prefetch_rotation<keys::MATRIX, keys::RESIDUAL, keys::MEAN, keys::NOISE>(set.key, s.b, s.h, bh);
    prefetch_rotation<values::MATRIX, values::RESIDUAL, values::MEAN, values::NOISE>(set.value, s.b, s.h, bh);
  }
#endif
  if (s.begin < s.raw) {
    const int sink = set.sink_k ? set.lengths[s.b] : 0, tail = set.lengths[2 * p.batch + s.b], sink_blocks = raw_units(sink);
    constexpr int LINES = RAW_TOKENS * D * 2 / 128;           // of one unit's keys
    for (int i = threadIdx.x; i < (s.raw_end - s.begin) * LINES * 2; i += THREADS) {
      const int unit = s.begin + i / (LINES * 2), line = i % LINES, is_value = i / LINES & 1;
      const bool in_sink = unit < sink_blocks;
      const int t0 = (in_sink ? unit : unit - sink_blocks) * RAW_TOKENS, count = in_sink ? sink : tail;
      const u16* base = in_sink ? (is_value ? set.sink_v : set.sink_k) + s.b * set.sink_b + s.h * set.sink_h : (is_value ? set.tail_v : set.tail_k) + s.b * set.tail_b + s.h * set.tail_h;
      if (t0 + line * 64 / D < count) asm volatile("prefetch.global.L2 [%0];" :: "l"(base + (i64)t0 * D + line * 64));
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 memory[];
  const int w = threadIdx.x >> 5, lane = threadIdx.x & 31;
  Shared& sm = *(Shared*)(memory + (HAS_TILES ? WARPS * STAGES * TILE_BYTES : 0));
#if HAS_TILES
  const u32 stages = (u32)__cvta_generic_to_shared(memory) + w * STAGES * TILE_BYTES, barriers = (u32)__cvta_generic_to_shared(sm.barrier) + w * STAGES * 8;
  if (lane == 0) {
    #pragma unroll
    for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barriers + i * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
#endif
  if (w == 0) make_plan(p, sm.plan, lane);
  __syncthreads();
  const Plan& plan = sm.plan;
  const int entries = p.n_sets * p.batch, cta = blockIdx.x;
  const u32 share = plan.share;
  int pos, end, entry = 0, part = 0, parts = 0;
  if (plan.split) {
    while (entry + 1 < entries && plan.first_cta[entry + 1] <= cta) entry++;
    parts = plan.parts[entry];
    const int raw = plan.raw[entry], tiles = plan.tiles[entry];
    const u32 x = cta - plan.first_cta[entry], head = x / parts;
    part = x - head * parts;
    if (head >= p.sets[plan.set[entry]].heads * BLOCKS) return;
    // With many parts, those in front take the raw units alone: no CTA does one kind after the other
    int raw_parts = parts >= SEPARATE_PARTS && raw && tiles ? max(parts * raw / (raw + tiles), 1) : 0, skip = 0;
    if (raw_parts) {
      skip = (raw + raw_parts - 1) / (u32)raw_parts;          // raw units of a part
      raw_parts = (raw + skip - 1) / (u32)skip;
    }
    const int rest = raw + tiles - (raw_parts ? raw : 0), each = (rest + parts - raw_parts - 1) / (u32)(parts - raw_parts);
    parts = raw_parts + (rest + each - 1) / (u32)each;        // the others are empty
    pos = plan.start[entry] + head * (p.lead + raw + tiles) + p.lead;
    if (part < raw_parts) {
      end = pos + min((part + 1) * skip, raw);
      pos += part * skip;
    } else {
      const int first = raw_parts ? raw : 0;
      end = pos + min(first + (part - raw_parts + 1) * each, raw + tiles);
      pos += min(first + (part - raw_parts) * each, raw + tiles);
    }
  } else {
    pos = cta * share;
    end = min(pos + (int)share, plan.start[entries]);
  }
  if (pos >= end) return;
  Segment s = locate(plan, p.lead, pos, end, entry);
  prefetch_segment(p, s);                                     // ahead of the tiles in the memory's queues
#if HAS_TILES
  Prefetch next = {pos, end, 0, 0, 0, nullptr};
  if (lane == 0) {
    #pragma unroll 1
    for (int i = 0; i < STAGES; i++) fetch(p, plan, next, w, stages + i * TILE_BYTES, barriers + i * 8);
  }
  __syncwarp();
  int stage = 0, phase = 0;
#endif
  bool waits = false;                                         // sm.pending: a head that this CTA completed, but that can wait
  for (;;) {
    const int slot = cta + s.head;
    pos += s.length;
    entry = s.entry;
    const u32 start = pos - s.end;                            // the head's first unit
    const bool more = pos < end;
    bool complete = false;
    int first = 0, last = 0;
    if (s.end > 0) {
      if (s.begin < s.raw) {
        attend_raw(p, s, sm, w, lane);
        write_partial(p, s, sm, w, lane, RAW);
        if (s.end > s.raw) __syncthreads();
      } else if (threadIdx.x < ROWS) p.partial_lse[partial_row(slot, RAW, threadIdx.x)] = NEVER;
#if HAS_TILES
      if (s.end > s.raw) {
        rotate_query(p, s, sm, w, lane, QUERY_PEAK);
        Packed state;
        load_query(state, sm, lane);
        for (int tile = first_tile(s, w); tile < s.end - s.raw; tile += WARPS) {
          wait_barrier(barriers + stage * 8, phase);
          attend_tile(state, stages + stage * TILE_BYTES, lane);
          __syncwarp();
          if (lane == 0) fetch(p, plan, next, w, stages + stage * TILE_BYTES, barriers + stage * 8);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        store_state(state, sm, w, lane);
        write_partial(p, s, sm, w, lane, PACKED);
      } else
#endif
        if (threadIdx.x < ROWS) p.partial_lse[partial_row(slot, PACKED, threadIdx.x)] = NEVER;
      first = plan.split ? cta - part : start / share;
      last = plan.split ? first + parts - 1 : (start + s.raw + s.tiles - 1) / share;
      complete = close_segment(p, s, sm, first, last);
    }
    const bool later = complete && more && first != last;     // other CTAs may wait for this one's next segment
    if (later) {
      if (threadIdx.x == 0) { sm.pending = s; sm.pending_first = first; sm.pending_last = last; }
      waits = true;
    }
    Segment done = s;
    int from = first, to = last;
    for (bool go = complete && !later;; go = false) {
      if (!go) {
        if (more || !waits) break;
        waits = false;
        done = sm.pending; from = sm.pending_first; to = sm.pending_last;
      }
      finish_head(p, done, sm, w, lane, from, to);
    }
    if (!more) break;
    s = locate(plan, p.lead, pos, end, entry);
    prefetch_segment(p, s);
  }
}
