// Stands for the section "instructions" of pack.cu; asynchronous copies are done at once
inline void copy_16(void* to, const void* from) {
  if ((size_t)to % 16 || (size_t)from % 16) { printf("a copy of 16 bytes is not aligned\n"); abort(); }
  memcpy(to, from, 16);
}
inline void copies_done() {}
inline float bf16_value(unsigned short bits) { return __uint_as_float((unsigned)bits << 16); }

// Four matrices of 8 x 8: lane 8 m + r has the address of row r of matrix m
inline void matrices(unsigned (&r)[4], const void* p, bool transposed) {
  const Shown* all = exchange({{(unsigned)(size_t)p, (unsigned)((size_t)p >> 32)}});
  const int lane = threadIdx.x % 32;
  const auto at = [&](int m, int row, int column) -> unsigned {
    const unsigned* word = all[8 * m + row].word;
    return ((const unsigned short*)(word[0] | (size_t)word[1] << 32))[column];
  };
  for (int m = 0; m < 4; m++) {
    const int i = lane / 4, j = 2 * (lane % 4);
    r[m] = transposed ? at(m, j, i) | at(m, j + 1, i) << 16 : at(m, i, j) | at(m, i, j + 1) << 16;
  }
}
inline void load_matrices(unsigned (&r)[4], const void* p) { matrices(r, p, false); }
inline void load_transposed(unsigned (&r)[4], const void* p) { matrices(r, p, true); }
inline void multiply(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  const Shown* all = exchange({{a[0], a[1], a[2], a[3], b0, b1}});
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    double sum = d[i];
    for (int k = 0; k < 16; k++) {
      const int pair = k % 8 / 2, shift = 16 * (k % 2), half = k / 8;
      sum += (double)bf16_value(all[row % 8 * 4 + pair].word[row / 8 + 2 * half] >> shift) * bf16_value(all[column * 4 + pair].word[4 + half] >> shift);
    }
    d[i] = (float)sum;
  }
}
inline float between(float x, float slope, float shift) { return min(max(fmaf(x, slope, shift), 0.0f), 1.0f); }
inline unsigned short to_half(float x) { const _Float16 h = (_Float16)x; unsigned short bits; memcpy(&bits, &h, 2); return bits; }
inline float from_half(unsigned short bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline unsigned bf16_bits(float x) { const unsigned b = __float_as_uint(x); return (b + 0x7fff + (b >> 16 & 1)) >> 16; }
inline unsigned two_bfloat16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline void atomicMax(int* to, int value) { *to = max(*to, value); }
