// Y[m, n] = sum over k of X[m, k] * weight[n, k], as wide.cu and from the same packed weights, by warp groups of sm_90.
//
// A tile of Y is 16 * RT * OUT_WARPS outputs of 8 * NT tokens, one block's work at a time. Four warps together multiply 64
// outputs by all tokens of the tile (wgmma.cuh): while the tensor cores work through 64 inputs, the warps decode the weights
// of the next, and swap those of the 64 after. All come through a ring of units of 128 inputs (wide_ring.cuh).
//
// SCALED: weights are multiplied by their scale before they are, and so rounded to bf16, as dequantize_packed.cu does;
// otherwise exact sums of a group are, which takes as many registers again as a warp has outputs.
//
// Defined by the host: NT (8 or 16), RT, OUT_WARPS (4, 8 or 12), STAGES, BLOCKS (on a multiprocessor), SWIGLU (0 or 1, then
// with an even RT), and what four_bits.cuh or eight_bits.cuh asks for, which have the layouts.

#define TOKEN_WARPS 1
#include "wide_tiles.cuh"
#include "wgmma.cuh"
#include "wide_ring.cuh"

#define SCALED (PARTS > 2 || PARTS > 0 && NT > 8)
#if BITS == 4
#define SHORT_SCALES (SCALE_BITS != 32 && !HALF)
#else
#define SHORT_SCALES 0
#endif
#define OUTPUT_UNIT (SCALED ? 1.0f : UNIT)
static_assert(!SWIGLU || RT % 2 == 0, "tiles in pairs");

// A scale in two numbers of bf16, each twice: what it is rounded down to, and the rest.
struct Factor {
  u32 main, rest;
  __device__ __forceinline__ explicit Factor(u32 scale) {
    const float by = scale_of(scale) * UNIT;
    main = __float_as_uint(by) >> 16;
    main |= main << 16;
    const float left = by - low(main);
    rest = to_pair(left, left);
  }
  // Of a scale of bf16 there is no rest. Otherwise twice rounded, the first time by 2**-17 of the product.
  __device__ __forceinline__ u32 operator()(u32 pair) const {
    return fma_pair(pair, main, SHORT_SCALES ? 0x80008000u : fma_pair(pair, rest, 0x80008000u));
  }
};

// Of half a unit's inputs of a row tile: what was loaded, each lane with the inputs of its fragments, and the scales.
#define HALF_LOADS (4 / STEPS_PER_LOAD)
#define HALF_PARTS (PARTS > 2 ? PARTS / 2 : 1)
struct Loaded {
  uint4 words[HALF_LOADS];
  u32 scales[HALF_PARTS][2];
};

// What a warp multiplies: its row tiles of the units in the ring, one after the other. A unit is 2 * RT turns: both halves
// of its inputs of a row tile, then those of the next.
struct Multiplier {
  const unsigned char* ring;
  const Barriers& barriers;
  const Decoder& decoder;
  // The scales of outputs whose inputs share one.
  u32 fixed[RT][2] = {};
  // Of the turns with the first and the second half, four steps.
  u32 fragments[2][4][4] = {};
  u32 scales[2][2];
  Loaded loaded;
  // Of the unit that is loaded next; `odd`: its number among those of a row tile.
  Slot slot;
  bool odd;
  Swap swap;

  __device__ __forceinline__ Multiplier(const unsigned char* ring, const Barriers& barriers, const Decoder& decoder)
      : ring(ring), barriers(barriers), decoder(decoder) {}

  // Adds `count` units to `acc`.
  __device__ __forceinline__ void add_units(float (&acc)[RT][NT][4], int count, Filler& filler) {
    await_phase(barriers.full(slot.index), slot.parity);
    load(0);
    decode(0);
    load(1);
#pragma unroll 1
    while (count-- > 0) {
      const u32 empty = barriers.empty(slot.index);
      const u32 tokens = describe_tokens(shared_address(ring) + slot.index * STAGE_BYTES);
      float part[NT][4] = {};
#pragma unroll
      for (int turn = 0; turn < 2 * RT; turn++) {
        const int r = turn / 2, half = turn % 2;
        start_products();
#pragma unroll
        for (int i = 0; i < 4; i++)
          multiply_tokens(PARTS && !SCALED ? part : acc[r], fragments[half][i], tokens + (half * HALF_BYTES + i * 32 >> 4));
        commit_products();
        // Into the stage of the unit before the last, which the other warps have most likely done with.
        if (turn == 0 && threadIdx.x == 0) filler.fill();
        // Those before these have read their fragments, which are those of the turn after these.
        await_products<1>();
        hold(fragments[half ^ 1]);
        if (turn == 2 * RT - 2) {
          slot.step();
          odd = !odd;
          if (count > 0) await_phase(barriers.full(slot.index), slot.parity);
        }
        if (turn + 1 < 2 * RT || count > 0) decode((turn + 1) % (2 * RT));
        if (turn + 2 < 2 * RT || count > 0) load((turn + 2) % (2 * RT));
        if (PARTS && !SCALED && (half == 1 || PARTS == 2)) add_part(acc[r], part, scales[half]);
      }
      // No product is under way from one round to the next: the compiler would let each wait for the one before.
      await_products<0>();
#pragma unroll
      for (int r = 0; r < RT; r++) hold(acc[r]);
      hold(fragments[1]);
      __syncwarp();
      if ((threadIdx.x & 31) == 0) arrive_at(empty);
    }
  }

 private:
  __device__ __forceinline__ void load(int turn) {
    const int r = turn / 2, half = turn % 2, g = (threadIdx.x & 31) >> 2, place = (threadIdx.x >> 5) * RT + r;
    const int stored = SWIGLU ? (place >> 1) + (place & 1) * (ROW_TILES >> 1) : place;
    const unsigned char* stage = ring + slot.index * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < HALF_LOADS; i++) {
      loaded.words[i] = *(const uint4*)(stage + WEIGHTS_AT + stored * WEIGHT_BYTES + (half * HALF_LOADS + i) * 512 +
                                        (threadIdx.x & 31) * 16);
      swap(loaded.words[i]);
    }
    // 40 bytes of every other unit begin in the middle of 16.
    const unsigned char* group = stage + SCALES_AT + (SWIGLU ? (place & 1) * SCALES_ROOM + (place >> 1) * SCALE_STEP
                                                             : place * SCALE_STEP) +
                                 (SCALE_BYTES % 16 && odd ? 8 : 0);
#pragma unroll
    for (int p = 0; p < HALF_PARTS; p++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        loaded.scales[p][i] = PARTS ? load_scale(group + ((half * PARTS >> 1) + p) * GROUP_BYTES, g, i) : fixed[r][i];
  }

  // The fragments of what was loaded last, for its turn.
  __device__ __forceinline__ void decode(int turn) {
    const int half = turn % 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      u32(&a)[4] = fragments[half][i];
      const u32(&scale)[2] = loaded.scales[i * HALF_PARTS / 4];
      decode_step(a, decoder, loaded.words[i / STEPS_PER_LOAD], half * 4 + i, zero_of(scale[0]), zero_of(scale[1]));
      if (SCALED) {
        const Factor upper(scale[0]), lower(scale[1]);
        for (int j = 0; j < 4; j++) a[j] = j & 1 ? lower(a[j]) : upper(a[j]);
      }
    }
    scales[half][0] = loaded.scales[0][0];
    scales[half][1] = loaded.scales[0][1];
  }

  // Adds the sums of a group, and clears them.
  __device__ __forceinline__ static void add_part(float (&acc)[NT][4], float (&part)[NT][4], const u32 (&scale)[2]) {
    await_products<0>();
    hold(part);
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        acc[t][j] += part[t][j] * scale_of(scale[j >> 1]);
        part[t][j] = 0;
      }
  }
};

// A warp's outputs of a tile, two neighbouring ones of a token at a time.
__device__ __forceinline__ void store(const float (&acc)[RT][NT][4], const u32 (&fixed)[RT][2], unsigned short* y,
                                      int tile0, int token0, int num_tiles, int num_rows) {
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  const size_t num_out = num_tiles * 16 >> SWIGLU;
#pragma unroll
  for (int r = 0; r < RT; r += 1 + SWIGLU)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        auto output = [&](int tile, int j) {
          return acc[tile][t][j] * OUTPUT_UNIT * (PARTS ? 1.0f : scale_of(fixed[tile][i]));
        };
        u32 pair = to_pair(output(r, 2 * i), output(r, 2 * i + 1));
        if (SWIGLU) {
          const u32 ups = to_pair(output(r + SWIGLU, 2 * i), output(r + SWIGLU, 2 * i + 1));
          pair = silu_mul_one(pair, ups) | (u32)silu_mul_one(pair >> 16, ups >> 16) << 16;
        }
        // Two tokens of output g become two outputs of token g.
        pair = transpose_pairs(pair);
        const int m = token0 + t * 8 + g;
        if (tile0 + r < num_tiles && m < num_rows)
          *(u32*)(y + m * num_out + tile_at<SWIGLU>(tile0 + r, num_tiles) * 16 + 8 * i + 2 * c) = pair;
      }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
wide(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scale_map,
     const __grid_constant__ TensorMap tokens, const unsigned char* __restrict__ scales, unsigned short* __restrict__ y,
     float4* __restrict__ parts, int num_tiles, int units, int num_rows CODEBOOK_PARAMETER) {
  DYNAMIC_SHARED(memory);
  const u32 ring = shared_address(memory);
  const Barriers barriers{ring + STAGES * STAGE_BYTES};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      open_barrier(barriers.full(i), 1);
      open_barrier(barriers.empty(i), OUT_WARPS);
    }
    show_barriers();
  }
  __syncthreads();
  DECODER(decoder);
  const Deal deal(num_tiles, units, num_rows);
  const int end = deal.begin(blockIdx.x + 1);
  int work = deal.begin(blockIdx.x);

  wait_for_predecessors();

  Filler filler{{&tokens, &weights, &scale_map}, ring, barriers, end - work, num_tiles, units, num_rows, work % units,
                Place(work / units, num_rows)};
  if (threadIdx.x == 0)
    for (int i = 0; i < STAGES - 2; i++) filler.fill();

  Multiplier multiplier(memory, barriers, decoder);
  while (work < end) {
    const int stop = min(end, (work / units + 1) * units), index = work / units, first = work;
    const Place place(index, num_rows);
    const int tile0 = place.tile + (threadIdx.x >> 5) * RT;
#pragma unroll
    for (int r = 0; r < RT; r++) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (!PARTS && tile0 + r < num_tiles)
          multiplier.fixed[r][i] =
              load_scale(scales + tile_at<SWIGLU>(tile0 + r, num_tiles) * GROUP_BYTES, (threadIdx.x & 31) >> 2, i);
    }
    multiplier.odd = work % units & 1;
    float acc[RT][NT][4] = {};
    multiplier.add_units(acc, stop - work, filler);
    work = stop;
    if (work == end) let_successor_start();
    if (stop - first < units && !join_parts(acc, parts, deal, index, first)) continue;
    store(acc, multiplier.fixed, y, tile0, place.token, num_tiles, num_rows);
  }
}
