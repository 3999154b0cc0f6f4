// All-reduce in one hop through host memory (dense_call.cuh), of numbers of 16 bits rounded to 8 on their way.
//
// A line carries 12 numbers q of -127 to 127, and their scale in bfloat16 next to the tag: each number is q times that.
// Three units of a lane, 24 numbers, are two lines. A rank rounds its own numbers too, so that all ranks get the same
// bits. The scale is the largest size over 127; infinity or NaN makes NaN of the 12.

#include "host_memory_common.cuh"

#define UNIT_BYTES 16
#define LANES 32
#define LINES 2
#define UNITS 3
#define GROUP 12
#define LARGEST 127
#define SMALLEST 1.17549435e-38f  // A scale below it is held to be zero: 2^-126.

#include "host_memory_lines.cuh"

// Six words, of two numbers each.
template <class Element>
__device__ __forceinline__ void widen(const u32* words, float* values) {
#pragma unroll
  for (int i = 0; i < GROUP / 2; ++i) values[2 * i] = Element::low(words[i]), values[2 * i + 1] = Element::high(words[i]);
}

// The bits of sizes are in their order, NaN above infinity.
__device__ __forceinline__ float largest_size(const float* values) {
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < GROUP; ++i) largest = max(largest, __float_as_uint(values[i]) & 0x7fffffffu);
  return __uint_as_float(largest);
}

__device__ __forceinline__ u32 low_bytes(const int* q) {
  return (q[0] & 255) | (q[1] & 255) << 8 | (q[2] & 255) << 16 | (u32)q[3] << 24;
}

#define ROUNDS 12582912.0f  // 1.5 * 2^23: what is added to it is rounded to whole numbers, in its lowest bits.

// As the division: the remainder is exact. Not a number where it is infinite.
__device__ __forceinline__ float over_largest(float value) {
  const float near = value * (1.0f / LARGEST);
  return __fmaf_rn(__fmaf_rn(-(float)LARGEST, near, value), 1.0f / LARGEST, near);
}

// As the division, of numbers of eight bits from SMALLEST to 2^126.
__device__ __forceinline__ float inverse_of(float value) {
  const float near = __fdividef(1.0f, value);
  return __fmaf_rn(__fmaf_rn(-value, near, 1.0f), near, near);
}

__device__ __forceinline__ uint4 rounded_line(const float* values, u32 tag) {
  const u32 scale = BFloat16::pair(over_largest(largest_size(values)), 0.0f) & 0xffffu;
  const float size = BFloat16::low(scale), inverse = size < SMALLEST ? 0.0f : inverse_of(size);
  int q[GROUP];
#pragma unroll
  for (int i = 0; i < GROUP; ++i)
    q[i] = (int)__float_as_uint(fmaxf(-LARGEST, fminf(LARGEST, values[i] * inverse)) + ROUNDS);
  return make_uint4(low_bytes(q), low_bytes(q + 4), low_bytes(q + 8), scale | tag << 16);
}

template <class Element>
__device__ __forceinline__ void pack(const uint4* units, uint4* lines, u32 tag) {
#pragma unroll
  for (int i = 0; i < LINES / 2; ++i) {
    const uint4 *a = units + 3 * i, *b = a + 1, *c = a + 2;
    const u32 words[GROUP] = {a->x, a->y, a->z, a->w, b->x, b->y, b->z, b->w, c->x, c->y, c->z, c->w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[GROUP];
      widen<Element>(words + half * GROUP / 2, values);
      lines[2 * i + half] = rounded_line(values, tag);
    }
  }
}

__device__ __forceinline__ void add_bytes(u32 word, float scale, float* sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // 2^23 and the byte plus 128 are the bits of their sum.
    const float number = __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440 | i)) - 8388736.0f;
    sums[i] += number * scale;
  }
}

// The sums of one line's numbers over the ranks, in rank order, rounded once, two to a word.
template <class Element>
__device__ __forceinline__ void sum_line(const uint4* of_ranks, u32* words) {
  float sums[GROUP] = {};
#pragma unroll
  for (int r = 0; r < WORLD; ++r) {
    const float scale = BFloat16::low(of_ranks[r].w);
    add_bytes(of_ranks[r].x, scale, sums);
    add_bytes(of_ranks[r].y, scale, sums + 4);
    add_bytes(of_ranks[r].z, scale, sums + 8);
  }
#pragma unroll
  for (int i = 0; i < GROUP / 2; ++i) words[i] = Element::pair(sums[2 * i], sums[2 * i + 1]);
}

// Calls `give(i, unit)` with the sums of the units of a lane: those of its own lines, and of the peers'.
template <class Element, class Give>
__device__ __forceinline__ void sum_tile(const uint4*, const uint4* mine, const uint4 (*lines)[LINES],
                                         int rank, Give give) {
#pragma unroll
  for (int i = 0; i < LINES / 2; ++i) {
    u32 words[GROUP];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint4 of_ranks[WORLD];
#pragma unroll
      for (int r = 0; r < WORLD; ++r) of_ranks[r] = r == rank ? mine[2 * i + half] : lines[r][2 * i + half];
      sum_line<Element>(of_ranks, words + half * GROUP / 2);
    }
#pragma unroll
    for (int u = 0; u < 3; ++u)
      give(3 * i + u, make_uint4(words[4 * u], words[4 * u + 1], words[4 * u + 2], words[4 * u + 3]));
  }
}

#include "dense_call.cuh"

KERNEL(reduce_bfloat16, BFloat16)
KERNEL(reduce_float16, Float16)
