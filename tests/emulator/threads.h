// A CUDA thread block on one CPU thread: every CUDA thread is a context of its own that runs until it waits for others.
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __constant__ static
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

struct Index { int x, y, z; };
static Index threadIdx, blockIdx, gridDim;
struct alignas(8) float2 { float x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

constexpr int MOST_THREADS = 512, STACK = 1 << 16;
alignas(128) static unsigned char memory[232448];   // dynamic shared memory
static ucontext_t scheduler, contexts[MOST_THREADS];
static bool ended[MOST_THREADS];
static int current, threads, waiting_block, block_round, waiting[MOST_THREADS / 32], warp_round[MOST_THREADS / 32];
static int copies[sizeof memory / 8];                // bulk copies that have arrived at every barrier: each completes a phase
static long turns;                                  // of the scheduler since the last barrier opened

inline void wait_a_turn() {
  const int me = current;
  swapcontext(&contexts[me], &scheduler);
  threadIdx = {me, 0, 0};
}
inline void __syncthreads() {
  const int round = block_round;
  if (++waiting_block == threads) { waiting_block = 0; block_round++; turns = 0; }
  else while (block_round == round) wait_a_turn();
}

// What the lanes of a warp show each other: all 32 take part, as in the kernel
struct Shown { unsigned word[6]; };
static Shown shown[MOST_THREADS / 32][2][32];
inline const Shown* exchange(const Shown& mine) {
  const int w = threadIdx.x / 32, round = warp_round[w];
  shown[w][round & 1][threadIdx.x % 32] = mine;
  if (++waiting[w] == 32) { waiting[w] = 0; warp_round[w]++; turns = 0; }
  else while (warp_round[w] == round) wait_a_turn();
  return shown[w][round & 1];
}
inline void __syncwarp() { exchange({}); }
template <class T> inline T __shfl_sync(unsigned, T value, int from) {
  Shown s = {};
  memcpy(s.word, &value, 4);
  memcpy(&value, exchange(s)[from & 31].word, 4);
  return value;
}
template <class T> inline T __shfl_xor_sync(unsigned all, T value, int mask) { return __shfl_sync(all, value, (threadIdx.x % 32) ^ mask); }
template <class T> inline T __shfl_up_sync(unsigned all, T value, int by) {
  const int lane = threadIdx.x % 32;
  return __shfl_sync(all, value, lane >= by ? lane - by : lane);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  const Shown* all = exchange({{value}});
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= all[i].word[0] << i;
  return bits;
}
inline bool __any_sync(unsigned all, bool value) { return __ballot_sync(all, value) != 0; }
inline int __reduce_max_sync(unsigned, int value) {
  const Shown* all = exchange({{(unsigned)value}});
  for (int i = 0; i < 32; i++) value = std::max(value, (int)all[i].word[0]);
  return value;
}

inline int __reduce_add_sync(unsigned, int value) {
  const Shown* all = exchange({{(unsigned)value}});
  value = 0;
  for (int i = 0; i < 32; i++) value += (int)all[i].word[0];
  return value;
}
static int votes[2];
inline bool __syncthreads_or(bool value) {
  const int mine = block_round / 2 % 2;             // a vote takes two barriers
  votes[mine] |= value;
  __syncthreads();
  const bool any = votes[mine];
  __syncthreads();
  votes[mine] = 0;
  return any;
}

inline int __ffs(unsigned x) { return __builtin_ffs((int)x); }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float __int_as_float(int x) { return __uint_as_float((unsigned)x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned select) {
  const unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) out |= (unsigned)(both >> 8 * (select >> 4 * i & 7) & 255) << 8 * i;
  return out;
}
template <class T> inline T __ldcg(const T* p) {
  if ((size_t)p % sizeof(T)) { printf("a load of %zu bytes is not aligned\n", sizeof(T)); abort(); }
  return *p;
}
inline size_t __cvta_generic_to_shared(const void* p) { return (const unsigned char*)p - memory; }

static std::function<void()> body;
static void run() {
  const int me = current;
  threadIdx = {me, 0, 0};
  body();
  ended[me] = true;
  swapcontext(&contexts[me], &scheduler);
}
static int launch(std::function<void()> kernel, int grid, int block) {   // 1: threads wait for each other in vain
  static std::vector<char> stacks((size_t)MOST_THREADS * STACK);
  body = kernel; threads = block; gridDim = {grid, 1, 1};
  for (int b = 0; b < grid; b++) {
    blockIdx = {b, 0, 0};
    memset(memory, 0xEE, sizeof memory);            // poison
    memset(copies, 0, sizeof copies);
    memset(waiting, 0, sizeof waiting);
    waiting_block = turns = 0;
    for (int i = 0; i < block; i++) {
      getcontext(&contexts[i]);
      contexts[i].uc_stack.ss_sp = stacks.data() + (size_t)i * STACK;
      contexts[i].uc_stack.ss_size = STACK;
      makecontext(&contexts[i], run, 0);
      ended[i] = false;
    }
    for (bool left = true; left;) {
      left = false;
      if (++turns > 10000) return 1;
      for (int i = 0; i < block; i++)
        if (!ended[i]) {
          left = true;
          current = i;
          threadIdx = {i, 0, 0};
          swapcontext(&scheduler, &contexts[i]);
        }
    }
  }
  return 0;
}
