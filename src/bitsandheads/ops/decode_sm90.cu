// Decode attention on packed bits, for Hopper GPUs. docs/kernels.md explains the ideas; quant/planes.py and quant/tile.py are the layout's only definition.
// Longer than other files: NVRTC is given one text, and everything below shares the layout's constants.
//
// Two kernels; the second starts while the first still runs (programmatic dependent launch):
//   attend   rotates the queries of the heads whose tiles it reads, scales them to fit fp16 and lays them out as the fragments that it multiplies by; runs over
//            tiles and whole-precision tokens and writes partial results;
//   merge    merges the partial results of query rows in a fixed order (reruns are bit-identical), rotates back and writes output and lse.
//
// Work of attend is counted in *units*: one packed tile, or RAW_TOKENS whole-precision tokens. A *head* below is one (set, sequence, KV head, block of 8 query rows).
// If it balances, every head has CTAs of its own, or at least every head with more units than a CTA's share. The units of the other heads, whole-precision ones
// first in every head, form a line that is cut into equal stretches for the remaining CTAs, where every head begins with LEAD empty positions that stand for its
// fixed cost. Every CTA finds its part from the lengths: nothing is planned on the host. The part of one head that falls into one CTA is a *segment*; it gives two
// partial results (whole-precision tokens by channel, packed ones by axis) at slot = CTA + head (on the line: + all heads, so that no two are the same).
//
// MMA fragments below are those of mma.m16n8k16: lane = 4 * (row of A, column of B) + (pair of k): `i8` = lane / 4, `l4` = lane % 4.
//
// Generated in front of this file (cuda_decode.py): HEAD_DIM, MODEL_FP16, GROUP, N_QUERY, WARPS, STAGES, HAS_TILES, SHARED_BYTES, PARAMS_BYTES; of the layout FIELDS, GROUPS,
// META_FP8, CENTRE_RESIDUAL, TILE_BYTES, QUERY_PEAK, K_PAIRS and K_CENTRES; and the namespaces keys and values: byte offsets TWO, ONE, TRITS, STEPS, CENTRES, FACTORS; N_STEPS,
// N_CENTRES; word columns C2, C1, C3 (of trits) and slots per word E2, E1, E3; TOKEN_TOP, the largest code of values whose steps and centres belong to a token and 32 channels (0: to a
// channel and a group of tokens); which parts of a basis there are (MATRIX, RESIDUAL, ORDER, MEAN, NOISE); and tables.
// keys: of every *pair* of k-chunks (32 slots: a block of 32 word columns, one slot of each word) and l4 the lane's words and step (reads), first axis and weight (axis,
// weight; after the pairs: of the centres). values: of every run of 8 slots (two-bit ones, one-bit ones, trits) the axes' run, log2 of the weight and the run of the steps (run_axis, run_shift,
// run_step); of every run of axes the run of its centres (or -1), and whether it has slots (centre_run, coded).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

constexpr int ROWS = 8;                                       // query rows of a KV head that are served together (N of the MMA)
constexpr int BLOCKS = (GROUP * N_QUERY + ROWS - 1) / ROWS;   // blocks of query rows of a KV head
constexpr int D = HEAD_DIM, KV = D / 32, THREADS = WARPS * 32;
constexpr int MAX_SETS = 4, MAX_HEADS = 128, MAX_ENTRIES = 256;
constexpr int RAW_TOKENS = HAS_TILES ? 16 : 32;               // whole-precision tokens of a unit
constexpr int SEPARATE_PARTS = 8;                             // CTAs of a head from which whole-precision and packed units get CTAs of their own
constexpr int LARGE_PART = 64;                                // units of a CTA from which it counts that it has both kinds
constexpr int MIN_UNITS = 2;                                  // of a CTA, if there are as many
constexpr int LEAD = 8;                                       // what a head costs a CTA beside its units, in units
constexpr int MERGE_THREADS = 256, MERGE_WARPS = 8;
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
  float* partial;            // [slots, 2, ROWS, D], of attend
  float2* stats;             // [slots, 2, ROWS]: maximum (log2) and sum of a partial result
  int2* slots;               // [heads]: first slot of a head and number of slots
  int n_sets, batch, q_heads;
  float scale_log2, noise_log2;   // scale of the scores times log2(e); what packed scores are raised by for each (query axis)^2 * noise
};
static_assert(sizeof(Params) == PARAMS_BYTES, "cuda_decode.py passes the same bytes");

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
__device__ __forceinline__ float model_to_float(u16 v) { return MODEL_FP16 ? fp16_to_float(v) : bf16_low(v); }
__device__ __forceinline__ u16 to_model(float x) { return (u16)(MODEL_FP16 ? pack_fp16(x, 0.f) : pack_bf16(x, 0.f)); }
__device__ __forceinline__ u32 e4m3_to_fp16x2(u32 two) { u32 d; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(d) : "h"((u16)two)); return d; }
__device__ __forceinline__ u32 transpose8x8(u32 a) { u32 d; asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a)); return d; }
__device__ __forceinline__ uint4 lds128(u32 a) { uint4 v; asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a)); return v; }
__device__ __forceinline__ uint2 lds64(u32 a) { uint2 v; asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a)); return v; }
__device__ __forceinline__ u32 lds32(u32 a) { u32 v; asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a)); return v; }
__device__ __forceinline__ u16 lds16(u32 a) { u16 v; asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(a)); return v; }
__device__ __forceinline__ float lds_float(u32 a) { float v; asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(a)); return v; }
__device__ __forceinline__ void sts128(u32 a, u32 x, u32 y, u32 z, u32 w) { asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" :: "r"(a), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"); }
__device__ __forceinline__ void sts32(u32 a, u32 x) { asm volatile("st.shared.b32 [%0], %1;" :: "r"(a), "r"(x) : "memory"); }
__device__ __forceinline__ uint4 ldg128(const void* a) { uint4 v; asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(a)); return v; }
__device__ __forceinline__ void bulk_copy(u32 dst, const void* src, u32 bytes, u32 barrier) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
    :: "r"(dst), "l"(src), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void prefetch_line(const void* src) { asm volatile("prefetch.global.L2 [%0];" :: "l"(src)); }
__device__ __forceinline__ void prefetch_l2(const void* src, u32 bytes) { asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" :: "l"(src), "r"(bytes) : "memory"); }
__device__ __forceinline__ void wait_barrier(u32 barrier, u32 phase) {
  u32 done;
  do asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
  while (!done);
}
__device__ __forceinline__ void start_next_kernel() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ constexpr float power2(int n) { return n >= 0 ? (float)(1 << n) : 1.f / (float)(1 << -n); }
// Words of a 4 x 32-bit vector by a constant index
__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- the plan -------------------------------------------------------------------------------------------------------------------------------
struct Plan {                  // entry = (set, sequence)
  int raw[MAX_ENTRIES], tiles[MAX_ENTRIES];   // units of each of its heads
  int first_head[MAX_ENTRIES];
  int first_cta[MAX_ENTRIES], parts[MAX_ENTRIES];   // with CTAs of their own: the entry's first, and how many each head may have (0: it is on the line)
  int start[MAX_ENTRIES + 1];  // its first position on the line
  int line, share;             // first CTA of the line, positions of a CTA
  int heads;
};
struct Head { int set, b, h, block, number; };   // number: over the whole launch
struct Segment { Head head; int entry, slot, raw, tiles, begin, end, length; };   // raw, tiles: of the head; begin, end: units of the segment; length: positions

__device__ __forceinline__ int divide_up(int a, int b) { return (u32)(a + b - 1) / (u32)b; }
__device__ __forceinline__ int raw_units(int tokens) { return (tokens + RAW_TOKENS - 1) / RAW_TOKENS; }
__device__ __forceinline__ int prefix_sum(int x, int lane) {   // of the lanes up to this one
  #pragma unroll
  for (int o = 1; o < 32; o <<= 1) { const int n = __shfl_up_sync(ALL, x, o); if (lane >= o) x += n; }
  return x;
}

// CTAs of their own for the heads with more than a CTA's share of the units alone, if that balances: the others lie on the line; or else all do. Returns the positions of the line.
__device__ __forceinline__ int make_line(const Params& p, Plan& plan, int ctas, int lane, int units, int heads, int even, int limit, int& used) {
  const int entries = p.n_sets * p.batch;
  const auto own_of = [&](int e) { return plan.raw[e] + plan.tiles[e]; };
  const auto heads_of = [&](int e) { return p.sets[(u32)e / (u32)p.batch].heads * BLOCKS; };
  const auto small = [&](int e) { return ctas * own_of(e) < units; };
  int line = 0, line_heads = 0, longest = 0;
  #pragma unroll 1
  for (int e = lane; e < entries; e += 32)
    if (small(e)) { line += (LEAD + own_of(e)) * heads_of(e); line_heads += heads_of(e); }
  line = __reduce_add_sync(ALL, line);
  line_heads = __reduce_add_sync(ALL, line_heads);
  const u32 own_ctas = max(ctas - divide_up(line, even), 0), own_units = max(units - line + LEAD * line_heads, 1);
  const auto parts_of_head = [&](int e) { return max((int)(own_ctas * (u32)own_of(e) / own_units), 1); };
  used = 0;
  #pragma unroll 1
  for (int e = lane; e < entries; e += 32)
    if (!small(e)) { used += parts_of_head(e) * heads_of(e); longest = max(longest, divide_up(own_of(e), parts_of_head(e))); }
  used = __reduce_add_sync(ALL, used);
  const bool mixed = line_heads && line_heads < heads && used < ctas && __reduce_max_sync(ALL, longest) <= limit && line <= (ctas - used) * limit;
  used = line = 0;
  #pragma unroll 1
  for (int e0 = 0; e0 < entries; e0 += 32) {
    const int e = e0 + lane;
    int mine = 0, positions = 0;
    if (e < entries) {
      plan.parts[e] = mixed && !small(e) ? parts_of_head(e) : 0;
      mine = plan.parts[e] * heads_of(e);
      positions = mine ? 0 : (LEAD + own_of(e)) * heads_of(e);
    }
    const int sum = prefix_sum(mine, lane), place = prefix_sum(positions, lane);
    if (e < entries) {
      plan.first_cta[e] = used + sum - mine;
      plan.start[e] = line + place - positions;
    }
    used += __shfl_sync(ALL, sum, 31);
    line += __shfl_sync(ALL, place, 31);
  }
  return line;
}

__device__ __forceinline__ void make_plan(const Params& p, Plan& plan, int ctas, int lane) {   // one warp
  const int entries = p.n_sets * p.batch;
  int total, units = 0, heads = 0;                        // positions, units and heads of the entries so far
  for (int e0 = 0; e0 < entries; e0 += 32) {
    const int e = e0 + lane;
    int raw = 0, tiles = 0, own = 0;
    if (e < entries) {
      const int s = (u32)e / (u32)p.batch;
      const int* len = p.sets[s].lengths + (e - s * p.batch);
      const int sink = p.sets[s].sink_k ? len[0] : 0;
      tiles = p.sets[s].tiles ? len[p.batch] : 0;
      raw = max(raw_units(sink) + raw_units(len[2 * p.batch]), tiles ? 0 : 1);   // an empty head has one masked unit, so that its output is written
      own = p.sets[s].heads * BLOCKS;
      plan.tiles[e] = tiles;
      plan.raw[e] = raw;
    }
    const int sum = prefix_sum((raw + tiles) * own, lane), before = prefix_sum(own, lane);
    if (e < entries) {
      plan.first_head[e] = heads + before - own;
      plan.start[e] = units + sum - (raw + tiles) * own + LEAD * plan.first_head[e];
    }
    units += __shfl_sync(ALL, sum, 31);
    heads += __shfl_sync(ALL, before, 31);
  }
  total = units + LEAD * heads;
  const int even = max(divide_up(total, ctas), MIN_UNITS), limit = even + even / 16 + LEAD / 2;   // a line gives some CTAs parts of two heads
  // CTAs of its own for every head, in proportion to its units
  int used = 0, longest = 0;
  for (int e0 = 0; e0 < entries; e0 += 32) {
    const int e = e0 + lane;
    int mine = 0, longer = 0;
    if (e < entries) {
      const int own = plan.raw[e] + plan.tiles[e], parts = max(min((int)((u32)ctas * (u32)own / (u32)units), divide_up(own, MIN_UNITS)), 1);
      plan.parts[e] = parts;
      longer = divide_up(own, parts);
      mine = parts * p.sets[(u32)e / (u32)p.batch].heads * BLOCKS;
    }
    const int sum = prefix_sum(mine, lane);
    if (e < entries) plan.first_cta[e] = used + sum - mine;
    used += __shfl_sync(ALL, sum, 31);
    longest = max(longest, __reduce_max_sync(ALL, longer));
  }
  if (used <= ctas && longest <= limit) total = 0;            // nothing is left for the line
  else total = make_line(p, plan, ctas, lane, units, heads, even, limit, used);
  if (lane == 0) {
    plan.start[entries] = total;
    plan.line = used;
    plan.share = max(divide_up(total, max(ctas - used, 1)), MIN_UNITS);
    plan.heads = heads;
  }
}

// How the units of a head are dealt to CTAs of its own: with many, those in front take the whole-precision units alone, and no CTA does one kind after the other.
// A large one with both kinds counts LEAD units more.
struct Parts { int count, raw, raw_each, each, lead; };       // CTAs; of them with whole-precision units alone; units of such a one and of another; what the first of the others counts more
__device__ __forceinline__ Parts parts_of(int raw, int tiles, int parts) {
  Parts x = {0, 0, 0, 0, 0};
  if (parts >= SEPARATE_PARTS && raw && tiles) {
    x.raw_each = divide_up(raw, max((u32)(parts * raw) / (u32)(raw + tiles), 1u));
    x.raw = divide_up(raw, x.raw_each);
    if (divide_up(tiles, parts - x.raw) > divide_up(raw + tiles, parts) + LEAD) x.raw = 0;
  }
  const int rest = (x.raw ? 0 : raw) + tiles, both = !x.raw && raw && tiles && rest >= parts * LARGE_PART ? LEAD : 0;
  x.each = divide_up(rest + both, parts - x.raw);
  x.lead = min(both, x.each - 1);
  x.count = x.raw + divide_up(rest + x.lead, x.each);
  return x;
}
__device__ __forceinline__ int slot_of(const Plan& plan, int cta, int head) { return cta + head + (cta < plan.line ? 0 : plan.heads); }
// A segment of head hb of an entry: `length` positions from `within` on, where the first LEAD positions stand for the head's fixed cost
__device__ __forceinline__ Segment segment(const Params& p, const Plan& plan, int entry, int hb, int within, int length) {
  Segment s;
  s.entry = entry;
  s.head.set = (u32)entry / (u32)p.batch;
  s.head.b = entry - s.head.set * p.batch;
  s.head.h = hb / BLOCKS;
  s.head.block = hb - s.head.h * BLOCKS;
  s.head.number = plan.first_head[entry] + hb;
  s.slot = slot_of(plan, blockIdx.x, s.head.number);
  s.raw = plan.raw[entry];
  s.tiles = plan.tiles[entry];
  s.length = length;
  s.begin = max(within - LEAD, 0);
  s.end = within + length - LEAD;                             // at most 0: nothing but the head's fixed cost
  return s;
}
// The segment at position pos of the line, up to `end` at most; `entry` is where the search begins.
__device__ __forceinline__ Segment locate(const Params& p, const Plan& plan, int pos, int end, int entry) {
  while (plan.start[entry + 1] <= pos) entry++;
  const int span = LEAD + plan.raw[entry] + plan.tiles[entry], hb = (u32)(pos - plan.start[entry]) / (u32)span, within = pos - plan.start[entry] - hb * span;
  return segment(p, plan, entry, hb, within, min(span - within, end - pos));
}
// The slots of a head's partial results.
__device__ __forceinline__ int2 slots_of(const Plan& plan, int entry, int hb) {
  const int raw = plan.raw[entry], tiles = plan.tiles[entry], parts = plan.parts[entry];
  const int start = plan.start[entry] + hb * (LEAD + raw + tiles) + LEAD, on_line = (u32)start / (u32)plan.share;
  const int first = parts ? plan.first_cta[entry] + hb * parts : plan.line + on_line;
  const int count = parts ? parts_of(raw, tiles, parts).count : (int)((u32)(start + raw + tiles - 1) / (u32)plan.share) - on_line + 1;
  return make_int2(slot_of(plan, first, plan.first_head[entry] + hb), count);
}

__device__ __forceinline__ Head head_of(const Params& p, int number) {   // without a line
  Head head;
  head.number = number;
  head.set = 0;
  while (head.set + 1 < p.n_sets && number >= p.sets[head.set].heads * p.batch * BLOCKS) number -= p.sets[head.set++].heads * p.batch * BLOCKS;
  const u32 heads = p.sets[head.set].heads * BLOCKS, b = (u32)number / heads, hb = number - b * heads;
  head.b = b;
  head.h = hb / BLOCKS;
  head.block = hb - head.h * BLOCKS;
  return head;
}
// Query row `row` of a head: its query head and token; false: there is none
__device__ __forceinline__ bool query_row(const Params& p, const Head& head, int row, int& q_head, int& token) {
  const int r = head.block * ROWS + row;
  token = r % N_QUERY;
  q_head = p.sets[head.set].kv_heads[head.h] * GROUP + r / N_QUERY;
  return r < GROUP * N_QUERY;
}
__device__ __forceinline__ const u16* query(const Params& p, const Head& head, int q_head, int token) { return p.q + head.b * p.q_b + q_head * p.q_h + token * p.q_t; }

// ---- shared memory of attend ----------------------------------------------------------------------------------------------------------------
#if HAS_TILES
constexpr int HEAD_FRAGMENTS = (K_PAIRS + K_CENTRES * (CENTRE_RESIDUAL ? 2 : 1)) * 512;
constexpr bool PER_TOKEN = values::TOKEN_TOP > 0;
constexpr int VALUE_GROUPS = PER_TOKEN ? 1 : GROUPS;
constexpr int TOKENS = FIELDS * 16, TOKEN_ROW = (TOKENS + 16) * 2;   // bytes of a block's steps or centres for each token: no bank conflicts
constexpr int KEY_NUMBERS = GROUPS * (keys::N_STEPS + keys::N_CENTRES), VALUE_NUMBERS = VALUE_GROUPS * (values::N_STEPS + values::N_CENTRES);
constexpr int NUMBERS_BYTES = (META_FP8 ? KEY_NUMBERS * 2 : 0) + (PER_TOKEN ? VALUE_NUMBERS / TOKENS * TOKEN_ROW : VALUE_NUMBERS * 4);
constexpr int TRIT_WORDS = values::C3 * 16, TRIT_UNIT = 10;   // words of trits; words of 16 bytes
constexpr int DECODED_BYTES = NUMBERS_BYTES + (TRIT_WORDS + TRIT_UNIT - 1) / TRIT_UNIT * TRIT_UNIT * 2;
static_assert(NUMBERS_BYTES % 16 == 0, "words of trits begin at 16 bytes");
#else
constexpr int DECODED_BYTES = 16, HEAD_FRAGMENTS = 16;
#endif
// The tiles that a warp will read, over all segments of the CTA, in order: its copies run ahead of the arithmetic, across the segments' borders.
struct Prefetch {
  int pos, end, entry, tile, stop;
  const u8* base;
};
union WarpShared {
  float red[ROWS][ROW];               // the warp's partial result, at the end of a segment
  __align__(16) u8 decoded[DECODED_BYTES];   // of the tile in work: steps and centres of the keys as fp16 (if they are fp8), of the values as float32, or for each token as fp16; words of trits
};
struct Shared {
  __align__(16) u8 head[HEAD_FRAGMENTS];   // the query of the head in work as operand B, weights of the slots folded in; for the centres as it is
  WarpShared warp[WARPS];
  float max[WARPS][ROWS], sum[WARPS][ROWS];
  float row_scale[ROWS], constant[ROWS];   // of the query rows: what undoes their scaling, times the scale of the scores; what is added to their scores
  unsigned long long barrier[WARPS * STAGES];
  Prefetch next[WARPS];
  Plan plan;
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "cuda_decode.py counts at least as many bytes");

// ---- whole-precision tokens -----------------------------------------------------------------------------------------------------------------
// Rows of 16 bytes that lie as [k][channel] as operand A, whose rows are channels: byte permutes transpose. rows[half][i]: 8 channels from half * 64 + i8 * 8 of k = 2 l4 + (i & 1) + 8 (i >> 1).
constexpr int HALVES = D / 64;
template <class Mma>
__device__ __forceinline__ void multiply_transposed(const uint4 (&rows)[HALVES][4], Mma mma) {
  #pragma unroll
  for (int j = 0; j < D / 16; j++) {
    const int jh = HALVES == 2 ? j : j + 4;
    const u32 sel = j & 1 ? 0x7632 : 0x5410;
    const u32 a0 = __byte_perm(word(rows[0][0], j >> 1), word(rows[0][1], j >> 1), sel), a1 = __byte_perm(word(rows[HALVES - 1][0], jh >> 1), word(rows[HALVES - 1][1], jh >> 1), sel);
    const u32 a2 = __byte_perm(word(rows[0][2], j >> 1), word(rows[0][3], j >> 1), sel), a3 = __byte_perm(word(rows[HALVES - 1][2], jh >> 1), word(rows[HALVES - 1][3], jh >> 1), sel);
    mma(j, a0, a1, a2, a3);
  }
}
// acc[j]: channels i8 * 8 + j and (D = 128) + 64 or (D = 64) + 4 of the query rows 2 l4, 2 l4 + 1
__device__ __forceinline__ void store_transposed(const float (&acc)[D / 16][4], WarpShared& to, int i8, int l4) {
  #pragma unroll
  for (int row = 0; row < 2; row++)
    #pragma unroll
    for (int half = 0; half < HALVES; half++)
      #pragma unroll
      for (int v = 0; v < 2; v++) {
        const int j = HALVES == 2 ? 4 * v : 0, c = row + 2 * (HALVES == 2 ? half : v);
        *(float4*)&to.red[2 * l4 + row][half * 64 + i8 * 8 + v * 4] = make_float4(acc[j][c], acc[j + 1][c], acc[j + 2][c], acc[j + 3][c]);
      }
}

// A warp attends to 16 tokens of its unit at a time. Keys are operand A as they lie (8 channels of a lane are two k-chunks); values are transposed by byte permutes.
__device__ __forceinline__ void attend_raw(const Params& p, const Segment& s, Shared& sm, int w, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  const SetParams& set = p.sets[s.head.set];
  const int b = s.head.b, h = s.head.h;
  u32 q[KV][4];
  int back0 = 0, back1 = 0;
  {
    int head, token;
    const bool ok = query_row(p, s.head, i8, head, token);
    const u16* src = query(p, s.head, head, token);
    #pragma unroll
    for (int c = 0; c < KV; c++) {
      const uint4 v = ok ? ldg128(src + c * 32 + l4 * 8) : make_uint4(0, 0, 0, 0);
      q[c][0] = v.x; q[c][1] = v.y; q[c][2] = v.z; q[c][3] = v.w;
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
      query_row(p, s.head, l4 * 2 + i, head, token);
      const int back = p.hidden ? (int)p.hidden[b * N_QUERY + token] : N_QUERY - 1 - token;
      (i ? back1 : back0) = back;
    }
  }
  const int sink = set.sink_k ? set.lengths[b] : 0, tail = set.lengths[2 * p.batch + b], sink_blocks = raw_units(sink);
  float m0 = NEVER, m1 = NEVER, l0 = 0.f, l1 = 0.f, acc[D / 16][4];
  #pragma unroll
  for (int i = 0; i < D / 16; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;
  const int last = min(s.end, s.raw);
  for (int i = 0, unit = s.begin + w; unit < last; ++i == RAW_TOKENS / 16 ? i = 0, unit += WARPS : 0) {   // i: 16 tokens of a unit
    const bool in_sink = unit < sink_blocks;
    const int t0 = (in_sink ? unit : unit - sink_blocks) * RAW_TOKENS + i * 16, count = in_sink ? sink : tail;
    const u16* k = in_sink ? set.sink_k + b * set.sink_b + h * set.sink_h : set.tail_k + b * set.tail_b + h * set.tail_h;
    const u16* v = in_sink ? set.sink_v + b * set.sink_b + h * set.sink_h : set.tail_v + b * set.tail_b + h * set.tail_h;
    const int top = max(count - 1, 0);
    if (t0 >= count) continue;
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
    multiply_transposed(vv, [&](int j, u32 x0, u32 x1, u32 x2, u32 x3) {
      mma_model(acc[j], x0, x1, x2, x3, b0, b1);
      if (!MODEL_FP16) mma_model(acc[j], x0, x1, x2, x3, r0, r1);
    });
  }
  #pragma unroll
  for (int o = 4; o < 32; o <<= 1) { l0 += __shfl_xor_sync(ALL, l0, o); l1 += __shfl_xor_sync(ALL, l1, o); }
  store_transposed(acc, sm.warp[w], i8, l4);
  if (i8 == 0) { sm.max[w][l4 * 2] = m0; sm.max[w][l4 * 2 + 1] = m1; sm.sum[w][l4 * 2] = l0; sm.sum[w][l4 * 2 + 1] = l1; }
}

#if HAS_TILES
// ---- packed tiles ---------------------------------------------------------------------------------------------------------------------------
constexpr int FIELD_BITS = 16 / FIELDS;                       // bits of a word that one field of 16 tokens takes
constexpr int DIRECT = 11 / FIELD_BITS;                       // fields whose masked words are fp16 subnormals or the first binade: n * 2^-24 with n < 2^11
constexpr int UPPER_SHIFT = DIRECT * FIELD_BITS;              // the other fields are shifted down by this
constexpr int GROUP_FIELDS = FIELDS / GROUPS;
constexpr float SUBNORMAL = 16777216.f;                       // 2^24
constexpr float TOP_SHIFT = 11.f;                             // P is 2^(11 - bit) * 2^score, and code * P = 2^-13 of its value; scores may exceed the maximum in use by 2^4
constexpr float P_SHIFT = 13.f;
constexpr float FINITE = 1e30f;
constexpr int META = META_FP8 ? 1 : 2;                        // bytes of a step or centre
constexpr u32 ONES = 0x3c003c00u;                             // fp16 1, 1

__device__ __forceinline__ constexpr int field_bit(int f) { return (f < DIRECT ? f : f - DIRECT) * FIELD_BITS; }
__device__ __forceinline__ constexpr int blocks32(int columns) { return (columns + 31) / 32; }
__device__ __forceinline__ constexpr int tiles16(int columns) { return (columns + 15) / 16; }

constexpr int K_BLOCKS2 = blocks32(keys::C2), K_BLOCKS1 = blocks32(keys::C1);
constexpr int K_BLOCKS = K_BLOCKS2 + K_BLOCKS1;               // blocks of 32 word columns of the key planes

// block of 32 columns -> its plane and what follows from it
__device__ __forceinline__ constexpr bool is_two(int block) { return block < K_BLOCKS2; }
__device__ __forceinline__ constexpr int plane_slots(int block) { return is_two(block) ? keys::E2 : keys::E1; }
__device__ __forceinline__ constexpr int pair_index(int block, int e) { return is_two(block) ? block * keys::E2 + e : K_BLOCKS2 * keys::E2 + (block - K_BLOCKS2) * keys::E1 + e; }
constexpr int MOST_SLOTS = keys::E2 > keys::E1 ? keys::E2 : keys::E1;
__device__ __forceinline__ constexpr int row_bytes(int block) {   // of 32, 16 or 8 words
  const int columns = is_two(block) ? keys::C2 : keys::C1;
  return columns % 32 == 0 ? 64 : columns % 16 == 0 ? 32 : 16;
}

__device__ __forceinline__ void four_fp16x2(u32 address, u32* out) {   // 8 stored steps or centres -> fp16 pairs
  if (META_FP8) {
    const uint2 v = lds64(address);
    out[0] = e4m3_to_fp16x2(v.x); out[1] = e4m3_to_fp16x2(v.x >> 16); out[2] = e4m3_to_fp16x2(v.y); out[3] = e4m3_to_fp16x2(v.y >> 16);
  } else {
    const uint4 v = lds128(address);
    out[0] = v.x; out[1] = v.y; out[2] = v.z; out[3] = v.w;
  }
}

// Steps and centres of the tile, 8 for each lane: of the keys to fp16 (fp8 only), of the values to float32 with their factors.
__device__ __forceinline__ void decode_metadata(u32 tile, u32 decoded, int lane) {
  if (META_FP8) {
    #pragma unroll
    for (int i0 = 0; i0 < KEY_NUMBERS; i0 += 256) {
      const int i = i0 + lane * 8;
      if (i < KEY_NUMBERS) {
        u32 x[4];
        four_fp16x2(tile + (i < GROUPS * keys::N_STEPS ? keys::STEPS + i : keys::CENTRES + i - GROUPS * keys::N_STEPS), x);
        sts128(decoded + i * 2, x[0], x[1], x[2], x[3]);
      }
    }
    decoded += KEY_NUMBERS * 2;
  }
  #pragma unroll
  for (int i0 = 0; i0 < VALUE_NUMBERS && !PER_TOKEN; i0 += 256) {
    const int i = i0 + lane * 8, j = i - GROUPS * values::N_STEPS;
    const bool centre = j >= 0;
    if (i < VALUE_NUMBERS) {
      u32 x[4], y[8];
      four_fp16x2(tile + (centre ? values::CENTRES + j * META : values::STEPS + i * META), x);
      const int g = GROUPS == 1 ? 0 : centre ? j / max(values::N_CENTRES, 1) : i / values::N_STEPS;
      const float factor = META_FP8 ? fp16_to_float(lds16(tile + values::FACTORS + g * 4 + (centre ? 2 : 0))) : 1.f;
      #pragma unroll
      for (int k = 0; k < 8; k++) y[k] = __float_as_uint(fp16_to_float((u16)(x[k / 2] >> (k & 1) * 16)) * factor);
      sts128(decoded + i * 4, y[0], y[1], y[2], y[3]);
      sts128(decoded + i * 4 + 16, y[4], y[5], y[6], y[7]);
    }
  }
  __syncwarp();
}

// Steps or centres of the values for each token and block of 32 channels -> fp16 [block][token], divided by a power of two so that all are below 1: times a probability they fit fp16.
// Returns what undoes that.
__device__ __forceinline__ float decode_token_numbers(u32 from, u32 to, int lane) {
  constexpr int NUMBERS = TOKENS * KV, ROUNDS = (NUMBERS + 255) / 256;   // of them 8 for each lane
  u32 x[ROUNDS][4], largest = 0;
  #pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    x[r][0] = x[r][1] = x[r][2] = x[r][3] = 0;
    if (r * 256 + lane * 8 < NUMBERS) four_fp16x2(from + (r * 256 + lane * 8) * META, x[r]);
    #pragma unroll
    for (int k = 0; k < 4; k++) largest = max(largest, max(x[r][k] & 0x7fff, x[r][k] >> 16 & 0x7fff));
  }
  const int exponent = __reduce_max_sync(ALL, largest) >> 10;
  const u32 divide = (exponent < 29 ? 29 - exponent << 10 : 0x200 >> exponent - 29) * 0x10001;   // fp16 2^(14 - exponent), twice
  #pragma unroll
  for (int r = 0; r < ROUNDS; r++) {
    const int token = (r * 256 + lane * 8) / KV;
    #pragma unroll
    for (int k = 0; k < 4; k++) x[r][k] = mul_fp16x2(x[r][k], divide);
    if (token < TOKENS)
      #pragma unroll
      for (int pair = 0; pair < 4 / KV; pair++)
        #pragma unroll
        for (int b = 0; b < KV; b++)
          sts32(to + b * TOKEN_ROW + (token + 2 * pair) * 2, __byte_perm(x[r][(2 * pair * KV + b) / 2], x[r][((2 * pair + 1) * KV + b) / 2], b & 1 ? 0x7632 : 0x5410));
  }
  return __uint_as_float((u32)(127 + exponent - 14) << 23);
}

// Two bytes of trits, each in 16 bits, as five two-bit codes each: byte + q_1 + 4 q_2 + 16 q_3 + 64 q_4 with q_n = byte / 3^n (quant/planes.py).
__device__ __forceinline__ u32 codes_of_trits(u32 bytes) {
  const u32 q1 = bytes * 171 >> 9 & 0x007f007f, q2 = bytes * 57 >> 9 & 0x001f001f, q3 = bytes * 19 >> 9 & 0x000f000f, q4 = bytes * 203 >> 14 & 0x00030003;
  return bytes + q1 + q2 * 4 + q3 * 16 + q4 * 64;
}
// Trits of the values -> words of a two-bit plane.
__device__ __forceinline__ void decode_trits(u32 tile, u32 words, int lane) {
  #pragma unroll 1
  for (int unit = lane; unit * TRIT_UNIT < TRIT_WORDS; unit += 32) {
    const uint4 bytes = lds128(tile + values::TRITS + unit * 16);
    u32 twenty[8];                                            // codes of two neighbouring bytes
    #pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 x = word(bytes, i), even = codes_of_trits(x & 0x00ff00ff), odd = codes_of_trits(x >> 8 & 0x00ff00ff);
      twenty[2 * i] = (even & 0xffff) | odd << 10 & 0xffc00;
      twenty[2 * i + 1] = even >> 16 | odd >> 16 << 10;
    }
    const u32 to = words + unit * TRIT_UNIT * 2;
    sts32(to, twenty[0] | twenty[1] << 20);
    sts32(to + 4, twenty[1] >> 12 | twenty[2] << 8 | twenty[3] << 28);
    sts32(to + 8, twenty[3] >> 4 | twenty[4] << 16);
    sts32(to + 12, twenty[4] >> 16 | twenty[5] << 4 | twenty[6] << 24);
    sts32(to + 16, twenty[6] >> 8 | twenty[7] << 12);
  }
  __syncwarp();
}

// The queries of a head, rotated, as fragments in shared memory: all warps. Its own loads go first, then those that `meanwhile` starts. A row is scaled so that its largest entry is QUERY_PEAK: times the weight of a slot and the
// largest step it fits fp16. The constant (q . mean, correction for noise) is added to the maximum of the packed part.
template <class Start>
__device__ __forceinline__ void prepare_head(const Params& p, const Segment& s, Shared& sm, int w, int lane, Start meanwhile) {
  constexpr int CHUNKS = D / 16, PRODUCTS = WARPS < CHUNKS ? WARPS : CHUNKS, WARP_ROWS = (ROWS + WARPS - 1) / WARPS;   // a warp: 16 channels of all rows, then rows
  const int i8 = lane >> 2, l4 = lane & 3;
  const SetParams& set = p.sets[s.head.set];
  const Rotation& rot = set.key;
  const i64 channels = ((i64)s.head.b * set.heads + s.head.h) * D;
  const auto query_at = [&](const u16* from, bool ok, int channel) -> u32 { return ok ? from[keys::ORDER ? rot.order[channels + channel] : channel] : 0; };
  u32 q[WARP_ROWS][KV];
  float mean[KV], noise[KV];
  if (w < ROWS) {                                             // in flight together with the matrix
    #pragma unroll
    for (int r = 0; r < WARP_ROWS; r++) {
      int head, token;
      const bool ok = query_row(p, s.head, w + r * WARPS, head, token);
      #pragma unroll
      for (int i = 0; i < KV; i++) q[r][i] = query_at(query(p, s.head, head, token), ok, lane + 32 * i);
    }
    #pragma unroll
    for (int i = 0; i < KV; i++) {
      mean[i] = keys::MEAN ? rot.mean[channels + lane + 32 * i] : 0.f;
      noise[i] = keys::NOISE ? rot.noise[channels + lane + 32 * i] : 0.f;
    }
  }
  if (!keys::MATRIX || w >= CHUNKS) meanwhile();
  else {
    float y[D / 16][4];
    #pragma unroll
    for (int j = 0; j < D / 16; j++) y[j][0] = y[j][1] = y[j][2] = y[j][3] = 0.f;
    int head, token;
    const bool ok = query_row(p, s.head, i8, head, token);
    const u16* from = query(p, s.head, head, token);
    #pragma unroll 1
    for (int chunk = w; chunk < CHUNKS; chunk += WARPS)
      #pragma unroll
      for (int pass = 0; pass < (keys::RESIDUAL ? 2 : 1); pass++) {
        const u16* matrix = (pass ? rot.residual : rot.matrix) + s.head.b * rot.stride_b + s.head.h * rot.stride_h;
        uint4 rows[HALVES][4];
        #pragma unroll
        for (int half = 0; half < HALVES; half++)
          #pragma unroll
          for (int i = 0; i < 4; i++) rows[half][i] = ldg128(matrix + (chunk * 16 + l4 * 2 + (i & 1) + (i >> 1) * 8) * D + half * 64 + i8 * 8);
        u32 high[2], low[2];                                  // bf16 queries are exact, fp16 ones as two bf16 numbers
        #pragma unroll
        for (int i = 0; i < 2; i++) {
          const int c = chunk * 16 + l4 * 2 + i * 8;
          const u32 x = query_at(from, ok, c), x1 = query_at(from, ok, c + 1);
          high[i] = x | x1 << 16;
          if (MODEL_FP16) {
            const float f = fp16_to_float(x), f1 = fp16_to_float(x1);
            high[i] = pack_bf16(f, f1);
            low[i] = pack_bf16(f - bf16_low(high[i]), f1 - bf16_high(high[i]));
          }
        }
        if (chunk == w && pass == 0) meanwhile();
        multiply_transposed(rows, [&](int j, u32 a0, u32 a1, u32 a2, u32 a3) {
          mma_bf16(y[j], a0, a1, a2, a3, high[0], high[1]);
          if (MODEL_FP16) mma_bf16(y[j], a0, a1, a2, a3, low[0], low[1]);
        });
      }
    store_transposed(y, sm.warp[w], i8, l4);
  }
  __syncthreads();
  #pragma unroll
  for (int r = 0; r < WARP_ROWS; r++) {
    const int row = w + r * WARPS;
    if (row >= ROWS) break;
    float y[KV], biggest = 0.f, raised = 0.f, constant = 0.f;
    #pragma unroll
    for (int i = 0; i < KV; i++) {
      const float x = model_to_float((u16)q[r][i]);
      y[i] = keys::MATRIX ? 0.f : x;
      #pragma unroll
      for (int k = 0; k < PRODUCTS && keys::MATRIX; k++) y[i] += sm.warp[k].red[row][lane + 32 * i];
      biggest = fmaxf(biggest, fabsf(y[i]));
      raised = fmaf(y[i] * y[i], noise[i], raised);
      constant = fmaf(x, mean[i], constant);
    }
    #pragma unroll
    for (int o = 16; o; o >>= 1) {
      biggest = fmaxf(biggest, __shfl_xor_sync(ALL, biggest, o));
      raised += __shfl_xor_sync(ALL, raised, o);
      constant += __shfl_xor_sync(ALL, constant, o);
    }
    const float inverse = biggest > 0.f ? QUERY_PEAK / biggest : 0.f;
    #pragma unroll
    for (int i = 0; i < KV; i++) sm.warp[0].red[row][lane + 32 * i] = y[i] * inverse;   // no other thread has read this place
    if (lane == 0) {
      sm.row_scale[row] = biggest / QUERY_PEAK * p.scale_log2;
      sm.constant[row] = constant * p.scale_log2 + raised * p.noise_log2;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < (K_PAIRS + K_CENTRES) * 32; i += THREADS) {   // 8 slots of a row
    const int item = i / 32;
    const float* from = &sm.warp[0].red[lane / 4][keys::axis[item * 4 + l4]];
    const float weight = keys::weight[item * 4 + l4];
    u32 high[4], low[4];
    #pragma unroll
    for (int k = 0; k < 4; k++) {
      const float x = from[2 * k] * weight, y = from[2 * k + 1] * weight;
      high[k] = pack_fp16(x, y);
      low[k] = pack_fp16(x - fp16_to_float(high[k]), y - fp16_to_float(high[k] >> 16));
    }
    uint4* to = (uint4*)sm.head + i;
    *to = make_uint4(high[0], high[1], high[2], high[3]);
    if (CENTRE_RESIDUAL && item >= K_PAIRS) to[K_CENTRES * 32] = make_uint4(low[0], low[1], low[2], low[3]);
  }
  __syncthreads();
}

struct Packed {                       // a warp's state over the packed tiles of a segment
  float m0, m1, l0, l1;               // lane's query rows 2 l4, 2 l4 + 1: maximum (log2) and sum
  bool first;
  float acc[D / 8][2];                // [run of 8 axes][row]: axis 8 run + i8
  float bias[2];                      // [row], PER_TOKEN: what all axes of block i8 % 4 get, of its steps (i8 < 4) or centres
  u32 head;                           // the lane's part of the query's fragments in shared memory
  float s0, s1;                       // what undoes the scaling of the rows, times the scale of the scores
  u32 reads[K_PAIRS];                 // of the lane: byte offset of its words in a tile, number of its step << 16
};

__device__ __forceinline__ void start_head(const Shared& sm, Packed& st, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3, row = ((i8 >> 1) << 2) + (i8 & 1);
  st.head = (u32)__cvta_generic_to_shared(sm.head) + lane * 16;
  st.s0 = sm.row_scale[2 * l4]; st.s1 = sm.row_scale[2 * l4 + 1];
  #pragma unroll
  for (int block = 0; block < K_BLOCKS; block++)
    #pragma unroll
    for (int e = 0; e < plane_slots(block); e++) st.reads[pair_index(block, e)] = keys::reads[pair_index(block, e) * 4 + l4] + row * row_bytes(block);
  st.m0 = st.m1 = st.l0 = st.l1 = 0.f;
  st.first = true;
  st.bias[0] = st.bias[1] = 0.f;
  #pragma unroll
  for (int i = 0; i < D / 8; i++) st.acc[i][0] = st.acc[i][1] = 0.f;
}

// Sums of the tile's tokens: s[f] is the C fragment of field f (rows: tokens, columns: query rows); scores in log2 units are s * slope * 2^-bit + offset.
__device__ __forceinline__ void tile_scores(const Packed& st, u32 tile, u32 decoded, int l4, float (&s)[FIELDS][4], float (&slope)[GROUPS][2], float (&offset)[GROUPS][2]) {
  const u32 steps = META_FP8 ? decoded : tile + keys::STEPS, centres = META_FP8 ? decoded + GROUPS * keys::N_STEPS * 2 : tile + keys::CENTRES;
  uint4 lo[K_BLOCKS], hi[K_BLOCKS];
  #pragma unroll
  for (int block = 0; block < K_BLOCKS; block++) {
    const u32 words = tile + (st.reads[pair_index(block, 0)] & 0xffff);
    lo[block] = lds128(words);
    hi[block] = lds128(words + 2 * row_bytes(block));         // the MMA's rows i8 and i8 + 8 are two rows apart
  }
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) s[f][0] = s[f][1] = s[f][2] = s[f][3] = 0.f;
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    u32 qs[K_PAIRS][4];
    float half = 0.f, half1 = 0.f, centre[2][4] = {};          // half: sums of q * step * top / 2
    float sums[2][MOST_SLOTS][4] = {};                        // of q * step for each plane and slot of a word
    #pragma unroll
    for (int block = 0; block < K_BLOCKS; block++)
      #pragma unroll
      for (int e = 0; e < plane_slots(block); e++) {
        const int pair = pair_index(block, e);
        const uint4 q = lds128(st.head + pair * 512), step = lds128(steps + g * keys::N_STEPS * 2 + (st.reads[pair] >> 16) * 2);
        #pragma unroll
        for (int i = 0; i < 4; i++) qs[pair][i] = mul_fp16x2(word(q, i), word(step, i));
        #pragma unroll
        for (int j = 0; j < 2; j++) mma_fp16(sums[is_two(block)][e], ONES, ONES, ONES, ONES, qs[pair][2 * j], qs[pair][2 * j + 1]);
      }
    #pragma unroll
    for (int e = 0; e < MOST_SLOTS; e++) {
      const float two = 1.5f * power2(2 * e), one = 0.5f * power2(e);   // the query was divided by 2^(e bits)
      half = fmaf(sums[1][e][0], two, fmaf(sums[0][e][0], one, half));
      half1 = fmaf(sums[1][e][1], two, fmaf(sums[0][e][1], one, half1));
    }
    #pragma unroll
    for (int c = 0; c < K_CENTRES; c++) {
      const int run = min(c * 4 + l4, keys::N_CENTRES / 8 - 1);   // the query is zero beyond the last
      const uint4 x = lds128(centres + (g * keys::N_CENTRES + run * 8) * 2);
      // rows i8 of A are the words x, z, rows i8 + 8 are y, w: no copies; each MMA gives one of the two
      #pragma unroll
      for (int part = 0; part < (CENTRE_RESIDUAL ? 2 : 1); part++) {
        const uint4 q = lds128(st.head + (K_PAIRS + part * K_CENTRES + c) * 512);
        mma_fp16(centre[0], x.x, x.y, x.z, x.w, q.x, q.z);
        mma_fp16(centre[1], x.x, x.y, x.z, x.w, q.y, q.w);
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
    slope[g][0] = st.s0 * by_step; slope[g][1] = st.s1 * by_step;
    offset[g][0] = (centre[0][0] + centre[1][2]) * (st.s0 * by_centre) - half * slope[g][0];
    offset[g][1] = (centre[0][1] + centre[1][3]) * (st.s1 * by_centre) - half1 * slope[g][1];
    slope[g][0] *= SUBNORMAL; slope[g][1] *= SUBNORMAL;
  }
}

// Probabilities of the tile as operand B, and their sums for each metadata group, of the rounded values, so that -top / 2 of the values cancels exactly.
__device__ __forceinline__ void probabilities(const float (&s)[FIELDS][4], const float (&slope)[GROUPS][2], const float (&offset)[GROUPS][2], u32 (&pb)[FIELDS][2],
    float (&sums)[GROUPS][2]) {
  float parts[GROUPS][DIRECT][4] = {};                        // sums of the fields of one bit
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) {
    const int g = f / GROUP_FIELDS;
    const float by = power2(-field_bit(f)), shift = TOP_SHIFT - field_bit(f);
    const float c0 = slope[g][0] * by, c1 = slope[g][1] * by, d0 = offset[g][0] + shift, d1 = offset[g][1] + shift;
    pb[f][0] = transpose8x8(pack_fp16(exp2_approx(fmaf(s[f][0], c0, d0)), exp2_approx(fmaf(s[f][1], c1, d1))));
    pb[f][1] = transpose8x8(pack_fp16(exp2_approx(fmaf(s[f][2], c0, d0)), exp2_approx(fmaf(s[f][3], c1, d1))));
    mma_fp16(parts[g][f < DIRECT ? f : f - DIRECT], ONES, ONES, ONES, ONES, pb[f][0], pb[f][1]);
  }
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    sums[g][0] = sums[g][1] = 0.f;
    #pragma unroll
    for (int i = 0; i < DIRECT; i++) {                        // a code of 1 for every token: 2^(bit - 24)
      sums[g][0] = fmaf(parts[g][i][0], power2(i * FIELD_BITS) / SUBNORMAL, sums[g][0]);
      sums[g][1] = fmaf(parts[g][i][1], power2(i * FIELD_BITS) / SUBNORMAL, sums[g][1]);
    }
  }
}

// Steps and centres of a tile's values for each token.
struct TokenNumbers {
  u32 at;                             // of the steps in shared memory, [block][token]; the centres follow
  float step, centre;                 // what undoes their scaling
  __device__ __forceinline__ uint2 load(int row, int f, int l4) const { return lds64(at + row * TOKEN_ROW + (f * 16 + l4 * 4) * 2); }   // of the lane's tokens in B
};
// Probabilities of field f times the steps of a block of 32 channels. Whoever asks for the same block again gets what is there.
struct StepProducts {
  u32 p[2];
  int block = -1;
  __device__ __forceinline__ void make(const u32 (&from)[2], const TokenNumbers& numbers, int of, int f, int l4) {
    if (block == of) return;
    const uint2 step = numbers.load(of, f, l4);
    p[0] = mul_fp16x2(from[0], step.x);
    p[1] = mul_fp16x2(from[1], step.y);
    block = of;
  }
};
// bias += sums over the tokens of P * step * -top / 2 and P * centre: rows 0 .. 3 of A are the blocks' steps, rows 4 .. 7 their centres
__device__ __forceinline__ void add_bias(Packed& st, const TokenNumbers& numbers, const u32 (&pb)[FIELDS][2], int i8, int l4) {
  const int block = i8 & 3, is_centre = i8 >> 2;
  const bool there = block < KV && (!is_centre || values::N_CENTRES > 0);
  float parts[DIRECT][4] = {};                                // sums of the fields of one bit
  #pragma unroll
  for (int f = 0; f < FIELDS; f++) {
    const uint2 x = there ? numbers.load(is_centre * KV + block, f, l4) : make_uint2(0, 0);
    mma_fp16(parts[f < DIRECT ? f : f - DIRECT], x.x, 0, x.y, 0, pb[f][0], pb[f][1]);
  }
  const float unit = is_centre ? numbers.centre : -0.5f * values::TOKEN_TOP * numbers.step;
  #pragma unroll
  for (int i = 0; i < DIRECT; i++)
    #pragma unroll
    for (int row = 0; row < 2; row++) st.bias[row] = fmaf(parts[i][row], unit * (power2(i * FIELD_BITS) / SUBNORMAL), st.bias[row]);
}

// One 16-slot row block of a value plane: its words in a lane, and the sums of P * code for its slots.
enum Plane { TWO, ONE, TRITS };       // trits are decoded into words of two-bit codes 0, 1, 2
template <Plane PLANE>
struct ValueRows {
  static constexpr int C = PLANE == TWO ? values::C2 : PLANE == ONE ? values::C1 : values::C3, E = PLANE == TWO ? values::E2 : PLANE == ONE ? values::E1 : values::E3;
  static constexpr int BITS = PLANE == ONE ? 1 : 2, FIRST_RUN = (PLANE == TWO ? 0 : values::C2 * values::E2 + (PLANE == ONE ? 0 : values::C1 * values::E1)) / 8;
  static constexpr float MIDDLE = PLANE == TWO ? 1.5f : PLANE == ONE ? 0.5f : 1.f;   // half of the largest code
  uint2 x[2];
  float r[E][4];

  __device__ __forceinline__ void load(u32 plane, int mt, int i8, int l4) {
    #pragma unroll
    for (int h = 0; h < 2; h++) x[h] = mt * 16 + h * 8 < C ? lds64(plane + (mt * 16 + h * 8 + i8) * 32 + l4 * 8) : make_uint2(0, 0);
  }
  __device__ __forceinline__ void start() {
    #pragma unroll
    for (int e = 0; e < E; e++) r[e][0] = r[e][1] = r[e][2] = r[e][3] = 0.f;
  }
  __device__ __forceinline__ void shift() { x[0].x >>= UPPER_SHIFT; x[0].y >>= UPPER_SHIFT; x[1].x >>= UPPER_SHIFT; x[1].y >>= UPPER_SHIFT; }
  __device__ __forceinline__ void multiply(int f, const u32 (&p)[2], int mt, const TokenNumbers& numbers, StepProducts& products, int l4) {
    #pragma unroll
    for (int e = 0; e < E; e++) {
      const u32 mask = (BITS == 2 ? 0x00030003u : 0x00010001u) << (field_bit(f) + e * BITS);
      if (PER_TOKEN) products.make(p, numbers, values::run_axis[FIRST_RUN + (e * C + mt * 16) / 8] / 4, f, l4);   // 16 slots lie in one block of 32 axes
      mma_fp16(r[e], x[0].x & mask, x[1].x & mask, x[0].y & mask, x[1].y & mask, PER_TOKEN ? products.p[0] : p[0], PER_TOKEN ? products.p[1] : p[1]);
    }
  }
  // numbers: steps, then centres of the values as float32; an axis gets its centre with its slot of weight 1
  __device__ __forceinline__ void add(Packed& st, u32 numbers, float token_step, int mt, int g, const float (&sums)[2], int i8) const {
    #pragma unroll
    for (int e = 0; e < E; e++)
      #pragma unroll
      for (int h = 0; h < 2; h++)
        if (mt * 16 + h * 8 < C) {
          const int run = FIRST_RUN + (e * C + mt * 16 + h * 8) / 8, axis = values::run_axis[run], centre = values::centre_run[axis];
          if (PER_TOKEN) {                                    // the steps are in the probabilities, the rest is in bias
            const float scale = token_step * power2(values::run_shift[run] - e * BITS);
            st.acc[axis][0] = fmaf(r[e][2 * h], scale, st.acc[axis][0]);
            st.acc[axis][1] = fmaf(r[e][2 * h + 1], scale, st.acc[axis][1]);
            continue;
          }
          const float step = lds_float(numbers + (g * values::N_STEPS + values::run_step[run] * 8 + i8) * 4);
          const float scale = step * power2(values::run_shift[run] - e * BITS);
          float bias = step * (-MIDDLE * power2(values::run_shift[run]));
          if (values::run_shift[run] == 0 && centre >= 0) bias += lds_float(numbers + (GROUPS * values::N_STEPS + g * values::N_CENTRES + centre * 8 + i8) * 4);
          st.acc[axis][0] = fmaf(r[e][2 * h], scale, fmaf(sums[0], bias, st.acc[axis][0]));
          st.acc[axis][1] = fmaf(r[e][2 * h + 1], scale, fmaf(sums[1], bias, st.acc[axis][1]));
        }
  }
};

// acc += P . values for N2, N1 and N3 row blocks of the two-bit plane from A2, the one-bit plane from A1 and the trits from A3: N2 * E2 + N1 * E1 + N3 * E3 independent chains of MMAs
template <int A2, int N2, int A1, int N1, int A3, int N3>
__device__ __forceinline__ void value_rows(Packed& st, u32 tile, u32 numbers, u32 trits, const TokenNumbers& of_token, const u32 (&pb)[FIELDS][2], const float (&sums)[GROUPS][2], int i8, int l4) {
  ValueRows<TWO> two[N2 > 0 ? N2 : 1];
  ValueRows<ONE> one[N1 > 0 ? N1 : 1];
  ValueRows<TRITS> three[N3 > 0 ? N3 : 1];
  #pragma unroll
  for (int i = 0; i < N2; i++) two[i].load(tile + values::TWO, A2 + i, i8, l4);
  #pragma unroll
  for (int i = 0; i < N1; i++) one[i].load(tile + values::ONE, A1 + i, i8, l4);
  #pragma unroll
  for (int i = 0; i < N3; i++) three[i].load(trits, A3 + i, i8, l4);
  #pragma unroll
  for (int g = 0; g < VALUE_GROUPS; g++) {
    #pragma unroll
    for (int i = 0; i < N2; i++) two[i].start();
    #pragma unroll
    for (int i = 0; i < N1; i++) one[i].start();
    #pragma unroll
    for (int i = 0; i < N3; i++) three[i].start();
    #pragma unroll
    for (int f0 = 0; f0 < FIELDS / VALUE_GROUPS; f0++) {
      const int f = g * (FIELDS / VALUE_GROUPS) + f0;
      StepProducts products;
      #pragma unroll
      for (int i = 0; i < N2; i++) { if (f == DIRECT) two[i].shift(); two[i].multiply(f, pb[f], A2 + i, of_token, products, l4); }
      #pragma unroll
      for (int i = 0; i < N1; i++) { if (f == DIRECT) one[i].shift(); one[i].multiply(f, pb[f], A1 + i, of_token, products, l4); }
      #pragma unroll
      for (int i = 0; i < N3; i++) { if (f == DIRECT) three[i].shift(); three[i].multiply(f, pb[f], A3 + i, of_token, products, l4); }
    }
    #pragma unroll
    for (int i = 0; i < N2; i++) two[i].add(st, numbers, of_token.step, A2 + i, g, sums[g], i8);
    #pragma unroll
    for (int i = 0; i < N1; i++) one[i].add(st, numbers, of_token.step, A1 + i, g, sums[g], i8);
    #pragma unroll
    for (int i = 0; i < N3; i++) three[i].add(st, numbers, of_token.step, A3 + i, g, sums[g], i8);
  }
}
__device__ __forceinline__ constexpr int at_most(int a, int b) { return a < b ? (a > 0 ? a : 0) : b; }
__device__ __forceinline__ constexpr int row_blocks(int slots) { return slots >= 4 ? 1 : 4 / slots; }   // of a plane that go together
template <int A2, int A1, int A3>
__device__ __forceinline__ void all_value_rows(Packed& st, u32 tile, u32 numbers, u32 trits, const TokenNumbers& of_token, const u32 (&pb)[FIELDS][2], const float (&sums)[GROUPS][2], int i8, int l4) {
  constexpr int MT2 = tiles16(values::C2), MT1 = tiles16(values::C1), MT3 = tiles16(values::C3);
  constexpr int STEP2 = row_blocks(values::E2), STEP1 = row_blocks(values::E1), STEP3 = row_blocks(values::E3);
  if constexpr (A2 < MT2 || A1 < MT1 || A3 < MT3) {
    value_rows<A2, at_most(MT2 - A2, STEP2), A1, at_most(MT1 - A1, STEP1), A3, at_most(MT3 - A3, STEP3)>(st, tile, numbers, trits, of_token, pb, sums, i8, l4);
    all_value_rows<A2 + STEP2, A1 + STEP1, A3 + STEP3>(st, tile, numbers, trits, of_token, pb, sums, i8, l4);
  }
}

__device__ __forceinline__ void attend_tile(Packed& st, u32 tile, u32 decoded, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  const u32 numbers = decoded + (META_FP8 ? KEY_NUMBERS * 2 : 0);   // of the values
  TokenNumbers of_token = {numbers, 1.f, 1.f};
  if (PER_TOKEN) {
    const u32 factors = META_FP8 ? lds32(tile + values::FACTORS) : ONES;
    of_token.step = decode_token_numbers(tile + values::STEPS, numbers, lane) * fp16_to_float((u16)factors);
    if (values::N_CENTRES) of_token.centre = decode_token_numbers(tile + values::CENTRES, numbers + KV * TOKEN_ROW, lane) * fp16_to_float((u16)(factors >> 16));
  }
  if (values::C3) decode_trits(tile, decoded + NUMBERS_BYTES, lane);
  decode_metadata(tile, decoded, lane);
  float s[FIELDS][4], slope[GROUPS][2], offset[GROUPS][2], sums[GROUPS][2];
  u32 pb[FIELDS][2];
  tile_scores(st, tile, decoded, l4, s, slope, offset);
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) { offset[g][0] -= st.m0; offset[g][1] -= st.m1; }
  for (bool raise = st.first;;) {                             // raise: find a new maximum first
    if (raise) {
      float x0 = st.first ? NEVER : 0.f, x1 = x0;
      #pragma unroll
      for (int f = 0; f < FIELDS; f++) {
        const int g = f / GROUP_FIELDS;
        const float c0 = slope[g][0] * power2(-field_bit(f)), c1 = slope[g][1] * power2(-field_bit(f));
        x0 = fmaxf(x0, fmaf(fmaxf(s[f][0], s[f][2]), c0, offset[g][0]));   // slopes are not negative
        x1 = fmaxf(x1, fmaf(fmaxf(s[f][1], s[f][3]), c1, offset[g][1]));
      }
      #pragma unroll
      for (int o = 4; o < 32; o <<= 1) { x0 = fmaxf(x0, __shfl_xor_sync(ALL, x0, o)); x1 = fmaxf(x1, __shfl_xor_sync(ALL, x1, o)); }
      const float a0 = st.first ? 0.f : exp2_approx(-x0), a1 = st.first ? 0.f : exp2_approx(-x1);
      st.m0 += x0; st.m1 += x1;
      st.l0 *= a0; st.l1 *= a1;
      #pragma unroll
      for (int g = 0; g < GROUPS; g++) { offset[g][0] -= x0; offset[g][1] -= x1; }
      #pragma unroll
      for (int i = 0; i < D / 8; i++) { st.acc[i][0] *= a0; st.acc[i][1] *= a1; }
      st.bias[0] *= a0; st.bias[1] *= a1;
      st.first = false;
    }
    probabilities(s, slope, offset, pb, sums);
    bool too_large = false;                                   // a probability overflowed fp16: the maximum in use is too low
    #pragma unroll
    for (int g = 0; g < GROUPS; g++) too_large |= !(fmaxf(sums[g][0], sums[g][1]) < FINITE);
    raise = __any_sync(ALL, too_large);
    if (!raise) break;
  }
  if (PER_TOKEN) add_bias(st, of_token, pb, i8, l4);
  #pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    st.l0 += sums[g][0]; st.l1 += sums[g][1];
    #pragma unroll
    for (int axis = 0; axis < D / 8; axis++)
      if (values::centre_run[axis] >= 0 && !values::coded[axis]) {
        const float c = lds_float(numbers + (GROUPS * values::N_STEPS + g * values::N_CENTRES + values::centre_run[axis] * 8 + i8) * 4);
        st.acc[axis][0] = fmaf(sums[g][0], c, st.acc[axis][0]);
        st.acc[axis][1] = fmaf(sums[g][1], c, st.acc[axis][1]);
      }
  }
  all_value_rows<0, 0, 0>(st, tile, numbers, decoded + NUMBERS_BYTES, of_token, pb, sums, i8, l4);
}

__device__ __forceinline__ void store_state(const Packed& st, Shared& sm, int w, int lane) {
  const int i8 = lane >> 2, l4 = lane & 3;
  float bias[KV][2] = {};
  #pragma unroll
  for (int row = 0; row < 2 && PER_TOKEN; row++) {
    const float both = st.bias[row] + __shfl_xor_sync(ALL, st.bias[row], 16);   // of steps and centres
    #pragma unroll
    for (int b = 0; b < KV; b++) bias[b][row] = __shfl_sync(ALL, both, b * 4 + l4);
  }
  #pragma unroll
  for (int axis = 0; axis < D / 8; axis++) {
    sm.warp[w].red[l4 * 2][axis * 8 + i8] = st.acc[axis][0] + bias[axis / 4][0];
    sm.warp[w].red[l4 * 2 + 1][axis * 8 + i8] = st.acc[axis][1] + bias[axis / 4][1];
  }
  if (i8 == 0) {
    sm.max[w][l4 * 2] = st.first ? NEVER : st.m0 + P_SHIFT; sm.max[w][l4 * 2 + 1] = st.first ? NEVER : st.m1 + P_SHIFT;
    sm.sum[w][l4 * 2] = st.l0; sm.sum[w][l4 * 2 + 1] = st.l1;
  }
}

// The units of a segment go round the warps; whole-precision ones come first.
__device__ __forceinline__ int first_tile(const Segment& s, int w) {
  const int before = max(min(s.end, s.raw) - s.begin, 0);
  return max(s.begin, s.raw) - s.raw + (w + WARPS - before % WARPS) % WARPS;
}
__device__ __forceinline__ Prefetch prefetch_from(const Params& p, const Segment& s, int w, int pos, int end) {
  const SetParams& set = p.sets[s.head.set];
  return {pos + s.length, end, s.entry, first_tile(s, w), s.end - s.raw, set.tiles + s.head.b * set.tiles_b + s.head.h * set.tiles_h};
}
__device__ __forceinline__ void fetch(const Params& p, const Plan& plan, Prefetch& f, int w, u32 stage, u32 barrier) {
  while (f.tile >= f.stop && f.pos < f.end) {                 // move on to a segment with a tile for this warp
    const Segment s = locate(p, plan, f.pos, f.end, f.entry);
    f = prefetch_from(p, s, w, f.pos, f.end);
    const Rotation& rot = p.sets[s.head.set].key;
    if (keys::MATRIX && w == 0 && f.stop > 0) prefetch_l2(rot.matrix + s.head.b * rot.stride_b + s.head.h * rot.stride_h, D * D * 2);
  }
  if (f.tile < f.stop) {
    bulk_copy(stage, f.base + (i64)f.tile * TILE_BYTES, TILE_BYTES, barrier);
    f.tile += WARPS;
  }
}
// Ask for the whole-precision tokens of a segment ahead of its tiles
__device__ __forceinline__ void prefetch_raw(const Params& p, const Segment& s) {
  const SetParams& set = p.sets[s.head.set];
  const int sink = set.sink_k ? set.lengths[s.head.b] : 0, tail = set.lengths[2 * p.batch + s.head.b], sink_blocks = raw_units(sink);
  constexpr int LINES = RAW_TOKENS * D * 2 / 128;             // of one unit's keys
  for (int i = threadIdx.x; i < (min(s.end, s.raw) - s.begin) * LINES * 2; i += THREADS) {
    const int unit = s.begin + i / (LINES * 2), line = i % LINES, is_value = i / LINES & 1;
    const bool in_sink = unit < sink_blocks;
    const int t0 = (in_sink ? unit : unit - sink_blocks) * RAW_TOKENS, count = in_sink ? sink : tail;
    const u16* base = (in_sink ? (is_value ? set.sink_v : set.sink_k) : (is_value ? set.tail_v : set.tail_k))
      + s.head.b * (in_sink ? set.sink_b : set.tail_b) + s.head.h * (in_sink ? set.sink_h : set.tail_h);
    if (t0 + line * 64 / D < count) prefetch_line(base + (i64)t0 * D + line * 64);
  }
}
#endif

// ---- partial results ------------------------------------------------------------------------------------------------------------------------
constexpr int LANE_FLOATS = D / 32;                           // neighbouring channels of a lane when a warp holds one row
enum Kind { RAW = 0, PACKED = 1 };
__device__ __forceinline__ int partial_row(int slot, int kind, int row) { return (slot * 2 + kind) * ROWS + row; }

// Merge the warps' results and write them as a partial result. All warps have written sm.red, sm.max and sm.sum.
__device__ __forceinline__ void write_partial(const Params& p, const Segment& s, Kind kind, Shared& sm, int w, int lane) {
  __syncthreads();
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
      const float* from = &sm.warp[k].red[row][lane * LANE_FLOATS];
      #pragma unroll
      for (int i = 0; i < LANE_FLOATS; i++) o[i] = fmaf(e, from[i], o[i]);
    }
    const int to_row = partial_row(s.slot, kind, row);
    float* to = p.partial + (i64)to_row * D + lane * LANE_FLOATS;
    if (LANE_FLOATS == 4) *(float4*)to = make_float4(o[0], o[1], o[LANE_FLOATS - 2], o[LANE_FLOATS - 1]); else *(float2*)to = make_float2(o[0], o[1]);
    if (kind == PACKED && m > 0.5f * NEVER) m += sm.constant[row];
    if (lane == 0) p.stats[to_row] = make_float2(sum > 0.f ? m : NEVER, sum);
  }
  __syncthreads();
}

extern "C" __global__ void __maxnreg__(MAX_REGISTERS) attend(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) u8 memory[];
  const int w = threadIdx.x >> 5, lane = threadIdx.x & 31;
  Shared& sm = *(Shared*)(memory + (HAS_TILES ? WARPS * STAGES * TILE_BYTES : 0));
  start_next_kernel();
#if HAS_TILES
  const u32 stages = (u32)__cvta_generic_to_shared(memory) + w * STAGES * TILE_BYTES, barriers = (u32)__cvta_generic_to_shared(sm.barrier) + w * STAGES * 8;
  const u32 decoded = (u32)__cvta_generic_to_shared(sm.warp[w].decoded);
  if (lane == 0) {
    #pragma unroll
    for (int i = 0; i < STAGES; i++) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barriers + i * 8) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
#endif
  if (w == 0) make_plan(p, sm.plan, gridDim.x, lane);
  __syncthreads();
  const Plan& plan = sm.plan;
  const int entries = p.n_sets * p.batch, cta = blockIdx.x;
  int pos, end;
  Segment s;
  if (cta < plan.line) {
    int entry = 0;
    while (entry + 1 < entries && plan.first_cta[entry + 1] <= cta) entry++;
    const int raw = plan.raw[entry], units = raw + plan.tiles[entry], given = plan.parts[entry];
    const int head = (u32)(cta - plan.first_cta[entry]) / (u32)given, part = cta - plan.first_cta[entry] - head * given;
    const Parts parts = parts_of(raw, plan.tiles[entry], given);
    const bool alone = part < parts.raw;
    const int rest = parts.raw ? raw : 0;
    const int from = alone ? part * parts.raw_each : rest + (part - parts.raw) * parts.each - parts.lead, begin = max(from, 0);
    pos = 0;
    end = (alone ? min(from + parts.raw_each, raw) : min(from + parts.each, units)) - begin;
    s = segment(p, plan, entry, head, LEAD + begin, end);
  } else {
    pos = (cta - plan.line) * plan.share;
    end = min(pos + plan.share, plan.start[entries]);
    if (pos < end) s = locate(p, plan, pos, end, 0);
  }
  if (pos >= end) return;
#if HAS_TILES
  Prefetch& next = sm.next[w];                                // of lane 0
  if (lane == 0) next = prefetch_from(p, s, w, pos, end);
  int stage = 0, phase = 0;
  bool started = false;
  const auto start_copies = [&] {
    #pragma unroll 1
    for (int i = 0; i < STAGES && lane == 0 && !started; i++) fetch(p, plan, next, w, stages + i * TILE_BYTES, barriers + i * 8);
    started = true;
    __syncwarp();
  };
#endif
  for (;;) {
    if (s.end > 0) {
      if (s.begin == 0 && threadIdx.x == 0) p.slots[s.head.number] = slots_of(plan, s.entry, s.head.h * BLOCKS + s.head.block);   // the head begins here: for merge
      const bool raw = s.begin < s.raw, packed = HAS_TILES && s.end > s.raw;
      if (threadIdx.x < 2 * ROWS && !(threadIdx.x < ROWS ? raw : packed))
        p.stats[partial_row(s.slot, threadIdx.x / ROWS, threadIdx.x % ROWS)] = make_float2(NEVER, 0.f);   // there is none
#if HAS_TILES
      if (packed) {
        prepare_head(p, s, sm, w, lane, [&] { start_copies(); prefetch_raw(p, s); });
        Packed state;
        start_head(sm, state, lane);
        for (int tile = first_tile(s, w); tile < s.end - s.raw; tile += WARPS) {
          wait_barrier(barriers + stage * 8, phase);
          attend_tile(state, stages + stage * TILE_BYTES, decoded, lane);
          __syncwarp();
          if (lane == 0) fetch(p, plan, next, w, stages + stage * TILE_BYTES, barriers + stage * 8);
          if (++stage == STAGES) { stage = 0; phase ^= 1; }
        }
        store_state(state, sm, w, lane);
        write_partial(p, s, PACKED, sm, w, lane);
      } else start_copies();
#endif
      if (raw) {
        attend_raw(p, s, sm, w, lane);
        write_partial(p, s, RAW, sm, w, lane);
      }
    }
    pos += s.length;
    if (pos >= end) break;
    s = locate(p, plan, pos, end, s.entry);
  }
}

// ---- merging --------------------------------------------------------------------------------------------------------------------------------
// R query rows of a head: merge their partial results, rotate the packed part back, write output and lse. With many heads R = 4 reads a head's matrix a quarter as often and
// fills the MMA (the rows' high and low halves are its 8 columns); with few heads R = 1 spreads the partial results over more CTAs.
template <int R>
__device__ __forceinline__ void merge_rows(const Params& p) {
  constexpr int FLIGHT = 4;                                   // partial results that a warp loads at once
  constexpr int TEAM = MERGE_WARPS / R;                      // warps of a row
  constexpr int HALF_ROW = D + 8;                             // bf16 numbers of a row of `halves`: no bank conflicts
  __shared__ __align__(16) float sums[MERGE_WARPS][2][128];  // by channel: the whole-precision part; by axis: the packed part
  __shared__ float stats[MERGE_WARPS][3];                    // maximum (log2), sums of both parts
  __shared__ __align__(16) u16 halves[2 * R][HALF_ROW];       // the packed part of every row as two bf16 numbers, high and low
  const int w = threadIdx.x >> 5, lane = threadIdx.x & 31, i8 = lane >> 2, l4 = lane & 3, row0 = blockIdx.x % (ROWS / R) * R;
  const Head head = head_of(p, blockIdx.x / (ROWS / R));
  int q_head, token;
  if (!query_row(p, head, row0, q_head, token)) return;       // nor is there any after it
  const SetParams& set = p.sets[head.set];
  const i64 channels = ((i64)head.b * set.heads + head.h) * D;
  const Rotation& rot = set.value;
  const int channel = w * 16 + i8;                            // of the rotation back: rows channel, channel + 8 of the matrix
  const bool turn = values::MATRIX && set.tiles, turns = turn && w < D / 16;
  uint4 a[KV][2];
  const auto load = [&](const u16* matrix) {
    const u16* from = matrix + head.b * rot.stride_b + head.h * rot.stride_h + channel * D + l4 * 8;
    #pragma unroll
    for (int c = 0; c < KV; c++) { a[c][0] = ldg128(from + c * 32); a[c][1] = ldg128(from + 8 * D + c * 32); }
  };
  float mean[2] = {0.f, 0.f};
  if (turns) {
    load(rot.matrix);
    if (values::MEAN) { mean[0] = rot.mean[channels + channel]; mean[1] = rot.mean[channels + channel + 8]; }
  }
  wait_for_previous_kernel();
  const int2 slots = __ldcg(p.slots + head.number);
  const int first = slots.x, count = slots.y, row = row0 + w / TEAM;   // row: of the warp; one that is not there has partial results too, of zeros
  float m = NEVER, mass[2] = {0.f, 0.f};
  float4 sum[2] = {make_float4(0.f, 0.f, 0.f, 0.f), make_float4(0.f, 0.f, 0.f, 0.f)};
  #pragma unroll 1
  for (int i0 = w % TEAM; i0 < 2 * count; i0 += 32 * TEAM) {  // a lane: one partial result, of whole-precision tokens first; those that are there are then added in order
    const int i = i0 + lane * TEAM, kind = i >= count, from = partial_row(first + i - kind * count, kind, row);
    const float2 stat = i < 2 * count ? __ldcg(p.stats + from) : make_float2(NEVER, 0.f);
    float top = fmaxf(m, stat.x);
    #pragma unroll
    for (int o = 16; o; o >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL, top, o));
    const float shrink = exp2_approx(m - top), weight = exp2_approx(stat.x - top);
    m = top;
    #pragma unroll
    for (int kind = 0; kind < 2; kind++) {
      mass[kind] *= shrink;
      sum[kind].x *= shrink; sum[kind].y *= shrink; sum[kind].z *= shrink; sum[kind].w *= shrink;
    }
    #pragma unroll 1
    for (u32 there = __ballot_sync(ALL, stat.x > 0.5f * NEVER); there;) {
      float4 v[FLIGHT];
      int lanes[FLIGHT];
      #pragma unroll
      for (int k = 0; k < FLIGHT; k++) {
        lanes[k] = __ffs(there) - 1;
        there &= there - 1;
        const int place = __shfl_sync(ALL, from, max(lanes[k], 0));
        v[k] = lanes[k] >= 0 && lane * 4 < D ? __ldcg((const float4*)(p.partial + (i64)place * D) + lane) : make_float4(0.f, 0.f, 0.f, 0.f);
      }
      #pragma unroll
      for (int k = 0; k < FLIGHT; k++) {
        if (lanes[k] < 0) break;
        const float e = __shfl_sync(ALL, weight, lanes[k]), l = __shfl_sync(ALL, stat.y, lanes[k]);
        const auto add = [&](int kind) {
          mass[kind] = fmaf(e, l, mass[kind]);
          sum[kind].x = fmaf(e, v[k].x, sum[kind].x); sum[kind].y = fmaf(e, v[k].y, sum[kind].y);
          sum[kind].z = fmaf(e, v[k].z, sum[kind].z); sum[kind].w = fmaf(e, v[k].w, sum[kind].w);
        };
        if (i0 + lanes[k] * TEAM < count) add(0); else add(1);
      }
    }
  }
  #pragma unroll
  for (int part = 0; part < 2; part++) *(float4*)&sums[w][part][lane * 4] = sum[part];
  if (lane == 0) { stats[w][0] = m; stats[w][1] = mass[0]; stats[w][2] = mass[1]; }
  __syncthreads();
  const int axis = threadIdx.x - 128;                         // threads 0 .. 127: channels of the whole-precision part, 128 .. 255: axes of the packed one
  float x[R], share = 0.f;                                    // share: of the packed part, of the row that the lane rotates back
  #pragma unroll
  for (int r = 0; r < R; r++) {
    float total = 0.f, packed = 0.f;
    m = NEVER;
    x[r] = 0.f;
    #pragma unroll
    for (int k = r * TEAM; k < (r + 1) * TEAM; k++) m = fmaxf(m, stats[k][0]);
    #pragma unroll
    for (int k = r * TEAM; k < (r + 1) * TEAM; k++) {
      const float e = exp2_approx(stats[k][0] - m);
      total = fmaf(e, stats[k][1], total);
      packed = fmaf(e, stats[k][2], packed);
      x[r] = fmaf(e, (&sums[k][0][0])[threadIdx.x], x[r]);
    }
    total += packed;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    x[r] *= inverse;
    if (r == l4) share = packed * inverse;
    if (axis < 0) sums[r * TEAM][0][threadIdx.x] = x[r];      // no other thread has read this column
    else if (axis < D) {
      const u32 high = pack_bf16(x[r], 0.f);
      halves[2 * r][axis] = (u16)high;
      halves[2 * r + 1][axis] = (u16)pack_bf16(x[r] - bf16_low(high), 0.f);
    }
    if (threadIdx.x == r && query_row(p, head, row0 + r, q_head, token))
      p.lse[((i64)head.b * p.q_heads + q_head) * N_QUERY + token] = total > 0.f ? (m + log2_approx(total)) * LN2 : __uint_as_float(0xff800000u);
  }
  __syncthreads();
  if (turns) {
    float y[4] = {0.f, 0.f, 0.f, 0.f};                        // rows: channels; columns 2 r, 2 r + 1: the halves of row r
    #pragma unroll
    for (int pass = 0; pass < (values::RESIDUAL ? 2 : 1); pass++) {
      if (pass == 1) load(rot.residual);
      #pragma unroll
      for (int c = 0; c < KV; c++) {
        const uint4 b = i8 < 2 * R ? *(const uint4*)(halves[i8] + c * 32 + l4 * 8) : make_uint4(0, 0, 0, 0);
        mma_bf16(y, a[c][0].x, a[c][1].x, a[c][0].y, a[c][1].y, b.x, b.y);
        mma_bf16(y, a[c][0].z, a[c][1].z, a[c][0].w, a[c][1].w, b.z, b.w);
      }
    }
    if (l4 >= R || !query_row(p, head, row0 + l4, q_head, token)) return;
    u16* to = p.out + (((i64)head.b * p.q_heads + q_head) * N_QUERY + token) * D;
    #pragma unroll
    for (int i = 0; i < 2; i++) {
      const int c = channel + 8 * i, place = values::ORDER ? rot.order[channels + c] : c;
      float v = y[2 * i] + y[2 * i + 1];
      if (values::MEAN) v = fmaf(share, mean[i], v);
      to[place] = to_model(v + sums[l4 * TEAM][0][place]);
    }
  } else if (!turn && axis >= 0 && axis < D) {
    const int place = values::ORDER && set.tiles ? rot.order[channels + axis] : axis;
    #pragma unroll
    for (int r = 0; r < R; r++)
      if (query_row(p, head, row0 + r, q_head, token))
        p.out[(((i64)head.b * p.q_heads + q_head) * N_QUERY + token) * D + place] = to_model(x[r] + sums[r * TEAM][0][place]);
  }
}
extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 3) merge_1(const __grid_constant__ Params p) { merge_rows<1>(p); }
extern "C" __global__ void __launch_bounds__(MERGE_THREADS, 3) merge_4(const __grid_constant__ Params p) { merge_rows<4>(p); }
