// Y[m, n] = sum over k of X[m, k] * weight[n, k], as wide.cu and from the same packed weights, by warp groups of sm_90.
//
// A tile of Y is 16 * OUT_WARPS outputs of 8 * NT tokens, one block's work at a time. Four warps together multiply 64
// outputs by all tokens of the tile (wgmma.cuh), 32 inputs at a turn: while the tensor cores are at one turn, the warps
// decode the weights of the turn three later, and swap those of the turn after that. So a weight's way from shared memory
// to a product takes four turns, none of which waits for it. One more warp group has the thread that copies
// (wide_ring.cuh), and gives its registers to the others.
//
// Weights whose inputs have scales in groups are multiplied by them before they are, and so rounded to bf16, as
// dequantize_packed.cu does.
//
// Defined by the host: NT (8, 16 or 32), OUT_WARPS (8 or 12), TOKEN_STAGES, WEIGHT_STAGES, and what four_bits.cuh or
// eight_bits.cuh asks for, which have the layouts; SWIGLU is 0.

#define RT 1
#define TOKEN_WARPS 1
#define COPIERS 128
#include "bulk_copies.cuh"
#define MEET() meet_threads<THREADS>()
#define ANY(mine) any_thread<THREADS>(mine)
#include "wide_tiles.cuh"
#include "wgmma.cuh"
#include "swap.cuh"
#include "wide_ring.cuh"
#include "wide_waves.cuh"

// Registers of each thread: as the block gets them, then of those that copy and those that multiply.
#define ALL_THREADS (THREADS + COPIERS)
#define START_REGISTERS (65536 / ALL_THREADS / 8 * 8)
#define COPY_REGISTERS 24
#define MULTIPLY_REGISTERS ((START_REGISTERS * ALL_THREADS - COPY_REGISTERS * COPIERS) / THREADS / 8 * 8)
#define TURNS_PER_LOAD (STEPS_PER_LOAD / 2)
#define TURNS_PER_SCALE (PARTS ? 4 / PARTS : 4)
#define OUTPUT_UNIT (PARTS ? 1.0f : UNIT)
#if BITS == 4
#define SHORT_SCALES (SCALE_BITS != 32 && !HALF)
#else
#define SHORT_SCALES 0
#endif
static_assert(!SWIGLU, "wide.cu has that");

__device__ __forceinline__ void copy_all(Filler filler, Waves waves, int num_rows) {
  Run run;
  while (waves.next(run)) {
    const Place place(run.tile, num_rows);
#pragma unroll 1
    for (int unit = run.first; unit < run.stop; unit++) filler.fill(place, unit);
  }
}

// A scale in two numbers of bf16, each twice: what it is rounded down to, and the rest.
struct Factor {
  u32 main, rest;
  __device__ __forceinline__ void set(u32 scale) {
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

// What a warp multiplies: its row tile of the units in the ring, one after the other, four turns each. Fragments of a turn
// are made three turns ahead; `loaded` and `loaded_scales` are as they lie in memory, `words` swapped.
struct Multiplier {
  const Ring& ring;
  const Decoder& decoder;
  // Units not yet loaded.
  int left;
  u32 fragments[4][2][4] = {};
  uint4 loaded, words;
  u32 loaded_scales[2], zeros[2];
  Factor factors[2];
  TokenSlot token_slot;
  WeightSlot weight_slot;
  Swap swap;

  __device__ __forceinline__ Multiplier(const Ring& ring, const Decoder& decoder, int left)
      : ring(ring), decoder(decoder), left(left) {}

  // Before the first unit. `is_odd`: whether its number among those of the row tile is.
  __device__ __forceinline__ void begin(bool is_odd) {
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      load(turn, is_odd);
      if (turn > 0) decode(turn - 1);
      prepare(turn);
    }
    finish_loading();
  }

  // Adds a unit to `acc`; the one after it `is_odd`.
  __device__ __forceinline__ void add_unit(float (&acc)[NT][4], bool is_odd) {
#pragma unroll
    for (int turn = 0; turn < 4; turn++) {
      if (turn % 2 == 0) await_phase(ring.full(token_slot), token_slot.parity);
      const u32 tokens = describe_tokens(ring.tokens(token_slot)) + (turn % 2 * 64 >> 4);
      start_products();
#pragma unroll
      for (int i = 0; i < 2; i++) multiply_tokens(acc, fragments[turn][i], tokens + (i * 32 >> 4));
      commit_products();
      load(turn, is_odd);
      // Those before these have read their fragments, and their tokens.
      await_products<1>();
      const int before = (turn + 3) % 4;
      hold(fragments[before]);
      if (turn == 2) give_free(done);
      decode(before);
      hold(fragments[before]);
      prepare(turn);
      if (turn % 2 == 1) {
        done = ring.empty(token_slot);
        token_slot.step();
      }
    }
    finish_loading();
    // No product is under way from one round to the next: the compiler would let each wait for the one before.
    await_products<0>();
    hold(acc);
    hold(fragments[3]);
    give_free(done);
  }

 private:
  // The barrier of the half of a unit's tokens that is given free next.
  u32 done;

  __device__ __forceinline__ void give_free(u32 empty) const {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) arrive_at(empty);
  }

  // What a turn of the next unit needs. Beyond the last unit, of whatever is there, for products that nobody asks for.
  __device__ __forceinline__ void load(int turn, bool is_odd) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (turn == 0 && left > 0) await_phase(ring.full(weight_slot), weight_slot.parity);
    const unsigned char* stage = ring.weights(weight_slot);
    if (turn % TURNS_PER_LOAD == 0)
      loaded = *(const uint4*)(stage + warp * WEIGHT_BYTES + turn / TURNS_PER_LOAD * 512 + lane * 16);
    if (turn % TURNS_PER_SCALE) return;
    // 40 bytes of every other unit begin in the middle of 16.
    const unsigned char* group = stage + SCALES_AT + warp * SCALE_STEP + turn / TURNS_PER_SCALE * GROUP_BYTES +
                                 (SCALE_BYTES % 16 && is_odd ? 8 : 0);
#pragma unroll
    for (int i = 0; i < 2; i++) loaded_scales[i] = load_scale(group, lane >> 2, i);
  }

  __device__ __forceinline__ void prepare(int turn) {
    if (turn % TURNS_PER_LOAD == 0) {
      words = loaded;
      swap(words);
    }
    if (turn % TURNS_PER_SCALE) return;
#pragma unroll
    for (int i = 0; i < 2; i++) {
      zeros[i] = zero_of(loaded_scales[i]);
      factors[i].set(loaded_scales[i]);
    }
  }

  __device__ __forceinline__ void decode(int turn) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      u32(&a)[4] = fragments[turn][i];
      decode_step(a, decoder, words, 2 * turn + i, zeros[0], zeros[1]);
      if (PARTS)
        for (int j = 0; j < 4; j++) a[j] = factors[j & 1](a[j]);
    }
  }

  __device__ __forceinline__ void finish_loading() {
    give_free(ring.empty(weight_slot));
    weight_slot.step();
    left--;
  }
};

// Four lanes c give one another their words: each gets word c of all four.
__device__ __forceinline__ void exchange_words(u32 (&r)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const u32 got = __shfl_xor_sync(~0u, odd ? r[i] : r[i + 1], 1);
    (odd ? r[i] : r[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const u32 got = __shfl_xor_sync(~0u, upper ? r[i] : r[i + 2], 2);
    (upper ? r[i] : r[i + 2]) = got;
  }
}

// A warp's outputs of a tile, eight neighbouring ones of a token at a time. `scales`: of outputs whose inputs share one.
__device__ __forceinline__ void store(const float (&acc)[NT][4], const unsigned char* scales, unsigned short* y, int tile,
                                      int token0, int num_tiles, int num_rows) {
  if (tile >= num_tiles) return;
  const int g = (threadIdx.x & 31) >> 2, c = threadIdx.x & 3;
  float unit[2];
#pragma unroll
  for (int i = 0; i < 2; i++)
    unit[i] = OUTPUT_UNIT * (PARTS ? 1.0f : scale_of(load_scale(scales + tile * GROUP_BYTES, g, i)));
#pragma unroll
  for (int t = 0; t < NT; t += 2) {
    u32 r[4];
    // Two tokens of output g become two outputs of token g.
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float(&sums)[4] = acc[t + (i >> 1)];
      r[i] = transpose_pairs(to_pair(sums[2 * (i & 1)] * unit[i & 1], sums[2 * (i & 1) + 1] * unit[i & 1]));
    }
    exchange_words(r);
    const int m = token0 + (t + (c >> 1)) * 8 + g;
    if (m < num_rows)
      *(uint4*)(y + (size_t)m * num_tiles * 16 + tile * 16 + 8 * (c & 1)) = make_uint4(r[0], r[1], r[2], r[3]);
  }
}

// `num_waves` of tiles whole, the rest by the first `sharing` blocks.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
wide(const __grid_constant__ TensorMap weights, const __grid_constant__ TensorMap scale_map,
     const __grid_constant__ TensorMap tokens, const unsigned char* __restrict__ scales, unsigned short* __restrict__ y,
     float4* __restrict__ parts, int num_tiles, int units, int num_rows, int num_waves, int sharing CODEBOOK_PARAMETER) {
  // Boxes of swapped tokens begin at multiples of 1024.
  DYNAMIC_SHARED_AT(1024, memory);
  const Ring ring{memory};
  if (threadIdx.x == 0) ring.open(OUT_WARPS);
  __syncthreads();
  Waves waves(num_tiles, units, num_rows, num_waves, sharing);

  wait_for_predecessors();

  if (threadIdx.x >= THREADS) {
    give_registers<COPY_REGISTERS>();
    if (threadIdx.x == THREADS) copy_all(Filler{ring, {&tokens, &weights, &scale_map}}, waves, num_rows);
  } else {
    take_registers<MULTIPLY_REGISTERS>();
    DECODER(decoder);
    Multiplier multiplier(ring, decoder, waves.total());
    Run run, next;
    bool more = waves.next(run);
    if (more) multiplier.begin(run.first & 1);
    while (more) {
      more = waves.next(next);
      float acc[RT][NT][4] = {};
#pragma unroll 1
      for (int unit = run.first; unit < run.stop; unit++)
        multiplier.add_unit(acc[0], (unit + 1 < run.stop ? unit + 1 : next.first) & 1);
      if (!more) let_successor_start();
      const int index = waves.dealt(run.tile);
      if (run.stop - run.first == units || join_parts(acc, parts, waves.rest, index, index * units + run.first)) {
        const Place place(run.tile, num_rows);
        store(acc[0], scales, y, place.tile + (threadIdx.x >> 5), place.token, num_tiles, num_rows);
      }
      run = next;
    }
  }
}
