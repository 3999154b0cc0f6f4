// What an RMS norm of rows in bf16 is made of. Whoever includes it has u32 and, of a pair in one word, low, high and
// to_pair. Two kernels that give these the same numbers in the same order give the same bits.

// The last numbers that the sum of a row goes through: one a warp.
#define MAX_WARPS 32

__device__ __forceinline__ u32 add(u32 a, u32 b) { return to_pair(low(a) + low(b), high(a) + high(b)); }
__device__ __forceinline__ float square(u32 a) { return low(a) * low(a) + high(a) * high(a); }
__device__ __forceinline__ float squares(uint4 a) { return square(a.x) + square(a.y) + square(a.z) + square(a.w); }

__device__ __forceinline__ uint4 add(uint4 a, uint4 b) {
  return make_uint4(add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w));
}

// The product with the norm is rounded before that with the weight, as transformers does.
__device__ __forceinline__ u32 scale(u32 a, float factor, u32 weight) {
  const u32 normed = to_pair(low(a) * factor, high(a) * factor);
  return to_pair(low(normed) * low(weight), high(normed) * high(weight));
}

__device__ __forceinline__ uint4 scale(uint4 a, float factor, uint4 w) {
  return make_uint4(scale(a.x, factor, w.x), scale(a.y, factor, w.y), scale(a.z, factor, w.z),
                    scale(a.w, factor, w.w));
}

// The sum over the warp, on every lane; always in the same order.
__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// pieces: of 16 bytes in a row, whose squares are `sum`.
__device__ __forceinline__ float norm_factor(float sum, int pieces, float eps) {
  return rsqrtf(sum / (pieces * 8) + eps);
}
