// CUDA, and the instructions of parallel/kernels/attention.cuh, on a CPU: a fiber for each thread of a block, meeting where
// a warp does. Asynchronous copies arrive as early (EAGER) or as late as they may. Blocks of a cluster run beside one
// another, each with a copy of the kernel, as what is static in it is the block's own.
#define ATTENTION_CUH

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
#define DYNAMIC_SHARED(name) u8* const name = own_block().memory
#define CLUSTER_SHAPE
#define SHARED_IN_CLUSTER(type, name) type& name = *(type*)own_block().shared_in_cluster
#define STARTS_EARLY 1
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
static Index gridDim;

using fibers::Barrier;
struct Warp : Barrier {
  u32 a[32][4], b[32][2], word[32];
  Warp() : Barrier(32) {}
};
struct Block {
  // NaN when the block starts.
  alignas(16) u8 memory[99 * 1024], shared_in_cluster[32 * 1024];
  Barrier barrier{WARPS * 32};
  Warp warps[WARPS];
};
static Block blocks[CLUSTER];
struct Copy { u8* to; const void* from; bool present; };
struct Thread {
  Block* block;
  Index index, place;
  // What it has asked for since it last committed, and what it has committed and not waited for.
  std::vector<Copy> started;
  std::deque<std::vector<Copy>> committed;
};
static std::vector<Thread> threads;
inline Thread& this_thread() { return threads[fibers::running]; }
#define threadIdx this_thread().index
#define blockIdx this_thread().place
static Barrier cluster_barrier(CLUSTER* WARPS * 32);
inline Block& own_block() { return *this_thread().block; }
inline Warp& own_warp() { return own_block().warps[threadIdx.x / 32]; }
inline int own_lane() { return threadIdx.x % 32; }
inline void __syncwarp() { own_warp().meet(); }
inline void __syncthreads() { own_block().barrier.meet(); }
inline void arrive_at_cluster() {}
inline void wait_for_cluster() {}
inline void expect_bytes(u64*, int) {}
inline void await_bytes(u64*) { cluster_barrier.meet(); }
template <class T> inline void store_in_block(T* own, int rank, const T& value, u64*) {
  *(T*)(blocks[rank].shared_in_cluster + ((u8*)own - own_block().shared_in_cluster)) = value;
}

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
// What the kernel ahead writes: a block finds bytes of 255 there until all its threads have waited.
struct Written {
  const u8* from;
  std::vector<u8> there;
  std::vector<size_t> rows;
  size_t row_bytes;
  void start(const void* written, size_t bytes, size_t bytes_of_row) {
    from = (const u8*)written, row_bytes = bytes_of_row;
    there.assign(from, from + bytes);
    rows.clear();
  }
  void poison() {
    for (size_t at : rows) memset(there.data() + at, 255, row_bytes);
  }
  void arrive() {
    for (size_t at : rows) memcpy(there.data() + at, from + at, row_bytes);
  }
};
static Written query_there, keys_there, values_there;
inline void wait_for_predecessors() {
  __syncthreads();
  if (threadIdx.x == 0) query_there.arrive(), keys_there.arrive(), values_there.arrive();
  __syncthreads();
}
inline int load_kept(const int* from) { return *from; }
inline void let_successor_start() {}
template <class T> inline T load_fresh(const T* from) { return *from; }

inline u32 count_up(u32* counter, u32 last) {
  const u32 found = *counter;
  *counter = found >= last ? 0 : found + 1;
  return found;
}

inline u32 shared_address(const void* memory) { return (const u8*)memory - own_block().memory; }
inline void arrive(const Copy& copy) {
  if (copy.present) memcpy(copy.to, copy.from, 16);
  else memset(copy.to, 0, 16);
}
inline void copy_async(u32 shared, const void* global, bool present) {
  auto& started = this_thread().started;
  started.push_back({own_block().memory + shared, global, present});
  if (EAGER) arrive(started.back()), started.clear();
}
inline void commit_copies() {
  auto& started = this_thread().started;
  this_thread().committed.push_back(std::move(started));
  started.clear();
}
template <int pending> inline void await_copies() {
  for (auto& committed = this_thread().committed; (int)committed.size() > pending; committed.pop_front())
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

namespace rank0 {
#define paged_attention attention_of_rank0
#include KERNEL_FILE
#undef paged_attention
}
#if CLUSTER > 1
namespace rank1 {
#define paged_attention attention_of_rank1
#include KERNEL_FILE
#undef paged_attention
}
#endif
#if CLUSTER > 2
namespace rank2 {
#define paged_attention attention_of_rank2
#include KERNEL_FILE
#undef paged_attention
}
namespace rank3 {
#define paged_attention attention_of_rank3
#include KERNEL_FILE
#undef paged_attention
}
#endif
using Kernel = decltype(&rank0::attention_of_rank0);
static const Kernel kernels[CLUSTER] = {
    rank0::attention_of_rank0,
#if CLUSTER > 1
    rank1::attention_of_rank1,
#endif
#if CLUSTER > 2
    rank2::attention_of_rank2, rank3::attention_of_rank3,
#endif
};

// The tokens of a sequence that the kernel ahead writes.
inline void mark_new(const int* pages, int first, int length, int kv_heads) {
  for (int token = std::max(0, first); token < length; token++)
    for (int head = 0; head < kv_heads; head++) {
      const size_t row = ((size_t)pages[token / PAGE_SIZE] * kv_heads + head) * PAGE_SIZE + token % PAGE_SIZE;
      keys_there.rows.push_back(row * ROW_BYTES), values_there.rows.push_back(row * ROW_BYTES);
    }
}

extern "C" void run_attention(const void* query, const void* keys, const void* values, const int* block_table,
                              const int* lengths, const int* starts, const void* masks, void* out, void* partial,
                              void* maxima_sums, float scale_log2, int query_stride, int table_stride, int max_pages,
                              int kv_heads, int group, int rows, int words, int grid_x, int splits, int sequences,
                              int num_pages) {
  gridDim = {grid_x, splits, sequences};
  const size_t query_bytes = (((size_t)sequences * rows - 1) * query_stride + kv_heads * group * HEAD_DIM) * 2;
  const size_t page_bytes = (size_t)num_pages * kv_heads * PAGE_SIZE * ROW_BYTES;
  query_there.start(query, query_bytes, query_bytes);
  query_there.rows.push_back(0);
  keys_there.start(keys, page_bytes, ROW_BYTES);
  values_there.start(values, page_bytes, ROW_BYTES);
  for (int i = 0; i < sequences; i++)
    mark_new(block_table + (size_t)i * table_stride, TREE ? starts[i] : lengths[i] - 1, lengths[i], kv_heads);
  for (int i = 0; i < grid_x * splits / CLUSTER * sequences; i++) {
    query_there.poison(), keys_there.poison(), values_there.poison();
    const int x = i % grid_x, first_split = i / grid_x % (splits / CLUSTER) * CLUSTER, z = i / grid_x / (splits / CLUSTER);
    for (Block& each : blocks) {
      memset(each.memory, 255, sizeof each.memory);
      memset(each.shared_in_cluster, 255, sizeof each.shared_in_cluster);
    }
    threads.assign(CLUSTER * WARPS * 32, {});
    fibers::run(CLUSTER * WARPS * 32, [&](int number) {
      const int rank = number / (WARPS * 32), t = number % (WARPS * 32);
      Thread& own = this_thread();
      own.block = &blocks[rank], own.index = {t, 0, 0}, own.place = {x, first_split + rank, z};
      kernels[rank]((const u16*)query_there.there.data(), keys_there.there.data(), values_there.there.data(), block_table,
                    lengths, starts, (const u64*)masks, (u16*)out, (float*)partial, (float*)maxima_sums, scale_log2,
                    query_stride, table_stride, max_pages, kv_heads, group, rows, words);
    });
  }
}
