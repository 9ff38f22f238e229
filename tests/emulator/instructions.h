// Stands for the section "instructions" of decode_sm90.cu
inline u16 half_bits(float x) { const _Float16 h = (_Float16)x; u16 bits; memcpy(&bits, &h, 2); return bits; }
inline float half_value(u16 bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline u16 bf16_bits(float x) { const u32 b = __float_as_uint(x); return (u16)((b + 0x7fff + (b >> 16 & 1)) >> 16); }
inline float bf16_value(u16 bits) { return __uint_as_float((u32)bits << 16); }

template <class Value> inline void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, Value value) {
  const Shown* all = exchange({{a0, a1, a2, a3, b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; k++) {
      const int pair = k % 8 / 2, shift = 16 * (k % 2), half = k / 8;
      sum += (double)value((u16)(all[row % 8 * 4 + pair].word[row / 8 + 2 * half] >> shift)) * value((u16)(all[column * 4 + pair].word[4 + half] >> shift));
    }
    c[i] = (float)sum;
  }
}
inline void mma_fp16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma(c, a0, a1, a2, a3, b0, b1, half_value); }
inline void mma_bf16(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { mma(c, a0, a1, a2, a3, b0, b1, bf16_value); }
inline void mma_model(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if (MODEL_FP16) mma_fp16(c, a0, a1, a2, a3, b0, b1); else mma_bf16(c, a0, a1, a2, a3, b0, b1);
}
inline float exp2_approx(float x) { return x < -126.f ? 0.f : exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline u32 pack_fp16(float low, float high) { return half_bits(low) | (u32)half_bits(high) << 16; }
inline u32 pack_bf16(float low, float high) { return bf16_bits(low) | (u32)bf16_bits(high) << 16; }
inline u32 mul_fp16x2(u32 a, u32 b) { return pack_fp16(half_value(a) * half_value(b), half_value(a >> 16) * half_value(b >> 16)); }
inline float fp16_to_float(u16 x) { return half_value(x); }
inline float bf16_low(u32 x) { return __uint_as_float(x << 16); }
inline float bf16_high(u32 x) { return __uint_as_float(x & 0xffff0000u); }
inline float model_to_float(u16 x) { return MODEL_FP16 ? half_value(x) : bf16_value(x); }
inline u16 to_model(float x) { return MODEL_FP16 ? half_bits(x) : bf16_bits(x); }
inline float e4m3_value(u8 x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  const float value = exponent ? ldexpf(1.f + mantissa / 8.f, exponent - 7) : ldexpf(mantissa, -9);
  return x & 128 ? -value : value;
}
inline u32 e4m3_to_fp16x2(u32 two) { return pack_fp16(e4m3_value((u8)two), e4m3_value((u8)(two >> 8))); }
inline u32 transpose8x8(u32 mine) {
  const Shown* all = exchange({{mine}});
  const int lane = threadIdx.x % 32, row = lane / 4, column = 2 * (lane % 4);
  const auto at = [&](int i, int j) { return all[i * 4 + j / 2].word[0] >> 16 * (j % 2) & 0xffff; };
  return at(column, row) | at(column + 1, row) << 16;
}
template <class T> inline T& shared(u32 address) {
  if (address % sizeof(T) || address + sizeof(T) > sizeof memory) { printf("%zu bytes at shared address %u\n", sizeof(T), address); abort(); }
  return *(T*)(memory + address);
}
inline uint4 lds128(u32 a) { return shared<uint4>(a); }
inline uint2 lds64(u32 a) { return shared<uint2>(a); }
inline u32 lds32(u32 a) { return shared<u32>(a); }
inline u16 lds16(u32 a) { return shared<u16>(a); }
inline float lds_float(u32 a) { return shared<float>(a); }
inline void sts32(u32 a, u32 x) { shared<u32>(a) = x; }
inline void sts128(u32 a, u32 x, u32 y, u32 z, u32 w) { shared<uint4>(a) = {x, y, z, w}; }
inline uint4 ldg128(const void* a) { return __ldcg((const uint4*)a); }
inline u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
inline constexpr float power2(int n) { return n >= 0 ? (float)(1 << n) : 1.f / (float)(1 << -n); }

inline void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier) {
  if (to % 16 || (size_t)from % 16 || bytes % 16) { printf("a bulk copy is not aligned\n"); abort(); }
  memcpy(memory + to, from, bytes);
  copies[barrier / 8]++;
}
inline void wait_barrier(u32 barrier, u32 phase) {
  while (!(copies[barrier / 8] && (u32)(copies[barrier / 8] - 1) % 2 == phase)) wait_a_turn();
}
inline void prefetch_line(const void*) {}
inline void prefetch_l2(const void*, u32) {}
inline void start_next_kernel() {}
inline void wait_for_previous_kernel() {}

