// Values below 16, a byte each, [N, K], as w4a16.cu reads them: `pack_values` in w4a16.py says in which order.
//
// A warp packs half a unit of a tile: 64 inputs of 16 outputs, of which a lane takes 16 bytes of rows g and g + 8.
//
// Defined by the host: IN_PAIRS, 1 for weights with a codebook.

#include "device.cuh"

#define WARPS 8

// Four neighbouring inputs of row g, and of row g + 8.
__device__ __forceinline__ u32 join(u32 a, u32 b) {
#if IN_PAIRS
  // Bytes 0 and 2 have two neighbours each.
  return permute(a | a >> 4, b | b >> 4, 0x6240);
#else
  return permute(a | b << 4, 0, 0x3120);
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
pack_four_bits(const uint2* __restrict__ values, uint4* __restrict__ packed, int units, int num_halves) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int half = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (half >= num_halves) return;
  const int tile = half / (2 * units), place = half - tile * 2 * units;
  // A row has 16 pieces of 8 bytes a unit.
  const size_t row = (size_t)units * 16;
  const uint2* from = values + (tile * 16 + g) * row + place * 8 + c;
  const uint2 a0 = __ldcs(from), a1 = __ldcs(from + 4), b0 = __ldcs(from + 8 * row), b1 = __ldcs(from + 8 * row + 4);
  packed[(size_t)half * 32 + lane] = make_uint4(join(a0.x, b0.x), join(a0.y, b0.y), join(a1.x, b1.x), join(a1.y, b1.y));
}
