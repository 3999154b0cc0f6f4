// Rounds a weight [rows, num_in] to levels, or to e4m3 numbers, with a scale and perhaps a zero for each GROUP inputs: to
// the bit what parallel/checkpoint/quantize.py does, by the same operations in float32 in the same order. None of them
// are joined to one that rounds once, which the compiler would do.
//
// A warp takes a group, of which lane l has inputs l, l + 32, l + 64 and l + 96: a sum of halves, and of their halves, is
// then of a lane's own two first, and later between lanes.
//
// Defined by the host: BITS; HAS_ZEROS, IS_FLOAT; STORED, what weights are: 0 bf16, 1 float16, 2 float32; RANGES, the
// shares of a group's range that are tried, the whole first; LEAST_SCALE; FLOAT8_MAX.

#include "device.cuh"

#define WARPS 8
#define GROUP 128
#define HELD (GROUP / 32)
#define LEVELS (1 << BITS)

#if STORED == 0
typedef unsigned short Stored;
__device__ __forceinline__ float widen(Stored bits) { return low(bits); }
#elif STORED == 1
typedef unsigned short Stored;
__device__ __forceinline__ float widen(Stored bits) { return __uint_as_float(widen_half(bits)); }
#else
typedef float Stored;
__device__ __forceinline__ float widen(Stored value) { return value; }
#endif

__device__ __forceinline__ float clamp(float v, float least, float most) { return fminf(fmaxf(v, least), most); }

__device__ __forceinline__ float as_stored(float scale) { return low(to_bf16(fmaxf(scale, LEAST_SCALE))); }

// The largest of a warp's.
__device__ __forceinline__ float largest(const float* held) {
  float found = fmaxf(fmaxf(held[0], held[1]), fmaxf(held[2], held[3]));
  for (int step = 16; step; step >>= 1) found = fmaxf(found, __shfl_xor_sync(~0u, found, step));
  return found;
}

__device__ __forceinline__ float halving_sum(const float* held) {
  float sum = __fadd_rn(__fadd_rn(held[0], held[2]), __fadd_rn(held[1], held[3]));
  for (int step = 16; step; step >>= 1) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, step));
  return sum;
}

// The e4m3 number nearest to `v`, which is no larger than the largest of them; ties go to the even one.
__device__ __forceinline__ unsigned char to_e4m3(float v) {
  const u32 bits = __float_as_uint(v), size = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
  // Below 2**-6 they are 2**-9 apart, as float32 numbers from 2**14 on are.
  if (size < 0x3c800000) return sign | (__float_as_uint(__fadd_rn(__uint_as_float(size), 16384.0f)) - 0x46800000);
  // The fraction loses 20 bits, and the exponent 120.
  return sign | (((size + 0x7ffff + (size >> 20 & 1)) >> 20) - (120 << 3));
}

#if HAS_ZEROS

struct Grid {
  float scale, zero;
};

__device__ __forceinline__ Grid grid_of(float low, float high) {
  const float scale = as_stored(__fdiv_rn(__fsub_rn(high, low), LEVELS - 1));
  return {scale, clamp(rintf(__fdiv_rn(-low, scale)), 0, LEVELS - 1)};
}

__device__ __forceinline__ float level(float v, Grid grid) {
  return clamp(rintf(__fadd_rn(__fdiv_rn(v, grid.scale), grid.zero)), 0, LEVELS - 1);
}

__device__ __forceinline__ float squared_error(const float* held, Grid grid) {
  float squares[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const float error = __fsub_rn(__fmul_rn(__fsub_rn(level(held[i], grid), grid.zero), grid.scale), held[i]);
    squares[i] = __fmul_rn(error, error);
  }
  return halving_sum(squares);
}

__device__ __forceinline__ Grid best_grid(const float* held) {
  float negative[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) negative[i] = -held[i];
  const float low = fminf(-largest(negative), 0), high = fmaxf(largest(held), 0);
  const float shares[] = {RANGES};
  Grid best;
  float least;
#pragma unroll
  for (int i = 0; i < sizeof shares / sizeof *shares; i++) {
    const Grid tried = grid_of(__fmul_rn(low, shares[i]), __fmul_rn(high, shares[i]));
    const float error = squared_error(held, tried);
    if (i && !(error < least)) continue;
    best = tried;
    least = error;
  }
  return best;
}

#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32)
round_groups(const Stored* __restrict__ weight, unsigned char* __restrict__ values, unsigned short* __restrict__ scales,
             unsigned char* __restrict__ zeros, int num_in, int groups_in_row, int num_groups) {
  const int lane = threadIdx.x & 31, group = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (group >= num_groups) return;
  const int row = group / groups_in_row, first = (group - row * groups_in_row) * GROUP;
  const size_t start = (size_t)row * num_in + first;
  float held[HELD];
  // The last group of a row may be short.
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int at = lane + 32 * i;
    held[i] = first + at < num_in ? widen(weight[start + at]) : 0;
  }
#if HAS_ZEROS
  const Grid grid = best_grid(held);
  const float scale = grid.scale;
  if (lane == 0) zeros[group] = grid.zero;
#else
  float sizes[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) sizes[i] = fabsf(held[i]);
  const float scale = as_stored(__fdiv_rn(largest(sizes), IS_FLOAT ? FLOAT8_MAX : LEVELS / 2 - 1));
#endif
  float strange[HELD];
#pragma unroll
  for (int i = 0; i < HELD; i++) strange[i] = held[i] != held[i];
  const bool has_nan = largest(strange) > 0;
  // What is no number must not become one.
  if (lane == 0) scales[group] = has_nan ? 0x7fc0 : to_bf16(scale);
#pragma unroll
  for (int i = 0; i < HELD; i++) {
    const int at = lane + 32 * i;
    if (first + at >= num_in) continue;
#if HAS_ZEROS
    values[start + at] = level(held[i], grid);
#elif IS_FLOAT
    values[start + at] = to_e4m3(clamp(__fdiv_rn(held[i], scale), -FLOAT8_MAX, FLOAT8_MAX));
#else
    values[start + at] = clamp(rintf(__fdiv_rn(held[i], scale)), 1 - LEVELS / 2, LEVELS / 2 - 1) + LEVELS / 2;
#endif
  }
}
