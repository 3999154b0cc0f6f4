// CUDA, and the instructions of parallel/kernels/attention.cuh, on threads of a CPU: one for each of a block's, meeting
// where a warp does. Asynchronous copies arrive as early (EAGER) or as late as they may.
#define ATTENTION_CUH

#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) u8* const name = dynamic_shared
#define FULL 0xffffffffu
#define LOWEST (-INFINITY)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct Index { int x, y, z; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
static thread_local Index threadIdx, blockIdx;
static Index gridDim;

// Each block finds NaN in it.
alignas(16) static u8 dynamic_shared[99 * 1024];

struct Warp {
  pthread_barrier_t barrier;
  u32 a[32][4], b[32][2], word[32];
};
static pthread_barrier_t block_barrier;
static Warp all_warps[32];
inline Warp& own_warp() { return all_warps[threadIdx.x / 32]; }
inline int own_lane() { return threadIdx.x % 32; }
inline void __syncwarp() { pthread_barrier_wait(&own_warp().barrier); }
inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }

template <class T> inline T from_lane(T value, int lane) {
  static_assert(sizeof(T) == 4, "a register");
  memcpy(&own_warp().word[own_lane()], &value, 4);
  __syncwarp();
  memcpy(&value, &own_warp().word[lane], 4);
  __syncwarp();
  return value;
}
template <class T> inline T __shfl_sync(u32, T value, int lane) { return from_lane(value, lane); }
template <class T> inline T __shfl_xor_sync(u32, T value, int mask) { return from_lane(value, own_lane() ^ mask); }
inline bool __any_sync(u32, bool mine) {
  bool any = false;
  own_warp().word[own_lane()] = mine;
  __syncwarp();
  for (u32 each : own_warp().word) any |= each;
  __syncwarp();
  return any;
}
template <class T> inline T __ldg(const T* from) { return *from; }
template <class T> inline T __ldcg(const T* from) { return *from; }
// What kernels before this one wrote: a block finds bytes of 255 there until all its threads have waited.
static const void* written_query;
static const int* written_lengths;
static std::vector<u8> there_query;
static std::vector<int> there_lengths;
inline void poison() {
  memset(there_query.data(), 255, there_query.size());
  memset(there_lengths.data(), 255, there_lengths.size() * 4);
}
inline void wait_for_predecessors() {
  __syncthreads();
  if (threadIdx.x == 0) {
    memcpy(there_query.data(), written_query, there_query.size());
    memcpy(there_lengths.data(), written_lengths, there_lengths.size() * 4);
  }
  __syncthreads();
}
inline void let_successor_start() {}
template <class T> inline T load_fresh(const T* from) { return *from; }

inline u32 count_up(u32* counter, u32 last) {
  const u32 found = *counter;
  *counter = found >= last ? 0 : found + 1;
  return found;
}

struct Copy { u8* to; const void* from; bool present; };
static thread_local std::vector<Copy> started;
static thread_local std::deque<std::vector<Copy>> committed;
inline u32 shared_address(const void* memory) { return (const u8*)memory - dynamic_shared; }
inline void arrive(const Copy& copy) {
  if (copy.present) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
inline void copy_async(u32 shared, const void* global, bool present) {
  started.push_back({dynamic_shared + shared, global, present});
  if (EAGER) arrive(started.back()), started.clear();
}
inline void commit_copies() { committed.push_back(std::move(started)); started.clear(); }
template <int pending> inline void await_copies() {
  for (; (int)committed.size() > pending; committed.pop_front())
    for (const Copy& copy : committed.front()) arrive(copy);
}

inline float __uint_as_float(u32 bits) { float value; memcpy(&value, &bits, 4); return value; }
inline float exp2_approximate(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }
inline u32 to_bf16(float value) {
  u32 bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_f16(float value) {
  const _Float16 half = value;
  u16 bits;
  memcpy(&bits, &half, 2);
  return bits;
}
inline float from_f16(u32 bits) {
  const u16 narrow = bits;
  _Float16 half;
  memcpy(&half, &narrow, 2);
  return half;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline u32 pack_f16(float low, float high) { return to_f16(low) | to_f16(high) << 16; }
inline float e4m3(u32 byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const float size = exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
  return (byte & 0x7f) == 0x7f ? NAN : byte & 128 ? -size : size;
}
inline void unpack_e4m3(u32 four, u32& low, u32& high) {
  low = pack_f16(e4m3(four & 255), e4m3(four >> 8 & 255));
  high = pack_f16(e4m3(four >> 16 & 255), e4m3(four >> 24));
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = (u64)b << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
// The 8x8 matrix whose row g lies in lanes (g, 0..3), two elements each, transposed.
inline u32 transpose(u32 pair) {
  Warp& warp = own_warp();
  const int row = own_lane() / 4, first = own_lane() % 4 * 2;
  warp.word[own_lane()] = pair;
  __syncwarp();
  auto at = [&](int r, int c) { return warp.word[r * 4 + c / 2] >> c % 2 * 16 & 0xffff; };
  const u32 found = at(first, row) | at(first + 1, row) << 16;
  __syncwarp();
  return found;
}

// Fragments of mma.m16n8k16, from the PTX manual: a[16][16] and b[16][8] in pairs, c[16][8] in float32.
inline void multiply(float* c, const u32* a, u32 b0, u32 b1) {
  auto value = [](u32 bits) { return QUERY_F16 || KV_FP8 ? from_f16(bits) : __uint_as_float(bits << 16); };
  Warp& warp = own_warp();
  memcpy(warp.a[own_lane()], a, 16);
  warp.b[own_lane()][0] = b0;
  warp.b[own_lane()][1] = b1;
  __syncwarp();
  for (int j = 0; j < 4; j++) {
    const int row = own_lane() / 4 + j / 2 * 8, column = own_lane() % 4 * 2 + j % 2;
    double sum = c[j];
    for (int k = 0; k < 16; k++) {
      const u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
      sum += (double)value(left >> k % 2 * 16 & 0xffff) * value(right >> k % 2 * 16 & 0xffff);
    }
    c[j] = sum;
  }
  __syncwarp();
}

#include KERNEL_FILE

extern "C" void run_attention(const void* query, const void* keys, const void* values, const void* block_table,
                              const void* lengths, const void* starts, const void* masks, void* out, void* partial,
                              void* maxima_sums, float scale_log2, int query_stride, int table_stride, int max_pages,
                              int kv_heads, int group, int rows, int words, int grid_x, int splits, int sequences) {
  gridDim = {grid_x, splits, sequences};
  written_query = query, written_lengths = (const int*)lengths;
  there_query.resize((((size_t)sequences * rows - 1) * query_stride + kv_heads * group * HEAD_DIM) * 2);
  there_lengths.resize(sequences);
  pthread_barrier_init(&block_barrier, nullptr, WARPS * 32);
  for (Warp& warp : all_warps) pthread_barrier_init(&warp.barrier, nullptr, 32);
  for (int i = 0; i < grid_x * splits * sequences; i++) {
    memset(dynamic_shared, 255, sizeof dynamic_shared);
    poison();
    std::vector<std::thread> threads;
    for (int t = 0; t < WARPS * 32; t++)
      threads.emplace_back([=] {
        threadIdx = {t, 0, 0};
        blockIdx = {i % grid_x, i / grid_x % splits, i / grid_x / splits};
        paged_attention((const u16*)there_query.data(), (const u8*)keys, (const u8*)values, (const int*)block_table,
                        there_lengths.data(), (const int*)starts, (const u64*)masks, (u16*)out, (float*)partial,
                        (float*)maxima_sums, scale_log2, query_stride, table_stride, max_pages, kv_heads, group, rows,
                        words);
      });
    for (std::thread& thread : threads) thread.join();
  }
}
