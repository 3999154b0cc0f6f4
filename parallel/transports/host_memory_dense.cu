// All-reduce of the messages of a batch of tokens in one hop through host memory (dense_call.cuh), exact: most lines are a
// unit whose tagged half words are left out; those are gathered in lines of their own.

#include "host_memory_common.cuh"

#define UNIT_BYTES 16
#define LANES 32
#define LINES 8
#define UNITS 7

__device__ __forceinline__ u32 tagged(u32 low_half, u32 tag) { return (low_half & 0xffffu) | tag << 16; }
__device__ __forceinline__ u32 high_halves(u32 first, u32 second) { return first >> 16 | (second & 0xffff0000u); }
__device__ __forceinline__ u32 joined(u32 low_half, u32 high_half) { return (low_half & 0xffffu) | high_half << 16; }

#include "host_memory_lines.cuh"

// The upper half of w gives way; line 7 has those of all seven units.
template <class Element>
__device__ __forceinline__ void pack(const uint4* units, uint4* lines, u32 tag) {
#pragma unroll
  for (int i = 0; i < UNITS; ++i)
    lines[i] = make_uint4(units[i].x, units[i].y, units[i].z, tagged(units[i].w, tag));
  lines[7] = make_uint4(high_halves(units[0].w, units[1].w), high_halves(units[2].w, units[3].w),
                        high_halves(units[4].w, units[5].w), tagged(units[6].w >> 16, tag));
}

// Unit `i` of the lines.
__device__ __forceinline__ uint4 unpack(const uint4* lines, int i) {
  const u32 pair = i < 2 ? lines[7].x : i < 4 ? lines[7].y : i < 6 ? lines[7].z : lines[7].w;
  return make_uint4(lines[i].x, lines[i].y, lines[i].z, joined(lines[i].w, i & 1 ? pair >> 16 : pair));
}

template <class Element>
__device__ __forceinline__ uint4 sum_units(const uint4* units) {
  u32 words[4][WORLD];
#pragma unroll
  for (int r = 0; r < WORLD; ++r)
    words[0][r] = units[r].x, words[1][r] = units[r].y, words[2][r] = units[r].z, words[3][r] = units[r].w;
  return make_uint4(Sum<Element>::of(words[0]), Sum<Element>::of(words[1]), Sum<Element>::of(words[2]),
                    Sum<Element>::of(words[3]));
}

// Calls `give(i, unit)` with the sums of the units of a lane: its own, and those in the peers' lines.
template <class Element, class Give>
__device__ __forceinline__ void sum_tile(const uint4* own, const uint4*, const uint4 (*lines)[LINES],
                                         int rank, Give give) {
#pragma unroll
  for (int i = 0; i < UNITS; ++i) {
    uint4 values[WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; ++r) values[r] = r == rank ? own[i] : unpack(lines[r], i);
    give(i, sum_units<Element>(values));
  }
}

#include "dense_call.cuh"

KERNEL(reduce_bfloat16, BFloat16)
KERNEL(reduce_float16, Float16)
KERNEL(reduce_float32, float)
