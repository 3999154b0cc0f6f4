// Y[m, n] = sum over k of X[m, k] * weight[n, k], as w4a16.cu and w8a16.cu, from the same packed weights, for many rows m.
//
// A tile of Y is 16 * RT * OUT_WARPS outputs of 8 * NT * TOKEN_WARPS tokens, one block's work at a time: each warp takes
// RT row tiles and NT token tiles of it, so that a weight is decoded once for all tokens of its warp. Weights and X come
// through a ring of STAGES units of 128 inputs in shared memory, filled by asynchronous copies that run on over the end
// of a tile.
//
// Defined by the host: BITS (4 or 8), NT, RT, OUT_WARPS, TOKEN_WARPS (4 warps or 8), STAGES, BLOCKS (on a multiprocessor),
// SWIGLU (0 or 1, then with an even RT), and what four_bits.cuh or eight_bits.cuh asks for, which have the layouts.

#include "wide_tiles.cuh"

#define STAGE_BYTES (ROW_TILES * UNIT_BYTES + TOKENS * TOKEN_BYTES)

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
    weights_to = tile() * UNIT_BYTES + threadIdx.x % in_weights * 16;
    scales_to = scale_tile() * UNIT_BYTES + WEIGHT_BYTES + threadIdx.x % in_scales * SCALE_PIECE;
    // The pieces of every other token change halves of 128 bytes, so that two tokens' 64 bytes lie in different banks.
    x_to = ROW_TILES * UNIT_BYTES + token() * TOKEN_BYTES + (threadIdx.x % 16 ^ (token() & 1) << 2) * 16;
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
        copy_async(stage + x_to + n * TOKEN_BYTES, x + (size_t)n * units * 16);
    weights += in_weights;
    scales += in_scales * SCALE_PIECE;
    x += 16;
  }
};

// Adds a unit of a warp's outputs and tokens to `acc`. `fixed`: the scales of outputs whose inputs share one. `fetch` is
// called once there is work for the tensor cores.
template <class Fetch>
__device__ __forceinline__ void multiply_unit(float (&acc)[RT][NT][4], const unsigned char* weights,
                                              const unsigned char* tokens, const Decoder& decoder,
                                              const u32 (&fixed)[RT][2], const Fetch& fetch) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const unsigned char* scales = weights + WEIGHT_BYTES;
  // One half after the other where groups are small: unrolled, what they load ahead takes more registers than there are.
  constexpr int halves = PARTS > 1 ? 2 : 1, parts = PARTS ? PARTS / halves : 1;
#pragma unroll 1
  for (int half = 0; half < halves; half++) {
    uint4 loaded[RT];
#pragma unroll
    for (int p = 0; p < parts; p++) {
      u32 scale[RT][2];
#pragma unroll
      for (int r = 0; r < RT; r++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          scale[r][i] = PARTS ? load_scale(scales + r * UNIT_BYTES + (half * parts + p) * GROUP_BYTES, g, i) : fixed[r][i];
      float part[RT][PARTS ? NT : 1][4] = {};
#pragma unroll
      for (int step = p * 8 / halves / parts; step < (p + 1) * 8 / halves / parts; step += 2) {
        uint4 b[NT];
#pragma unroll
        for (int t = 0; t < NT; t++)
          b[t] = *(const uint4*)(tokens + (t * 8 + g) * TOKEN_BYTES + half * 128 + (step * 2 + c ^ (g & 1) << 2) * 16);
#pragma unroll
        for (int r = 0; r < RT; r++)
          if (step % STEPS_PER_LOAD == 0)
            loaded[r] = *(const uint4*)(weights + r * UNIT_BYTES + (half + step / STEPS_PER_LOAD) * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int r = 0; r < RT; r++) {
            u32 a[4];
            decode_step(a, decoder, loaded[r], step + i, zero_of(scale[r][0]), zero_of(scale[r][1]));
#pragma unroll
            for (int t = 0; t < NT; t++)
              multiply(PARTS ? part[r][PARTS ? t : 0] : acc[r][t], a, i ? b[t].z : b[t].x, i ? b[t].w : b[t].y);
          }
        if (step == 0 && half == 0) fetch();
      }
      if (PARTS) {
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int t = 0; t < NT; t++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[r][t][j] += part[r][PARTS ? t : 0][j] * scale_of(scale[r][j >> 1]);
      }
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wide(const uint4* __restrict__ weights, const unsigned char* __restrict__ scales, const uint4* __restrict__ x,
     unsigned short* __restrict__ y, float4* __restrict__ parts, int num_tiles, int units, int num_rows CODEBOOK_PARAMETER) {
  DYNAMIC_SHARED(memory);
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int out_warp = (threadIdx.x >> 5) % OUT_WARPS, token_warp = (threadIdx.x >> 5) / OUT_WARPS;
  const u32 address = shared_address(memory);
  DECODER(decoder);
  const Deal deal{units, count_places(num_tiles, num_rows) * units, (int)gridDim.x};
  const int end = deal.begin(blockIdx.x + 1);
  int work = deal.begin(blockIdx.x);

  wait_for_predecessors();

  // What is fetched next, STAGES - 1 units ahead.
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
  for (int i = 0; i < STAGES - 1; i++) fetch_next();

  int slot = 0;
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
    for (; work < stop; work++) {
      await_copies<STAGES - 2>();
      // All copies of this unit have arrived, and nobody reads any more what the next copies overwrite.
      __syncthreads();
      const unsigned char* stage = memory + slot * STAGE_BYTES;
      multiply_unit(acc, stage + out_warp * RT * UNIT_BYTES,
                    stage + ROW_TILES * UNIT_BYTES + token_warp * NT * 8 * TOKEN_BYTES, decoder, fixed,
                    fetch_next);
      if (++slot == STAGES) slot = 0;
    }

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
            return to_bf16(acc[tile][t][j] * UNIT * (PARTS ? 1.0f : scale_of(fixed[tile][j >> 1])));
          };
          const int m = token0 + t * 8 + 2 * c + (j & 1);
          if (tile0 + r < num_tiles && m < num_rows)
            y[(size_t)m * num_out + tile_at<SWIGLU>(tile0 + r, num_tiles) * 16 + g + 8 * (j >> 1)] =
                SWIGLU ? silu_mul_one(output(r), output(r + SWIGLU)) : output(r);
        }
  }
}
