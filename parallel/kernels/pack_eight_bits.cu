// Bytes, [N, K], as w8a16.cu reads them: `pack_values` in w8a16.py says in which order.
//
// A warp packs a quarter of a unit of a tile: 32 inputs of 16 outputs, of which a lane takes 8 bytes of rows g and g + 8.
//
// Defined by the host: E4M3, 1 for float8 numbers, whose bits are dealt anew.

#include "device.cuh"

#define WARPS 8

// Two neighbouring inputs of row g, each before that of row g + 8: bytes `at` and `at` + 1 of both words.
__device__ __forceinline__ u32 join(u32 a, u32 b, int at) {
  const u32 word = permute(a, b, at ? 0x7362 : 0x5140);
#if E4M3
  const u32 first = word & 0x00ff00ff, second = word >> 8 & 0x00ff00ff;
  const u32 below = (first & 0x000f000f) << 4 | second & 0x000f000f;
  const u32 above = first & 0x00800080 | second & 0x00700070 | (second & 0x00800080) >> 4 | (first & 0x00700070) >> 4;
  return below | above << 8;
#else
  return word;
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
pack_eight_bits(const uint2* __restrict__ values, uint4* __restrict__ packed, int units, int num_quarters) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int quarter = blockIdx.x * WARPS + (threadIdx.x >> 5);
  if (quarter >= num_quarters) return;
  const int tile = quarter / (4 * units), place = quarter - tile * 4 * units;
  // A row has 16 pieces of 8 bytes a unit.
  const size_t row = (size_t)units * 16;
  const uint2* from = values + (tile * 16 + g) * row + place * 4 + c;
  const uint2 a = __ldcs(from), b = __ldcs(from + 8 * row);
  packed[(size_t)quarter * 32 + lane] = make_uint4(join(a.x, b.x, 0), join(a.x, b.x, 2), join(a.y, b.y, 0), join(a.y, b.y, 2));
}
