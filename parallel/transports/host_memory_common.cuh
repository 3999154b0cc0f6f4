// What the kernels through host memory share: element types and sums, the epoch of a launch, the limit on a wait.
//
// State, on the card, of one rank: the epoch in the upper and the blocks that have arrived in the lower half of one
// word, then the peer that did not answer, plus one. The last block to arrive bumps the epoch for the next launch, so
// that a captured graph replays correctly and grids may differ from call to call.
//
// A region begins with a page of error words, one a rank, 64 bytes apart.
//
// Defined by the host: WORLD, the number of ranks.

#include "../kernels/programmatic.cuh"

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned char u8;

#define PAGE_BYTES 4096
#define ERROR_STRIDE 64
// A poll takes about a microsecond; the clock is looked at once in so many.
#define POLLS_PER_LOOK 128

struct State {
  u64 epoch_and_arrived;
  u32 failed;
};

__device__ __forceinline__ u64 now_ns() {
  u64 time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

struct BFloat16 {
  static __device__ float low(u32 pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
  static __device__ u32 pair(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
};

struct Float16 {
  static __device__ float widen(unsigned short half) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(half));
    return result;
  }
  static __device__ float low(u32 pair) { return widen((unsigned short)pair); }
  static __device__ float high(u32 pair) { return widen((unsigned short)(pair >> 16)); }
  static __device__ u32 pair(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
  }
};

// Sums of four bytes of each rank, in float32, in rank order, rounded once.
template <class Element>
struct Sum {
  static __device__ u32 of(const u32* words) {
    float low = Element::low(words[0]), high = Element::high(words[0]);
#pragma unroll
    for (int r = 1; r < WORLD; ++r) low += Element::low(words[r]), high += Element::high(words[r]);
    return Element::pair(low, high);
  }
};

template <>
struct Sum<float> {
  static __device__ u32 of(const u32* words) {
    float sum = __uint_as_float(words[0]);
#pragma unroll
    for (int r = 1; r < WORLD; ++r) sum += __uint_as_float(words[r]);
    return __float_as_uint(sum);
  }
};

// Bounds the wait for a peer, so that its death becomes an error on the host and never a card that hangs.
struct Watch {
  u64 limit_ns, start_ns;
  u32 polls;

  __device__ bool given_up(State* state, u8* error, int peer) {
    if (++polls % POLLS_PER_LOOK) return false;
    if (*(volatile u32*)&state->failed) return true;
    const u64 now = now_ns();
    if (start_ns == 0) start_ns = now;
    if (now - start_ns < limit_ns) return false;
    if (atomicCAS(&state->failed, 0u, (u32)peer + 1) == 0)
      asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(error), "r"((u32)peer + 1) : "memory");
    return true;
  }
};

// The epoch of this launch. Zero is skipped when the count wraps: untouched lines carry it.
__device__ u32 enter(State* state) {
  const u64 before = atomicAdd(&state->epoch_and_arrived, 1ull);
  const u32 last = (u32)(before >> 32), epoch = last == 0xffffffffu ? 2u : last + 1;
  if ((u32)before == gridDim.x - 1) atomicExch(&state->epoch_and_arrived, (u64)epoch << 32);
  return epoch;
}

// Every thread of a block calls this first; false: an earlier call was given up, and nothing must wait again.
__device__ __forceinline__ bool begin(State* state, u32& epoch) {
  __shared__ u32 shared_epoch, shared_failed;
  if (threadIdx.x == 0) {
    shared_failed = *(volatile u32*)&state->failed;
    shared_epoch = enter(state);
  }
  __syncthreads();
  epoch = shared_epoch;
  return shared_failed == 0;
}

__device__ __forceinline__ Watch watch_for(int timeout_ms) { return Watch{(u64)timeout_ms * 1000000ull, 0, 0}; }
