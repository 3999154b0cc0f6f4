// The packed weights of w4a16.py and w8a16.py as bf16 [N, K], each rounded once, for matrix products of many rows.
//
// A warp takes UNITS neighbouring units of 128 inputs of 16 outputs: all their loads first, so that they are under way
// together. As fragments lie, four lanes have 64 bytes of a row between them; through shared memory a store covers 256.
// Caches need keep neither weights, which are read once, nor what is written, which is more than they hold.
//
// Of the ways tried on an H200 (linears of Llama-70B at TP2, 4 bits, GB/s of 4209 of a copy): stores of 256 bytes 3720, of
// 128 (by shuffles) 3499, of 64 3492; then with nothing kept in caches 3760. Blocks that stay and take more units: slower.
//
// Defined by the host: BITS (4 or 8), and what four_bits.cuh or eight_bits.cuh asks for, which have the layouts.

#if BITS == 4
#include "four_bits.cuh"
#endif
#if BITS == 8
#include "eight_bits.cuh"
#endif

#define WARPS 8
// Against 1 on an H200: 1 to 3 % faster of 4 bits, int8 and fp8, even with zeros, 3 % slower of a codebook.
#define UNITS 2
#define LOADS (WEIGHT_BYTES / 512)
#define GROUPS (PARTS ? PARTS : 1)

// Inputs 32 * quarter + 8 * c to + 7 of rows g and g + 8.
__device__ __forceinline__ void decode_quarter(uint4* rows, const Decoder& decoder, const uint4* loaded,
                                               const u32 (*scales)[2], int quarter) {
  const u32* scale = scales[quarter * GROUPS / 4];
  u32 a[2][4];
#pragma unroll
  for (int i = 0; i < 2; i++)
    decode_step(a[i], decoder, loaded[(quarter * 2 + i) / STEPS_PER_LOAD], quarter * 2 + i, zero_of(scale[0]),
                zero_of(scale[1]));
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float f = scale_of(scale[r]) * UNIT;
    rows[r] = make_uint4(scale_pair(a[0][r], f), scale_pair(a[0][2 + r], f), scale_pair(a[1][r], f),
                         scale_pair(a[1][2 + r], f));
  }
}

// `to`: the unit's first 16 bytes in its tile's first row, of which each has `row` pieces of 16 bytes.
__device__ __forceinline__ void write_unit(uint4* to, size_t row, const Decoder& decoder, const uint4* loaded,
                                           const u32 (*scales)[2], uint4* shared) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  // The pieces of every other row change halves of 128 bytes, so that two rows' 64 bytes lie in different banks.
#pragma unroll
  for (int quarter = 0; quarter < 4; quarter++) {
    uint4 rows[2];
    decode_quarter(rows, decoder, loaded, scales, quarter);
#pragma unroll
    for (int r = 0; r < 2; r++) shared[(g + 8 * r) * 16 + (quarter * 4 + c ^ (g & 1) << 2)] = rows[r];
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int r = 2 * i + (lane >> 4);
    __stcs(to + r * row + (lane & 15), shared[r * 16 + (lane & 15 ^ (r & 1) << 2)]);
  }
  __syncwarp();
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
dequantize_weight(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, uint4* __restrict__ out,
                  int num_tiles, int units CODEBOOK_PARAMETER) {
  __shared__ __align__(16) uint4 shared[WARPS][256];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
  const int total = num_tiles * units, first = (blockIdx.x * WARPS + warp) * UNITS;
  if (first >= total) return;
  DECODER(decoder);
  uint4 loaded[UNITS][LOADS];
  u32 scale[UNITS][GROUPS][2];
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    // The last unit is loaded several times rather than not at all.
    const int unit = min(first + u, total - 1);
#pragma unroll
    for (int i = 0; i < LOADS; i++) loaded[u][i] = __ldcs(weights + ((size_t)unit * LOADS + i) * 32 + lane);
    const unsigned char* group = scales + (size_t)(PARTS ? unit * PARTS : unit / units) * GROUP_BYTES;
#pragma unroll
    for (int p = 0; p < GROUPS; p++)
#pragma unroll
      for (int r = 0; r < 2; r++) scale[u][p][r] = load_scale(group + p * GROUP_BYTES, g, r);
  }
#pragma unroll
  for (int u = 0; u < UNITS; u++) {
    const int unit = first + u, tile = unit / units;
    if (unit < total)
      write_unit(out + ((size_t)tile * 16 * units + unit - tile * units) * 16, (size_t)units * 16, decoder, loaded[u],
                 scale[u], shared[warp]);
  }
}
