// The packed weights of w4a16.py and w8a16.py as bf16 [N, K], each rounded once, for matrix products of many rows.
//
// A warp takes UNITS neighbouring units of 128 inputs of 16 outputs at a time: all their loads first, so that they are
// under way together. As fragments lie, four lanes have 64 bytes of a row between them. Those are passed on between
// lanes until a store covers RUN bytes of a row: 128 by shuffles, 256 through shared memory.
//
// Defined by the host: BITS (4 or 8), RUN (64, 128 or 256), UNITS, STREAM (1: what is read is not kept in caches, 2: nor
// is what is written), and what four_bits.cuh or eight_bits.cuh asks for, which have the layouts.

#if BITS == 4
#include "four_bits.cuh"
#endif
#if BITS == 8
#include "eight_bits.cuh"
#endif

#define WARPS 8
#define LOADS (WEIGHT_BYTES / 512)
#define GROUPS (PARTS ? PARTS : 1)

__device__ __forceinline__ uint4 load(const uint4* from) { return STREAM ? __ldcs(from) : __ldg(from); }

__device__ __forceinline__ void store(uint4* to, const uint4& v) {
  if (STREAM == 2) __stcs(to, v);
  else *to = v;
}

__device__ __forceinline__ uint4 pick(bool first, const uint4& a, const uint4& b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

// What the lane `mask` away gives.
__device__ __forceinline__ uint4 exchange(const uint4& v, int mask) {
  const int from = (threadIdx.x & 31) ^ mask;
  return make_uint4(__shfl_sync(~0u, v.x, from), __shfl_sync(~0u, v.y, from), __shfl_sync(~0u, v.z, from),
                    __shfl_sync(~0u, v.w, from));
}

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
#if RUN == 64
#pragma unroll
  for (int quarter = 0; quarter < 4; quarter++) {
    uint4 rows[2];
    decode_quarter(rows, decoder, loaded, scales, quarter);
#pragma unroll
    for (int r = 0; r < 2; r++) store(to + (g + 8 * r) * row + quarter * 4 + c, rows[r]);
  }
#endif
#if RUN == 128
  // Lanes of an even row give their second quarter of it for the first one of the row after.
  const bool even = !(g & 1);
  to += (even ? 0 : 4) + c + (g & ~1) * row;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    uint4 rows[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++) decode_quarter(rows[i], decoder, loaded, scales, half * 2 + i);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint4 kept = pick(even, rows[0][r], rows[1][r]);
      const uint4 given = exchange(pick(even, rows[1][r], rows[0][r]), 4);
      store(to + 8 * r * row + half * 8, pick(even, kept, given));
      store(to + (8 * r + 1) * row + half * 8, pick(even, given, kept));
    }
  }
#endif
#if RUN == 256
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
    store(to + r * row + (lane & 15), shared[r * 16 + (lane & 15 ^ (r & 1) << 2)]);
  }
  __syncwarp();
#endif
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
dequantize_weight(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, uint4* __restrict__ out,
                  int num_tiles, int units CODEBOOK_PARAMETER) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2;
  const int total = num_tiles * units;
  DECODER(decoder);
#if RUN == 256
  __shared__ __align__(16) uint4 memory[WARPS][256];
  uint4* shared = memory[warp];
#else
  uint4* shared = nullptr;
#endif
  for (int first = (blockIdx.x * WARPS + warp) * UNITS; first < total; first += gridDim.x * WARPS * UNITS) {
    uint4 loaded[UNITS][LOADS];
    u32 scale[UNITS][GROUPS][2];
#pragma unroll
    for (int u = 0; u < UNITS; u++) {
      // The last units are loaded several times rather than not at all.
      const int unit = min(first + u, total - 1);
#pragma unroll
      for (int i = 0; i < LOADS; i++) loaded[u][i] = load(weights + ((size_t)unit * LOADS + i) * 32 + lane);
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
                   scale[u], shared);
    }
  }
}
