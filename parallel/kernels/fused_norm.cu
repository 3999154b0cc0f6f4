// out = bf16(x * rsqrt(mean(x * x) + eps)) * weight, row by row, where x is hidden, or hidden + residual as it is rounded
// to bf16 and written back to residual.
//
// One block a row, which it holds in registers between the two passes. The weight is on its way while the row is added up.
//
// Defined by the host: VECTORS, pieces of 16 bytes that a thread holds; MAX_THREADS.

#include "device.cuh"

__device__ __forceinline__ u32 add(u32 a, u32 b) { return to_pair(low(a) + low(b), high(a) + high(b)); }
__device__ __forceinline__ float square(u32 a) { return low(a) * low(a) + high(a) * high(a); }

// The product with the norm is rounded before that with the weight, as transformers does.
__device__ __forceinline__ u32 scale(u32 a, float factor, u32 weight) {
  const u32 normed = to_pair(low(a) * factor, high(a) * factor);
  return to_pair(low(normed) * low(weight), high(normed) * high(weight));
}

// The sum over the block, in every thread; always in the same order.
__device__ __forceinline__ float sum_block(float value) {
  __shared__ float sums[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  value = lane < warps ? sums[lane] : 0;
#pragma unroll
  for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// pieces: of 16 bytes in a row; strides in pieces. residual may be null.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
rms_norm(const uint4* __restrict__ hidden, uint4* __restrict__ residual, const uint4* __restrict__ weight,
         uint4* __restrict__ out, int pieces, int hidden_stride, int residual_stride, float eps) {
  const size_t row = blockIdx.x;
  hidden += row * hidden_stride;
  out += row * pieces;

  uint4 x[VECTORS] = {}, w[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces) x[i] = hidden[at];
  }
  if (residual) {
    residual += row * residual_stride;
    uint4 before[VECTORS];
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at < pieces) before[i] = residual[at];
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) {
      const int at = threadIdx.x + i * blockDim.x;
      if (at >= pieces) continue;
      x[i] = make_uint4(add(x[i].x, before[i].x), add(x[i].y, before[i].y), add(x[i].z, before[i].z),
                        add(x[i].w, before[i].w));
      residual[at] = x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces) w[i] = __ldg(weight + at);
  }

  float sum = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) sum += square(x[i].x) + square(x[i].y) + square(x[i].z) + square(x[i].w);
  const float factor = rsqrtf(sum_block(sum) / (pieces * 8) + eps);

#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces)
      out[at] = make_uint4(scale(x[i].x, factor, w[i].x), scale(x[i].y, factor, w[i].y), scale(x[i].z, factor, w[i].z),
                           scale(x[i].w, factor, w[i].w));
  }
}
