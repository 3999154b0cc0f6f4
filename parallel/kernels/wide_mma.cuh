// How wide.cu multiplies below sm_90: by mma.m16n8k16, each warp on its own, tokens read from shared memory like weights.
//
// A stage has the weights of all row tiles, then the tokens, 256 bytes each. The pieces of 16 bytes of every other token
// change halves of 128 bytes, so that two tokens' 64 bytes lie in different banks.

#define STAGE_BYTES (ROW_TILES * UNIT_BYTES + TOKENS * TOKEN_BYTES)
#define WEIGHTS_AT 0
// From a token to the next.
#define TOKEN_STEP TOKEN_BYTES
// What sums are multiplied by at the end.
#define OUTPUT_UNIT UNIT
// Units fetched ahead of the one that is multiplied.
#define AHEAD (STAGES - 1)

// Where in a stage a piece of a token lies.
__device__ __forceinline__ int place_of(int token, int piece) {
  return ROW_TILES * UNIT_BYTES + token * TOKEN_BYTES + (piece ^ (token & 1) << 2) * 16;
}

// What this thread's copies brought to shared memory, for products to see: they do.
__device__ __forceinline__ void show_to_products() {}

struct Products {
  // Adds `count` units of a warp's outputs and tokens to `acc`. `arrive` waits for the stage of the next; `fetch` is called
  // once there is work for the tensor cores. `fixed`: the scales of outputs whose inputs share one.
  template <class Arrive, class Fetch>
  __device__ __forceinline__ void add_units(float (&acc)[RT][NT][4], int count, const Decoder& decoder,
                                            const u32 (&fixed)[RT][2], const Arrive& arrive, const Fetch& fetch) {
    for (; count > 0; count--) add_unit(acc, arrive(), decoder, fixed, fetch);
  }

 private:
  template <class Fetch>
  __device__ __forceinline__ void add_unit(float (&acc)[RT][NT][4], const unsigned char* stage, const Decoder& decoder,
                                           const u32 (&fixed)[RT][2], const Fetch& fetch) {
    const unsigned char* weights = stage + (threadIdx.x >> 5) % OUT_WARPS * RT * UNIT_BYTES;
    const unsigned char* tokens = stage + ROW_TILES * UNIT_BYTES + (threadIdx.x >> 5) / OUT_WARPS * NT * 8 * TOKEN_BYTES;
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
};
