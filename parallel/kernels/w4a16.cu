// Y[m, n] = sum over k of X[m, k] * weight[n, k]   for up to 8 * NT rows m, where weight[n, k] is
//   (q[n, k] - zero[n, k / GROUP]) * scale[n, k / GROUP], or with CODEBOOK  codebook[q[n, k]] * scale[n, k / GROUP].
//
// A block takes 16 * RT outputs; its warps deal the units of 128 inputs among themselves and add up in shared memory,
// always in the same order. Each warp streams its units through a ring of DEPTH stages in shared memory, filled by
// asynchronous copies: a warp has six scoreboards, so that loads to registers wait for one another (twice the time,
// measured).
//
// Defined by the host: NT (token tiles of 8), RT (row tiles of 16), WARPS, DEPTH (a power of two), SWIGLU (0
// or 1), and what four_bits.cuh asks for, which has the layouts too.

#include "four_bits.cuh"

#define STAGE_BYTES (RT * UNIT_BYTES)
#define RING_BYTES (DEPTH * STAGE_BYTES)
#define SUM_BYTES (RT * NT * 512)
// Sixteen warps a multiprocessor need no more than 128 registers each: with zeros a few more were taken, and gate and up
// of Llama-70B at TP2 went in two rounds of blocks instead of one. Smaller groups would spill.
#define MIN_BLOCKS (GROUP == 128 ? 16 / WARPS : 1)

extern "C" __global__ void __launch_bounds__(WARPS * 32, MIN_BLOCKS)
w4a16(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, const unsigned short* __restrict__ x,
      unsigned short* __restrict__ y, int num_out, int num_in, int num_rows CODEBOOK_PARAMETER) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int units = num_in >> 7;
  const int tile0 = blockIdx.x * RT, num_tiles = num_out >> 4;
  const size_t first = (size_t)tile_at<SWIGLU>(tile0, num_tiles) * units;
  const uint4* w = weights + first * 64 + lane;
  const unsigned char* sz = scales + first * PARTS * GROUP_BYTES + lane * SCALE_PIECE;
  DECODER(decode);

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
        const uint4* from = w + at * 64;
        copy_async(stage + lane * 16, from);
        copy_async(stage + 512 + lane * 16, from + 32);
        if (lane < PARTS * GROUP_BYTES / SCALE_PIECE)
          copy_async<SCALE_PIECE>(stage + WEIGHT_BYTES + lane * SCALE_PIECE,
                                  sz + at * PARTS * GROUP_BYTES);
      }
    }
    commit_copies();
  };

  float acc[RT][NT][4] = {};
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++) fetch(warp + d * WARPS, d);
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
    uint4 now[RT][2];
    u32 scale[RT][PARTS][2];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const unsigned char* stage = ring + slot * STAGE_BYTES + r * UNIT_BYTES;
      now[r][0] = *(const uint4*)(stage + lane * 16);
      now[r][1] = *(const uint4*)(stage + 512 + lane * 16);
#pragma unroll
      for (int p = 0; p < PARTS; p++) {
#pragma unroll
        for (int i = 0; i < 2; i++) scale[r][p][i] = load_scale(stage + WEIGHT_BYTES + p * GROUP_BYTES, g, i);
      }
    }
    // The next round overwrites this slot.
    __syncwarp();
    slot = (slot + 1) & (DEPTH - 1);

#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      float part[RT][NT][4] = {};
#pragma unroll
      for (int quarter = p * 4 / PARTS; quarter < (p + 1) * 4 / PARTS; quarter++) {
        if (!early) load_tokens(unit, quarter);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int step = quarter * 2 + i;
#pragma unroll
          for (int r = 0; r < RT; r++) {
            u32 a[4];
            decode(a, word(now[r][step >> 2], step & 3), zero_of(scale[r][p][0]), zero_of(scale[r][p][1]));
#pragma unroll
            for (int t = 0; t < NT; t++) {
              const uint4 b = tokens[early ? quarter : 0][t];
              multiply(part[r][t], a, i ? b.z : b.x, i ? b.w : b.y);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const float s0 = scale_of(scale[r][p][0]), s1 = scale_of(scale[r][p][1]);
#pragma unroll
        for (int t = 0; t < NT; t++) {
          acc[r][t][0] += part[r][t][0] * s0;
          acc[r][t][1] += part[r][t][1] * s0;
          acc[r][t][2] += part[r][t][2] * s1;
          acc[r][t][3] += part[r][t][3] * s1;
        }
      }
    }
  }

  let_successor_start();
  await_copies<0>();
  __syncthreads();
  store_sums<RT, NT, WARPS, SWIGLU>(acc, memory, y, tile0, num_out, num_rows, UNIT);
}
