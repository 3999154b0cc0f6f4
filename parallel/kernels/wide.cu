// Y[m, n] = sum over k of X[m, k] * weight[n, k], as w4a16.cu and w8a16.cu, from the same packed weights, for many rows m.
//
// A tile of Y is 16 * RT * OUT_WARPS outputs of 8 * NT * TOKEN_WARPS tokens, one block's work at a time: each warp takes
// RT row tiles and NT token tiles of it, so that a weight is decoded once for all tokens of its warp. Weights and X come
// through a ring of STAGES units of 128 inputs in shared memory, filled by asynchronous copies that run on over the end
// of a tile.
//
// The units of all tiles, in order, are dealt to the blocks in runs of one length, whatever the shape. A tile that
// several blocks share is left by each as a float32 part; the last to arrive adds them in the order of the inputs, so
// that sums never depend on which it is. Launches must follow one another, on one stream.
//
// Defined by the host: BITS (4 or 8), NT, RT, OUT_WARPS, TOKEN_WARPS (4 warps or 8), STAGES, BLOCKS (on a multiprocessor),
// SWIGLU (0 or 1, then with an even RT), and what four_bits.cuh or eight_bits.cuh asks for, which have the layouts.

#if BITS == 4
#include "four_bits.cuh"
#endif
#if BITS == 8
#include "eight_bits.cuh"
#endif

#define THREADS (32 * OUT_WARPS * TOKEN_WARPS)
#define ROW_TILES (RT * OUT_WARPS)
#define TOKENS (8 * NT * TOKEN_WARPS)
// 128 inputs of a token.
#define TOKEN_BYTES 256
#define MAX_TILES 16384
#define PART_FLOATS (ROW_TILES * 16 * TOKENS)

#if WGMMA
#include "wide_wgmma.cuh"
#else
#include "wide_mma.cuh"
#endif

// Blocks that have left their part of a tile; zero between launches.
__device__ u32 arrivals[MAX_TILES];

// How the units of all tiles are dealt to the blocks.
struct Deal {
  int units, total, blocks;
  __device__ __forceinline__ int begin(int block) const { return (int)((long long)total * block / blocks); }
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

// What a thread copies of the next unit: its first pieces of 16 bytes, and how many row tiles and tokens there are from
// these on. What lies beyond stays as it is in shared memory: it reaches no output but those that are not stored.
struct Source {
  static constexpr int in_weights = WEIGHT_BYTES / 16, in_scales = PARTS ? PARTS * GROUP_BYTES / SCALE_PIECE : 1;
  static constexpr int tiles_at_once = THREADS / in_weights, scales_at_once = THREADS / in_scales;
  static constexpr int tokens_at_once = THREADS / 16;
  static_assert(!SWIGLU || tiles_at_once == 1 || tiles_at_once % 2 == 0, "steps of pairs, as tile_at asks");
  static_assert(!SWIGLU || scales_at_once >= ROW_TILES || scales_at_once % 2 == 0, "steps of pairs, as tile_at asks");
  const uint4 *weights, *x;
  const unsigned char* scales;
  int tiles, scale_tiles, tokens;
  u32 weights_to, scales_to, x_to;

  __device__ __forceinline__ Source() {
    weights_to = WEIGHTS_AT + tile() * UNIT_BYTES + threadIdx.x % in_weights * 16;
    scales_to = WEIGHTS_AT + scale_tile() * UNIT_BYTES + WEIGHT_BYTES + threadIdx.x % in_scales * SCALE_PIECE;
    x_to = place_of(token(), threadIdx.x % 16);
  }
  __device__ __forceinline__ static int tile() { return threadIdx.x / in_weights; }
  __device__ __forceinline__ static int scale_tile() { return threadIdx.x / in_scales; }
  __device__ __forceinline__ static int token() { return threadIdx.x / 16; }

  __device__ __forceinline__ void move(const uint4* all_weights, const unsigned char* all_scales, const uint4* all_x,
                                       Place place, int unit, int units, int num_tiles, int num_rows) {
    tiles = num_tiles - place.tile - tile();
    scale_tiles = num_tiles - place.tile - scale_tile();
    tokens = num_rows - place.token - token();
    const size_t first = tile_at<SWIGLU>(place.tile + tile(), num_tiles);
    const size_t first_scales = tile_at<SWIGLU>(place.tile + scale_tile(), num_tiles);
    weights = all_weights + (first * units + unit) * in_weights + threadIdx.x % in_weights;
    const size_t piece = (first_scales * units + unit) * in_scales + threadIdx.x % in_scales;
    scales = all_scales + piece * SCALE_PIECE;
    x = all_x + ((size_t)(place.token + token()) * units + unit) * 16 + threadIdx.x % 16;
  }

  // Starts the copies, and steps to the unit after.
  __device__ __forceinline__ void fetch(u32 stage, int units, int num_tiles) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; n += tiles_at_once)
      if ((ROW_TILES % tiles_at_once == 0 || n + tile() < ROW_TILES) && n < tiles)
        copy_async(stage + weights_to + n * UNIT_BYTES, weights + (size_t)tile_at<SWIGLU>(n, num_tiles) * units * in_weights);
    constexpr bool exact = ROW_TILES % scales_at_once == 0 && THREADS % in_scales == 0;
#pragma unroll
    for (int n = 0; n < (PARTS ? ROW_TILES : 0); n += scales_at_once)
      if ((exact || n + scale_tile() < ROW_TILES) && n < scale_tiles)
        copy_async<SCALE_PIECE>(stage + scales_to + n * UNIT_BYTES,
                                scales + (size_t)tile_at<SWIGLU>(n, num_tiles) * units * in_scales * SCALE_PIECE);
#pragma unroll
    for (int n = 0; n < TOKENS; n += tokens_at_once)
      if ((TOKENS % tokens_at_once == 0 || n + token() < TOKENS) && n < tokens)
        copy_async(stage + x_to + n * TOKEN_STEP, x + (size_t)n * units * 16);
    weights += in_weights;
    scales += in_scales * SCALE_PIECE;
    x += 16;
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
  __syncthreads();
  // Wraps to zero by itself, ready for the next launch.
  if (!__syncthreads_or(threadIdx.x == 0 && atomicInc(&arrivals[index], others) == others)) return false;
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

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wide(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, const uint4* __restrict__ x,
     unsigned short* __restrict__ y, float4* __restrict__ parts, int num_tiles, int units, int num_rows CODEBOOK_PARAMETER) {
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int out_warp = (threadIdx.x >> 5) % OUT_WARPS, token_warp = (threadIdx.x >> 5) / OUT_WARPS;
  const u32 address = shared_address(memory);
  DECODER(decoder);
  const int num_places = (num_tiles + ROW_TILES - 1) / ROW_TILES * ((num_rows + TOKENS - 1) / TOKENS);
  const Deal deal = {units, num_places * units, (int)gridDim.x};
  const int end = deal.begin(blockIdx.x + 1);
  int work = deal.begin(blockIdx.x);

  wait_for_predecessors();

  // What is fetched next, AHEAD units ahead.
  int ahead = work, next_place = work, ahead_slot = 0;
  Source source;
  auto fetch_next = [&] {
    if (ahead < end) {
      if (ahead == next_place) {
        source.move(weights, scales, x, Place(ahead / units, num_rows), ahead % units, units, num_tiles,
                    num_rows);
        next_place = (ahead / units + 1) * units;
      }
      source.fetch(address + ahead_slot * STAGE_BYTES, units, num_tiles);
      ahead++;
      if (++ahead_slot == STAGES) ahead_slot = 0;
    }
    commit_copies();
  };
#pragma unroll 1
  for (int i = 0; i < AHEAD; i++) fetch_next();

  // All copies of the next unit have arrived, and nobody reads any more what the copies after it overwrite.
  int slot = 0;
  auto arrive = [&] {
    await_copies<AHEAD - 1>();
    show_to_products();
    __syncthreads();
    const unsigned char* stage = memory + slot * STAGE_BYTES;
    if (++slot == STAGES) slot = 0;
    return stage;
  };

  Products products;
  while (work < end) {
    const int stop = min(end, (work / units + 1) * units);
    u32 fixed[RT][2] = {};
    if (!PARTS) {
      const int tile0 = Place(work / units, num_rows).tile + out_warp * RT;
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (tile0 + r < num_tiles) fixed[r][i] = load_scale(scales + tile_at<SWIGLU>(tile0 + r, num_tiles) * GROUP_BYTES, g, i);
    }

    float acc[RT][NT][4] = {};
    products.add_units(acc, stop - work, decoder, fixed, arrive, fetch_next);
    work = stop;

    if (work == end) let_successor_start();
    // Only now, so that they take no registers meanwhile.
    const int index = (stop - 1) / units, first = max(deal.begin(blockIdx.x), index * units);
    const Place place(index, num_rows);
    const int tile0 = place.tile + out_warp * RT, token0 = place.token + token_warp * NT * 8;
    if (stop - first < units && !join_parts(acc, parts, deal, index, first)) continue;
    static_assert(!SWIGLU || RT % 2 == 0, "tiles in pairs");
    const int num_out = num_tiles * 16 >> SWIGLU;
#pragma unroll
    for (int r = 0; r < RT; r += 1 + SWIGLU)
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          auto output = [&](int tile) {
            return to_bf16(acc[tile][t][j] * OUTPUT_UNIT * (PARTS ? 1.0f : scale_of(fixed[tile][j >> 1])));
          };
          const int m = token0 + t * 8 + 2 * c + (j & 1);
          if (tile0 + r < num_tiles && m < num_rows)
            y[(size_t)m * num_out + tile_at<SWIGLU>(tile0 + r, num_tiles) * 16 + g + 8 * (j >> 1)] =
                SWIGLU ? silu_mul_one(output(r), output(r + SWIGLU)) : output(r);
        }
  }
}
