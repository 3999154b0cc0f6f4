// How wide.cu multiplies on sm_90: by warp groups (wgmma.cuh), of which each takes 64 * RT outputs of all tokens of a tile.
//
// A stage has the tokens' first 64 inputs, their second, then the weights of all row tiles. While the tensor cores work
// through 64 inputs, the warps decode the weights of the next.
//
// SCALED: weights are multiplied by their scale before they are, and so rounded to bf16, just as dequantize_packed.cu does;
// otherwise exact sums of a group are, which takes as many registers again as a warp has outputs.

#include "wgmma.cuh"

#define HALF_TOKEN_BYTES 128
#define WEIGHTS_AT (TOKENS * TOKEN_BYTES)
#define STAGE_BYTES ((WEIGHTS_AT + ROW_TILES * UNIT_BYTES + 1023) / 1024 * 1024)
// From a token to the next.
#define TOKEN_STEP HALF_TOKEN_BYTES
#define SCALED (PARTS > 2 || PARTS > 0 && NT > 8)
// What sums are multiplied by at the end.
#define OUTPUT_UNIT (SCALED ? 1.0f : UNIT)
// Units fetched ahead of the one that is multiplied: products of the one before it may still be under way.
#define AHEAD (STAGES - 2)

// Where in a stage a piece of a token lies.
__device__ __forceinline__ int place_of(int token, int piece) {
  return (piece >> 3) * TOKENS * HALF_TOKEN_BYTES + token * HALF_TOKEN_BYTES + ((piece ^ token) & 7) * 16;
}

// A fragment times the scales of its upper and its lower rows, each weight rounded once.
__device__ __forceinline__ void scale_fragment(u32 (&a)[4], const u32 (&scale)[2]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float by = scale_of(scale[i & 1]) * UNIT;
#if BITS == 4 && SCALE_BITS != 32 && !HALF
    a[i] = fma_pair(a[i], to_pair(by, by), 0x80008000u);
#else
    a[i] = scale_pair(a[i], by);
#endif
  }
}

struct Products {
  // Of the first and the second half of a unit's inputs, four steps.
  u32 fragments[2][4][4] = {};
  Swap swap;

  // Adds `count` units of a warp's outputs to `acc`. `arrive` waits for the stage of the next; `fetch` is called once there
  // is work for the tensor cores. `fixed`: the scales of outputs whose inputs share one.
  template <class Arrive, class Fetch>
  __device__ __forceinline__ void add_units(float (&acc)[RT][NT][4], int count, const Decoder& decoder,
                                            const u32 (&fixed)[RT][2], const Arrive& arrive, const Fetch& fetch) {
    const unsigned char* stage = arrive();
    decode_half(0, stage, decoder, fixed);
#pragma unroll 1
    while (count-- > 0) {
      const unsigned char* weights = stage;
      const unsigned long long tokens = describe_tokens(shared_address(stage));
      float part[NT][4] = {};
#pragma unroll
      for (int turn = 0; turn < 2 * RT; turn++) {
        const int r = turn / 2, half = turn % 2;
        start_products();
#pragma unroll
        for (int i = 0; i < 4; i++)
          multiply_tokens(PARTS && !SCALED ? part : acc[r], fragments[half][i],
                          tokens + (half * TOKENS * HALF_TOKEN_BYTES + i * 32 >> 4));
        commit_products();
        if (turn == 0) fetch();
        // Those before these have read their fragments, which are those of the turn after these.
        await_products<1>();
        hold(fragments[half ^ 1]);
        if (turn + 1 < 2 * RT) {
          decode_half(turn + 1, stage, decoder, fixed);
        } else if (count > 0) {
          stage = arrive();
          decode_half(0, stage, decoder, fixed);
        }
        if (PARTS && !SCALED && (half == 1 || PARTS == 2)) add_part(acc[r], part, weights, r, PARTS == 2 ? half : 0);
      }
      // No product is under way from one round to the next: the compiler would let each wait for the one before.
      await_products<0>();
#pragma unroll
      for (int r = 0; r < RT; r++) hold(acc[r]);
      hold(fragments[1]);
    }
  }

 private:
  __device__ __forceinline__ static const unsigned char* weights_of(const unsigned char* stage, int r) {
    return stage + WEIGHTS_AT + ((threadIdx.x >> 5) * RT + r) * UNIT_BYTES;
  }

  // The scale of row g + 8 * i of row tile r, for part p of a unit's inputs.
  __device__ __forceinline__ static u32 scale_at(const unsigned char* stage, int r, int p, int i) {
    return load_scale(weights_of(stage, r) + WEIGHT_BYTES + p * GROUP_BYTES, (threadIdx.x & 31) >> 2, i);
  }

  // The fragments of 64 inputs: those of turn 2 * r + half.
  __device__ __forceinline__ void decode_half(int turn, const unsigned char* stage, const Decoder& decoder,
                                              const u32 (&fixed)[RT][2]) {
    constexpr int loads = 4 / STEPS_PER_LOAD;
    const int r = turn / 2, half = turn % 2;
    u32 scale[2] = {fixed[r][0], fixed[r][1]};
#pragma unroll
    for (int load = 0; load < loads; load++) {
      uint4 loaded = *(const uint4*)(weights_of(stage, r) + (half * loads + load) * 512 + (threadIdx.x & 31) * 16);
      swap(loaded);
#pragma unroll
      for (int i = 0; i < STEPS_PER_LOAD; i++) {
        const int step = half * 4 + load * STEPS_PER_LOAD + i;
        u32(&a)[4] = fragments[half][step & 3];
        if (PARTS && (step & 3) % (8 / (PARTS ? PARTS : 1)) == 0)
          for (int j = 0; j < 2; j++) scale[j] = scale_at(stage, r, step * PARTS / 8, j);
        decode_step(a, decoder, loaded, step, zero_of(scale[0]), zero_of(scale[1]));
        if (SCALED) scale_fragment(a, scale);
      }
    }
  }

  // Adds the sums of a group, and clears them.
  __device__ __forceinline__ void add_part(float (&acc)[NT][4], float (&part)[NT][4], const unsigned char* stage, int r, int p) {
    await_products<0>();
    hold(part);
    const float by[2] = {scale_of(scale_at(stage, r, p, 0)), scale_of(scale_at(stage, r, p, 1))};
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        acc[t][j] += part[t][j] * by[j >> 1];
        part[t][j] = 0;
      }
  }
};
