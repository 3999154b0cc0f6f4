// out = bf16(x * rsqrt(mean(x * x) + eps)) * weight, row by row, where x is hidden, or hidden + residual as it is rounded
// to bf16 and written back to residual.
//
// One block a row, which it holds in registers between the two passes. The weight is on its way while the row is added up.
//
// Defined by the host: VECTORS, pieces of 16 bytes that a thread holds; MAX_THREADS.

#include "device.cuh"
#include "norm.cuh"

// The sum over the block, in every thread; always in the same order.
__device__ __forceinline__ float sum_block(float value) {
  __shared__ float sums[MAX_WARPS];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  value = sum_warp(value);
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  return sum_warp(lane < warps ? sums[lane] : 0);
}

// pieces: of 16 bytes in a row; strides in pieces. residual may be null.
extern "C" __global__ void __launch_bounds__(MAX_THREADS)
rms_norm(const uint4* __restrict__ hidden, uint4* residual, const uint4* __restrict__ weight,
         uint4* __restrict__ out, int pieces, int hidden_stride, int residual_stride, float eps) {
  wait_for_predecessors();
  let_successor_start();
  const size_t row = blockIdx.x;
  hidden += row * hidden_stride;
  out += row * pieces;

  uint4 x[VECTORS] = {}, w[VECTORS];
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces) x[i] = load_fresh(hidden + at);
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
      x[i] = add(x[i], before[i]);
      residual[at] = x[i];
    }
  }
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces) w[i] = load_fresh(weight + at);
  }

  float sum = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) sum += squares(x[i]);
  const float factor = norm_factor(sum_block(sum), pieces, eps);

#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int at = threadIdx.x + i * blockDim.x;
    if (at < pieces) out[at] = scale(x[i], factor, w[i]);
  }
}
