// CUDA, as the kernels through host memory use it, on threads of a CPU: those of all ranks at once. KERNEL_FILE is a
// source whose instructions are calls of what is here. Accesses of 16 bytes are single ones, in any order, or where they
// are of two words those are. NORM: it is the kernel with a norm. ONLY_16_BITS: it is one that takes no float32. BYTES:
// messages are any bytes, and are gathered too where a value has one.
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static thread_local

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static thread_local Index threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;

// Where threads meet, and what any of them says.
struct Group {
  std::barrier<> meeting;
  std::atomic<int> said{0};
  std::atomic<uint64_t> word{0};
  float floats[32];
  explicit Group(int threads) : meeting(threads) {}
  void meet() { meeting.arrive_and_wait(); }
  int any(int mine) {
    if (mine) said = 1;
    meet();
    const int found = said;
    meet();
    said = 0;
    meet();
    return found;
  }
  // The word of the first thread, on all.
  uint64_t first(int thread, uint64_t mine) {
    if (thread == 0) word = mine;
    meet();
    const uint64_t found = word;
    meet();
    return found;
  }
};
static thread_local Group *block, *warp;
inline int __any_sync(unsigned, int mine) { return warp->any(mine); }
inline int __syncthreads_or(int mine) { return block->any(mine); }
inline float __shfl_xor_sync(unsigned, float mine, int step) {
  const int lane = threadIdx.x % 32;
  warp->floats[lane] = mine;
  warp->meet();
  const float found = warp->floats[lane ^ step];
  warp->meet();
  return found;
}
template <class T> inline T __ldg(const T* from) { return *from; }
inline float rsqrtf(float value) { return 1 / sqrtf(value); }

inline float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline uint32_t __float_as_uint(float value) { uint32_t bits; memcpy(&bits, &value, 4); return bits; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdividef(float above, float below) { return above / below; }
// Bytes of the two words, four bits of `choice` for each.
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t choice) {
  const uint64_t words = (uint64_t)high << 32 | low;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i) found |= (uint32_t)(words >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
  return found;
}
inline int __ffs(int bits) { return __builtin_ffs(bits); }
typedef unsigned long long Wide;
inline Wide atomicAdd(Wide* at, Wide more) { return __atomic_fetch_add(at, more, __ATOMIC_SEQ_CST); }
inline Wide atomicExch(Wide* at, Wide next) { return __atomic_exchange_n(at, next, __ATOMIC_SEQ_CST); }
inline uint32_t atomicCAS(uint32_t* at, uint32_t expected, uint32_t next) {
  __atomic_compare_exchange_n(at, &expected, next, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}

inline Wide nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
inline uint32_t rounded(float value) {
  const uint32_t bits = __float_as_uint(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static std::mutex whole_line;
inline void store_line(void* line, uint4 v) {
  const std::lock_guard held(whole_line);
  Wide* words = (Wide*)line;
  __atomic_store_n(words + 1, (Wide)v.w << 32 | v.z, __ATOMIC_RELEASE);
  std::this_thread::yield();
  __atomic_store_n(words, (Wide)v.y << 32 | v.x, __ATOMIC_RELEASE);
}
inline void load_line(const void* line, Wide& low, Wide& high) {
  std::this_thread::yield();
  const std::lock_guard held(whole_line);
  low = __atomic_load_n((const Wide*)line, __ATOMIC_ACQUIRE);
  high = __atomic_load_n((const Wide*)line + 1, __ATOMIC_ACQUIRE);
}
// Two words, now the one and now the other first.
inline void store_words(void* line, Wide first, Wide second) {
  const int late = (uintptr_t)line >> 4 & 1;
  __atomic_store_n((Wide*)line + 1 - late, late ? first : second, __ATOMIC_RELEASE);
  std::this_thread::yield();
  __atomic_store_n((Wide*)line + late, late ? second : first, __ATOMIC_RELEASE);
}
inline void load_words(const void* line, Wide& first, Wide& second) {
  first = __atomic_load_n((const Wide*)line, __ATOMIC_ACQUIRE);
  std::this_thread::yield();
  second = __atomic_load_n((const Wide*)line + 1, __ATOMIC_ACQUIRE);
}

#include KERNEL_FILE

template <class Kernel>
void launch(std::vector<std::thread>& threads, Kernel kernel, int blocks, int num_threads) {
  for (int b = 0; b < blocks; ++b) {
    auto of_block = std::make_shared<Group>(num_threads);
    std::vector<std::shared_ptr<Group>> warps;
    for (int w = 0; w < num_threads / 32; ++w) warps.push_back(std::make_shared<Group>(32));
    for (int t = 0; t < num_threads; ++t)
      threads.emplace_back([=] {
        threadIdx.x = t, blockIdx.x = b, blockDim.x = num_threads, gridDim.x = blocks;
        block = of_block.get(), warp = warps[t / 32].get();
        kernel();
      });
  }
}

// One call of the ranks `first` to `last`.
#ifdef NORM
extern "C" void run(uint4** in, uint4** residual, uint4* weight, uint4** out, State* states, u64** sums, u8* region,
                    int rows, int pieces, int slot_lines, int row_blocks, float eps, int first, int last, int timeout_ms,
                    int num_threads) {
  std::vector<std::thread> threads;
  for (int r = first; r <= last; ++r)
    launch(threads,
           [=] {
             reduce_bfloat16_and_norm(in[r], residual[r], weight, out[r], states + r, sums[r], region, pieces, slot_lines,
                                      row_blocks, r, timeout_ms, eps);
           },
           rows * row_blocks, num_threads);
  for (std::thread& thread : threads) thread.join();
}
#else
#ifdef BYTES
typedef u8 Message;
#else
typedef uint4 Message;
#endif

extern "C" void run(int bytes_per_value, Message** in, Message** out, State* states, u8* region, int num_bytes,
                    int slot_tiles, int first, int last, int timeout_ms, int blocks, int num_threads) {
#ifdef ONLY_16_BITS
  auto kernel = reduce_bfloat16;
#else
  auto kernel = bytes_per_value == 2 ? reduce_bfloat16 : reduce_float32;
#endif
#ifdef BYTES
  if (bytes_per_value == 1) kernel = gather_bytes;
#endif
  std::vector<std::thread> threads;
  for (int r = first; r <= last; ++r)
    launch(threads, [=] { kernel(in[r], out[r], states + r, region, num_bytes, slot_tiles, r, timeout_ms); }, blocks,
           num_threads);
  for (std::thread& thread : threads) thread.join();
}
#endif
