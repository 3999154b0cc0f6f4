// Y[m, n] = sum over k of X[m, k] * weight[n, k]   for up to 8 * NT rows m, where weight[n, k] is
//   (q[n, k] - zero[n, group]) * scale[n, group], or with E4M3  float8_e4m3[n, k] * scale[n, group];
// a group is 128 inputs (GROUPED) or all of them.
//
// Built as w4a16.cu: a block takes 16 * RT outputs, its warps deal the units of 128 inputs among themselves, and each
// streams its own through a ring of DEPTH stages in shared memory.
//
// Defined by the host: NT (token tiles of 8), RT (row tiles of 16), WARPS, DEPTH (a power of two), SWIGLU, GROUPED,
// E4M3 (0 or 1).

#include "eight_bits.cuh"

#define STAGE_BYTES (RT * UNIT_BYTES)
#define RING_BYTES (DEPTH * STAGE_BYTES)
#define SUM_BYTES (RT * NT * 512)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
w8a16(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, const unsigned short* __restrict__ x,
      unsigned short* __restrict__ y, int num_out, int num_in, int num_rows) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int units = num_in >> 7;
  const int tile0 = blockIdx.x * RT, num_tiles = num_out >> 4;
  const size_t first = tile_at<SWIGLU>(tile0, num_tiles);
  const uint4* w = weights + first * units * 128 + lane;
  const unsigned char* s = scales + first * (GROUPED ? units : 1) * GROUP_BYTES;

  // The ring while units stream, then the partial sums.
  __shared__ __align__(16) unsigned char memory[WARPS * (RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES)];
  const unsigned char* ring = memory + warp * RING_BYTES;
  const u32 ring_address = shared_address(ring);

  auto fetch = [&](int unit, int slot) {
    if (unit < units) {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const u32 stage = ring_address + slot * STAGE_BYTES + r * UNIT_BYTES;
        const size_t at = (size_t)tile_at<SWIGLU>(r, num_tiles) * units + unit;
        const uint4* from = w + at * 128;
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) copy_async(stage + quarter * 512 + lane * 16, from + quarter * 32);
        if (GROUPED && lane < 4)
          copy_async(stage + WEIGHT_BYTES + lane * 16, s + at * GROUP_BYTES + lane * 16);
      }
    }
    commit_copies();
  };

  float acc[RT][NT][4] = {};
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++) fetch(warp + d * WARPS, d);

  u32 scale[RT][2];
  if (!GROUPED) {
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int i = 0; i < 2; i++) scale[r][i] = load_scale(s + tile_at<SWIGLU>(r, num_tiles) * GROUP_BYTES, g, i);
  }
  wait_for_predecessors();

#include "load_tokens.cuh"

  int slot = 0;
  for (int unit = warp; unit < units; unit += WARPS) {
    fetch(unit + (DEPTH - 1) * WARPS, (slot + DEPTH - 1) & (DEPTH - 1));
    if (early) {
#pragma unroll
      for (int quarter = 0; quarter < 4; quarter++) load_tokens(unit, quarter);
    }
    await_copies<DEPTH - 1>();
    __syncwarp();
    const unsigned char* stage = ring + slot * STAGE_BYTES;
    if (GROUPED) {
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int i = 0; i < 2; i++) scale[r][i] = load_scale(stage + r * UNIT_BYTES + WEIGHT_BYTES, g, i);
    }
    float part[RT][GROUPED ? NT : 1][4] = {};
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      if (!early) load_tokens(unit, quarter);
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const uint4 now = *(const uint4*)(stage + r * UNIT_BYTES + quarter * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const u32 z0 = zero_of(scale[r][0]), z1 = zero_of(scale[r][1]);
          u32 a[4];
          decode(a, word(now, 2 * i), z0, z1);
          decode(a + 2, word(now, 2 * i + 1), z0, z1);
#pragma unroll
          for (int t = 0; t < NT; t++) {
            const uint4 b = tokens[early ? quarter : 0][t];
            multiply(GROUPED ? part[r][t] : acc[r][t], a, i ? b.z : b.x, i ? b.w : b.y);
          }
        }
      }
    }
    if (GROUPED) {
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int t = 0; t < NT; t++)
#pragma unroll
          for (int j = 0; j < 4; j++) acc[r][t][j] += part[r][t][j] * scale_of(scale[r][j >> 1]);
    }
    // The next round overwrites this slot.
    __syncwarp();
    slot = (slot + 1) & (DEPTH - 1);
  }
  if (!GROUPED) {
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int j = 0; j < 4; j++) acc[r][t][j] *= scale_of(scale[r][j >> 1]);
  }

  let_successor_start();
  await_copies<0>();
  __syncthreads();
  store_sums<RT, NT, WARPS, SWIGLU>(acc, memory, y, tile0, num_out, num_rows, UNIT);
}
