// The activation of gated MLPs, by itself and at the end of products with their weights.

#include "device.cuh"

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// bf16(silu(gate)) * up, of bf16 numbers and in bf16: silu is rounded before the product, as transformers does.
__device__ __forceinline__ unsigned short silu_mul_one(unsigned short gate, unsigned short up) {
  return to_bf16(low(to_bf16(silu(low(gate)))) * low(up));
}
