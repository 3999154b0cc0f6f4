// CUDA, and parallel/kernels/device.cuh, on a CPU: a fiber for each thread of a block, meeting where a warp does.
// Asynchronous copies arrive as early or as late as they may, as copy_early says.
#define DEVICE_CUH

#include "fibers.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef unsigned int u32;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float4 { float x, y, z, w; };
struct Index { int x, y; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Copy { char* to; const void* from; int bytes; };
struct Product { float (*sums)[4]; const u32* weights; u32 tokens; };
struct Thread {
  Index index, block;
  // What it has asked for since it last committed, and what it has committed and not waited for.
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> committed;
  std::vector<Product> asked;
  std::deque<std::vector<Product>> under_way;
};
static std::vector<Thread> threads;
inline Thread& this_thread() { return threads[fibers::running]; }
#define threadIdx this_thread().index
#define blockIdx this_thread().block
static Index gridDim;
using std::max;
using std::min;

// Each block finds NaN in it.
#ifndef SHARED_KIB
#define SHARED_KIB 99
#endif
alignas(1024) static unsigned char dynamic_shared[SHARED_KIB * 1024];
#define DYNAMIC_SHARED(name) unsigned char* const name = dynamic_shared
#define DYNAMIC_SHARED_AT(alignment, name) DYNAMIC_SHARED(name)

using fibers::Barrier;
struct Warp : Barrier {
  u32 a[32][4], b[32][2], word[32];
  Warp() : Barrier(32) {}
};
static Barrier* block;
static Warp* warps;
inline Warp& own_warp() { return warps[threadIdx.x / 32]; }
inline int own_lane() { return threadIdx.x % 32; }
inline void __syncwarp() { own_warp().meet(); }
inline void __syncthreads() { block->meet(); }
static int agreed;
inline int __syncthreads_or(int mine) {
  block->meet();
  agreed = 0;
  block->meet();
  if (mine) agreed = 1;
  block->meet();
  return agreed;
}
inline void __threadfence() {}
inline u32 atomicInc(u32* counter, u32 last) {
  const u32 found = *counter;
  *counter = found >= last ? 0 : found + 1;
  return found;
}
inline u32 __shfl_sync(u32, u32 value, int lane) {
  Warp& warp = own_warp();
  warp.word[own_lane()] = value;
  warp.meet();
  const u32 found = warp.word[lane];
  warp.meet();
  return found;
}
inline float __shfl_xor_sync(u32 mask, float value, int lanes) {
  u32 bits;
  memcpy(&bits, &value, 4);
  bits = __shfl_sync(mask, bits, own_lane() ^ lanes);
  memcpy(&value, &bits, 4);
  return value;
}
// Each rounds by itself; built without FMA, as here, all of C++'s do.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
template <class T> inline T __ldg(const T* from) { return *from; }
template <class T> inline T __ldcs(const T* from) { return *from; }
template <class T> inline void __stcs(T* to, const T& value) { *to = value; }
template <class T> inline T __ldcg(const T* from) { return *from; }
inline float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline u32 __float_as_uint(float value) { u32 bits; memcpy(&bits, &value, 4); return bits; }

// What kernels before this one wrote: a block finds NaN there until all its threads have waited.
struct Fresh {
  const void* written;
  std::vector<char> there;
  char* of(const void* memory, size_t bytes) {
    written = memory;
    there.resize(bytes);
    return there.data();
  }
  void poison() { std::fill(there.begin(), there.end(), -1); }
  void arrive() { memcpy(there.data(), written, there.size()); }
};
static Fresh fresh;
inline void wait_for_predecessors() {
  block->meet();
  if (threadIdx.x == 0) fresh.arrive();
  block->meet();
}
inline void let_successor_start() {}
template <class T> inline T load_fresh(const T* from) { return *from; }

static char origin;
static bool is_early;
extern "C" void copy_early(int early) { is_early = early; }
inline u32 shared_address(const void* memory) { return (u32)((const char*)memory - &origin); }
template <int bytes = 16> inline void copy_async(u32 shared, const void* global) {
  char* to = &origin + (int32_t)shared;
  if ((uintptr_t)to % bytes || (uintptr_t)global % bytes) abort();
  if (is_early) memcpy(to, global, bytes);
  else this_thread().started.push_back({to, global, bytes});
}
// What was asked for since it was last called becomes one of those that are waited for.
template <class T> inline void commit(std::vector<T>& asked, std::deque<std::vector<T>>& committed) {
  committed.push_back(std::move(asked));
  asked.clear();
}
inline void commit_copies() { commit(this_thread().started, this_thread().committed); }
template <int pending> inline void await_copies() {
  for (auto& committed = this_thread().committed; (int)committed.size() > pending; committed.pop_front())
    for (const Copy& copy : committed.front()) memcpy(copy.to, copy.from, copy.bytes);
}

inline float low(u32 pair) { return __uint_as_float(pair << 16); }
inline float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
inline float from_bf16(u32 bits) { return __uint_as_float(bits << 16); }
inline u32 widen_half(unsigned short bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  float size = exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return __float_as_uint(bits & 0x8000 ? -size : size);
}
inline unsigned short to_bf16(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_pair(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }
inline u32 fma_half(u32 a, u32 b, u32 c) { return to_bf16(from_bf16(a) * (double)from_bf16(b) + from_bf16(c)); }
inline u32 fma_pair(u32 a, u32 b, u32 c) {
  return fma_half(a & 0xffff, b & 0xffff, c & 0xffff) | fma_half(a >> 16, b >> 16, c >> 16) << 16;
}
inline u32 permute(u32 a, u32 b, u32 selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    const u32 nibble = selector >> 4 * i & 15;
    const u32 byte = both >> 8 * (nibble & 7) & 255;
    result |= (nibble & 8 ? (byte & 128 ? 255 : 0) : byte) << 8 * i;
  }
  return result;
}

// Fragments of mma.m16n8k16, from the PTX manual: a[16][16] and b[16][8] in registers of bf16 pairs, c[16][8] in float32.
inline void multiply(float* c, const u32* a, u32 b0, u32 b1) {
  Warp& warp = own_warp();
  memcpy(warp.a[own_lane()], a, 16);
  warp.b[own_lane()][0] = b0;
  warp.b[own_lane()][1] = b1;
  warp.meet();
  for (int j = 0; j < 4; j++) {
    const int row = own_lane() / 4 + j / 2 * 8, column = own_lane() % 4 * 2 + j % 2;
    double sum = c[j];
    for (int k = 0; k < 16; k++) {
      const u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], right = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += (double)from_bf16(left >> k % 2 * 16 & 0xffff) * from_bf16(right >> k % 2 * 16 & 0xffff);
    }
    c[j] = sum;
  }
  warp.meet();
}

// One block after the other, from the first on or from the last.
template <class Kernel> void run_grid(Index grid, int num_threads, const Kernel& kernel, bool backwards = false) {
  gridDim = grid;
  for (int place = 0; place < grid.x * grid.y; place++) {
    const int i = backwards ? grid.x * grid.y - 1 - place : place;
    memset(dynamic_shared, 255, sizeof dynamic_shared);
    fresh.poison();
    Barrier meeting(num_threads);
    std::vector<Warp> all(num_threads / 32);
    block = &meeting;
    warps = all.data();
    threads.assign(num_threads, {});
    fibers::run(num_threads, [&](int t) {
      this_thread().index = {t, 0}, this_thread().block = {i % grid.x, i / grid.x};
      kernel();
    });
  }
}

#if defined(RUN_GROUPS)
#include "emulated_groups.h"
#endif
#include KERNEL_FILE

#if CODEBOOK
#define CODEBOOK_ARGUMENT , (const u32*)codebook
#else
#define CODEBOOK_ARGUMENT
#endif

#if defined(RUN_WIDE)

extern "C" void run_wide(const void* weights, const void* scales, const void* codebook, const void* x, void* y, void* parts,
                         int num_tiles, int units, int num_rows, int num_blocks, int backwards) {
  const char* rows = fresh.of(x, (size_t)num_rows * units * 256);
  run_grid({num_blocks, 1}, THREADS, [=] {
    wide((const uint4*)weights, (const unsigned char*)scales, (const uint4*)rows, (unsigned short*)y, (float4*)parts, num_tiles, units,
         num_rows CODEBOOK_ARGUMENT);
  }, backwards);
}

#elif defined(RUN_GROUPS)

// How many counters of arrivals are left above zero.
extern "C" int run_groups(const void* weights, const void* scales, const void* codebook, const void* x, void* y, void* parts,
                          int num_tiles, int units, int num_rows, int num_blocks, int num_waves, int sharing, int backwards) {
  const char* rows = fresh.of(x, (size_t)num_rows * units * 256);
  const int groups = PARTS ? units * PARTS : 1;
  const TensorMap maps[3] = {
      describe(weights, num_tiles, (long)units * WEIGHT_BYTES, ROW_TILES, WEIGHT_BYTES, 8, false),
      describe(scales, num_tiles, (long)groups * GROUP_BYTES, ROW_TILES, SCALE_STEP, 8, false),
      describe(rows, num_rows, (long)units * 256, TOKENS, 128, 2, true),
  };
  run_grid({num_blocks, 1}, THREADS + COPIERS, [=] {
    wide(maps[0], maps[1], maps[2], (const unsigned char*)scales, (unsigned short*)y, (float4*)parts, num_tiles, units, num_rows,
         num_waves, sharing CODEBOOK_ARGUMENT);
  }, backwards);
  return std::count_if(arrivals, arrivals + MAX_TILES, [](u32 count) { return count != 0; });
}

#elif defined(RUN_DEQUANTIZE)

extern "C" void run_dequantize(const void* weights, const void* scales, const void* codebook, void* out, int num_tiles,
                               int units, int num_blocks) {
  run_grid({num_blocks, 1}, WARPS * 32, [=] {
    dequantize_weight((const uint4*)weights, (const unsigned char*)scales, (uint4*)out, num_tiles, units CODEBOOK_ARGUMENT);
  });
}

#elif defined(RUN_DEQUANTIZE_HOST)

extern "C" void run_dequantize_host(const void* packed, const void* scales, void* out, int num_in, int num_out, int all,
                                    int group_size) {
  run_grid({num_out / BLOCK, num_in / group_size}, THREADS, [=] {
    dequantize_host((const u32*)packed, (const u32*)scales, (uint4*)out, num_in, num_out, all, group_size);
  });
}

#elif defined(RUN_PACK_EIGHT)

extern "C" void run_pack(const void* values, void* packed, int units, int num_quarters, int num_blocks) {
  run_grid({num_blocks, 1}, WARPS * 32, [=] { pack_eight_bits((const uint2*)values, (uint4*)packed, units, num_quarters); });
}

#elif defined(RUN_PACK)

extern "C" void run_pack(const void* values, void* packed, int units, int num_halves, int num_blocks) {
  run_grid({num_blocks, 1}, WARPS * 32, [=] { pack_four_bits((const uint2*)values, (uint4*)packed, units, num_halves); });
}

#elif defined(RUN_ROUND)

extern "C" void run_round(const void* weight, void* values, void* scales, void* zeros, int num_in, int groups_in_row,
                          int num_groups, int num_blocks) {
  run_grid({num_blocks, 1}, WARPS * 32, [=] {
    round_groups((const Stored*)weight, (unsigned char*)values, (unsigned short*)scales, (unsigned char*)zeros, num_in,
                 groups_in_row, num_groups);
  });
}

#else

extern "C" void run_multiply(const void* weights, const void* scales, const void* codebook, const void* x, void* y,
                             int num_out, int num_in, int num_rows) {
  const char* rows = fresh.of(x, (size_t)num_rows * num_in * 2);
  run_grid({num_out / 16 / RT, 1}, WARPS * 32, [=] {
    MULTIPLY((const uint4*)weights, (const unsigned char*)scales, (const unsigned short*)rows, (unsigned short*)y, num_out, num_in,
             num_rows CODEBOOK_ARGUMENT);
  });
}

#endif
