// Adds what the copy engines have brought from the other ranks to a rank's own, for copies.py.
//
// Blocks of one warp and few registers, so that some fit beside a product that fills the multiprocessors.

#include "host_memory_common.cuh"

#define THREADS 32

// Units of 16 bytes. Peers lie in rank order without this rank, `stride` units apart. `out` may be `own`. Every launch
// leaves another number in `progress`, in host memory; `count` is on the card.
template <class Element>
__device__ __forceinline__ void add(const uint4* own, uint4* out, const uint4* peers, u32* count, u32* progress,
                                    int units, int stride, int rank) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *(volatile u32*)progress = atomicAdd(count, 1u) + 1;
  for (int at = blockIdx.x * THREADS + threadIdx.x; at < units; at += gridDim.x * THREADS) {
    uint4 values[WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; ++r) values[r] = *(r == rank ? own + at : peers + (r - (r > rank)) * stride + at);
    u32 words[4][WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; ++r) {
      words[0][r] = values[r].x, words[1][r] = values[r].y;
      words[2][r] = values[r].z, words[3][r] = values[r].w;
    }
    out[at] = make_uint4(Sum<Element>::of(words[0]), Sum<Element>::of(words[1]), Sum<Element>::of(words[2]),
                         Sum<Element>::of(words[3]));
  }
}

#define KERNEL(name, element)                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
  name(const uint4* own, uint4* out, const uint4* peers, u32* count, u32* progress, int units, int stride, int rank) { \
    add<element>(own, out, peers, count, progress, units, stride, rank);                                               \
  }

KERNEL(reduce_bfloat16, BFloat16)
KERNEL(reduce_float16, Float16)
KERNEL(reduce_float32, float)
