// out = bf16(silu(gate)) * up, where a row holds the gates, then the ups. A thread takes 16 bytes of each.

#include "silu.cuh"

// As silu_mul_one.
__device__ __forceinline__ u32 silu_mul_pair(u32 gate, u32 up) {
  const u32 active = to_pair(silu(low(gate)), silu(high(gate)));
  return to_pair(low(active) * low(up), high(active) * high(up));
}

// pieces: of 16 bytes in a row of the result; row_stride in pieces.
extern "C" __global__ void __launch_bounds__(256)
silu_mul(const uint4* __restrict__ gate_up, uint4* __restrict__ out, int pieces, int row_stride) {
  wait_for_predecessors();
  let_successor_start();
  const size_t row = blockIdx.x;
  const int at = blockIdx.y * blockDim.x + threadIdx.x;
  if (at >= pieces) return;
  const uint4* from = gate_up + row * row_stride + at;
  const uint4 gate = load_fresh(from), up = load_fresh(from + pieces);
  out[row * pieces + at] = make_uint4(silu_mul_pair(gate.x, up.x), silu_mul_pair(gate.y, up.y),
                                      silu_mul_pair(gate.z, up.z), silu_mul_pair(gate.w, up.w));
}
