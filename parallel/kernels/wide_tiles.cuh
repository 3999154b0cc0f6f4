// How the kernels of many rows (wide.cu, wide_wgmma.cu) deal tiles of Y to blocks.
//
// The units of tiles, in order, are dealt to blocks in runs of one length, whatever the shape. A tile that
// several blocks share is left by each as a float32 part; the last to arrive adds them in the order of the inputs, so
// that sums never depend on which it is. Launches must follow one another, on one stream.
//
// Defined by the host: BITS (4 or 8); of a block, OUT_WARPS along the outputs and TOKEN_WARPS along the tokens of its tile,
// of which each takes RT row tiles of 16 outputs and NT tiles of 8 tokens.

#if BITS == 4
#include "four_bits.cuh"
#endif
#if BITS == 8
#include "eight_bits.cuh"
#endif

// How the threads that multiply meet, which are all of a block where nothing else is said; whether any says so.
#ifndef MEET
#define MEET() __syncthreads()
#define ANY(mine) __syncthreads_or(mine)
#endif

#define THREADS (32 * OUT_WARPS * TOKEN_WARPS)
#define ROW_TILES (RT * OUT_WARPS)
#define TOKENS (8 * NT * TOKEN_WARPS)
// 128 inputs of a token.
#define TOKEN_BYTES 256
#define MAX_TILES 16384
#define PART_FLOATS (ROW_TILES * 16 * TOKENS)

// Blocks that have left their part of a tile; zero between launches.
__device__ u32 arrivals[MAX_TILES];

__device__ __forceinline__ int count_places(int num_tiles, int num_rows) {
  return (num_tiles + ROW_TILES - 1) / ROW_TILES * ((num_rows + TOKENS - 1) / TOKENS);
}

// How the `total` units of tiles of `units` each are dealt to as many blocks; others get none.
struct Deal {
  int units, total, blocks;
  __device__ __forceinline__ int begin(int block) const { return (int)((long long)total * min(block, blocks) / blocks); }
  __device__ __forceinline__ int block_of(int work) const { return (int)(((work + 1LL) * blocks - 1) / total); }
};

// Where a tile lies: its first row tile and its first token. Those of the same weights follow one another.
struct Place {
  int tile, token;
  __device__ __forceinline__ Place(int index, int num_rows) {
    const int token_blocks = (num_rows + TOKENS - 1) / TOKENS;
    tile = index / token_blocks * ROW_TILES;
    token = index % token_blocks * TOKENS;
  }
};

// Adds up the parts of a tile in the order of its inputs; true in the block that was the last to arrive.
__device__ __forceinline__ bool join_parts(float (&acc)[RT][NT][4], float4* parts, const Deal& deal, int index, int first) {
  const int begin = index * deal.units, first_block = deal.block_of(begin);
  const int others = deal.block_of(begin + deal.units - 1) - first_block;
  // A block leaves at most two parts: the end of one tile, and the beginning of another.
  auto part_of = [&](int block, bool begins) { return parts + (size_t)(2 * block + begins) * (PART_FLOATS / 4) + threadIdx.x; };
  float4* own = part_of(blockIdx.x, first == begin);
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int t = 0; t < NT; t++)
      own[(r * NT + t) * THREADS] = make_float4(acc[r][t][0], acc[r][t][1], acc[r][t][2], acc[r][t][3]);
  __threadfence();
  MEET();
  // Wraps to zero by itself, ready for the next launch.
  if (!ANY(threadIdx.x == 0 && atomicInc(&arrivals[index], others) == others)) return false;
  __threadfence();
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[r][t][j] = 0;
  for (int block = first_block; block <= first_block + others; block++) {
    const float4* part = part_of(block, block == first_block);
#pragma unroll
    for (int r = 0; r < RT; r++)
#pragma unroll
      for (int t = 0; t < NT; t++) {
        const float4 sum = __ldcg(part + (r * NT + t) * THREADS);
        acc[r][t][0] += sum.x;
        acc[r][t][1] += sum.y;
        acc[r][t][2] += sum.z;
        acc[r][t][3] += sum.w;
      }
  }
  return true;
}
