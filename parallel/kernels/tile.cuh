// What the kernels of packed weights share: the order of a fragment's inputs, and the sum over a block's warps.
//
// Weights are the 16-row side of mma.m16n8k16, so 8 tokens share a tile and none of it is wasted at batch 1. Inputs of a
// group are taken in an order of the packers' choice: lane (g = lane / 4, c = lane % 4) has, in quarter s of a group of
// 128, inputs 32 * s + 8 * c to + 7, four for each of two steps, of rows g and g + 8. So a lane reads X 16 bytes at a
// time, and its four neighbours read the 64 bytes in a row.
//
// With SWIGLU the outputs of a weight are gates, then as many ups, and Y [m, outputs / 2] is bf16(silu(gate)) * up of both,
// rounded to bf16. A block's tiles are then in pairs: a tile of gates, the tile of their ups.

#include "silu.cuh"

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// A bf16 pair times a float, rounded once.
__device__ __forceinline__ u32 scale_pair(u32 pair, float scale) {
  return to_pair(low(pair) * scale, high(pair) * scale);
}

// The tile of the weight that is number `place` of those that blocks take in turn. In steps: that of an even place and
// that of another add up to that of both.
template <bool swiglu>
__device__ __forceinline__ int tile_at(int place, int num_tiles) {
  return swiglu ? (place >> 1) + (place & 1) * (num_tiles >> 1) : place;
}

// Adds up `acc` over the warps of a block, always in the same order, and writes it times `unit` for the tokens there are.
template <int row_tiles, int token_tiles, int warps, bool swiglu>
__device__ __forceinline__ void store_sums(const float (&acc)[row_tiles][token_tiles][4], void* memory, unsigned short* y,
                                           int tile0, int num_out, int num_rows, float unit) {
  static_assert(!swiglu || row_tiles % 2 == 0, "tiles in pairs");
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float(*sums)[row_tiles * token_tiles * 4][32] = (float(*)[row_tiles * token_tiles * 4][32])memory;
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int t = 0; t < token_tiles; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[warp][(r * token_tiles + t) * 4 + j][lane] = acc[r][t][j];
  __syncthreads();
  // Threads of a run of 16 take the 16 outputs of one token, which lie side by side in Y.
  for (int i = threadIdx.x; i < (row_tiles * token_tiles * 128 >> swiglu); i += warps * 32) {
    const int out = i & 15, m8 = (i >> 4) & 7, rt = i >> 7;
    const int t = rt % token_tiles, r = rt / token_tiles << swiglu;
    const int source_lane = (out & 7) * 4 + (m8 >> 1), j = (out >> 3) * 2 + (m8 & 1);
    auto output = [&](int tile) {
      float total = 0;
#pragma unroll
      for (int v = 0; v < warps; v++) total += sums[v][(tile * token_tiles + t) * 4 + j][source_lane];
      return to_bf16(total * unit);
    };
    const int m = t * 8 + m8;
    if (m < num_rows)
      y[(size_t)m * (num_out >> swiglu) + tile_at<swiglu>(tile0 + r, num_out >> 4) * 16 + out] =
          swiglu ? silu_mul_one(output(r), output(r + 1)) : output(r);
  }
}
