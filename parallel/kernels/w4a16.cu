// Y[m, n] = sum over k of X[m, k] * weight[n, k]   for up to 8 * NT rows m, where weight[n, k] is
//   (q[n, k] - zero[n, k / GROUP]) * scale[n, k / GROUP], or with CODEBOOK  codebook[q[n, k]] * scale[n, k / GROUP].
//
// A block takes 16 * RT outputs; its warps deal the units of 128 inputs among themselves and add up in shared memory,
// always in the same order. Each warp streams its units through a ring of DEPTH stages in shared memory, filled by
// asynchronous copies: a warp has six scoreboards, so that loads to registers wait for one another (twice the time,
// measured).
//
// Defined by the host: NT (token tiles of 8), RT (row tiles of 16), WARPS, DEPTH (a power of two), GROUP (inputs that
// share a scale: 128, 64 or 32), CODEBOOK (0 or 1).
//
// Layouts (w4a16.py packs them):
//   weights  [N / 16][K / 128][2][32 lanes] of 16 bytes: step s = 4 * h + i of a unit is 32-bit word i of half h. Lane
//            (g, c) holds rows g and g + 8 of four inputs from 32 * (s / 2) + 8 * c + 4 * (s % 2) on: nibble j is
//            (row g + 8 * (j & 1), input 2 * (j >> 1 & 1)), nibble j + 4 the input after it. With CODEBOOK the input
//            after it is the next nibble instead.
//   scales   [N / 16][K / GROUP][16] of 4 bytes: float32, without CODEBOOK its last 4 bits replaced by the zero (an
//            error of 2**-20).
//   codebook [8] words: the low bytes of the 16 entries in bf16, then their high bytes.

#include "tile.cuh"

#define PARTS (128 / GROUP)
#define UNIT_BYTES (1024 + PARTS * 64)
#define STAGE_BYTES (RT * UNIT_BYTES)
#define RING_BYTES (DEPTH * STAGE_BYTES)
#define SUM_BYTES (RT * NT * 512)

#if CODEBOOK

struct Decoder {
  u32 low[4], high[4];

  // Each 8 lanes hand one another what they loaded: what all lanes load alike goes to uniform registers, which
  // permutations cannot read (a copy each time, a fifth of the loop).
  __device__ __forceinline__ explicit Decoder(const u32* codebook) {
    const u32 mine = __ldg(codebook + (threadIdx.x & 7));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      low[i] = __shfl_sync(~0u, mine, threadIdx.x & 24 | i);
      high[i] = __shfl_sync(~0u, mine, threadIdx.x & 24 | 4 | i);
    }
  }

  // Entry by entry: a permutation looks up 4 bytes among 8 by the nibbles' last 3 bits, the first bit picks the half.
  __device__ __forceinline__ static u32 look_up(const u32* bytes, u32 selector, u32 upper) {
    return permute(bytes[0], bytes[1], selector) & ~upper | permute(bytes[2], bytes[3], selector) & upper;
  }

  // The four registers of a fragment.
  __device__ __forceinline__ void operator()(u32* a, u32 q, u32, u32) const {
    const u32 selectors = q & 0x77777777u, shifted = q << 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const u32 selector = half ? selectors >> 16 : selectors;
      const u32 upper = permute(shifted, q, half ? 0xfbea : 0xd9c8);
      const u32 l = look_up(low, selector, upper), h = look_up(high, selector, upper);
      a[2 * half] = permute(l, h, 0x5140);
      a[2 * half + 1] = permute(l, h, 0x7362);
    }
  }
};

__device__ __forceinline__ u32 zero_of(u32) { return 0; }

#define CODEBOOK_PARAMETER , const u32* __restrict__ codebook
#define DECODER(name) const Decoder name(codebook)

#else

struct Decoder {
  // (q & 0x000f000f) | 0x43004300 is the bf16 pair 128 + q; adding -(128 + zero) leaves q - zero exactly.
  __device__ __forceinline__ static u32 subtract_zero(u32 q, u32 negative_zero) {
    return fma_pair(and_or<0x000f000fu, 0x43004300u>(q), 0x3f803f80u, negative_zero);
  }

  // The four registers of a fragment; z0 and z1: `zero_of` its upper and lower rows.
  __device__ __forceinline__ void operator()(u32* a, u32 q, u32 z0, u32 z1) const {
    a[0] = subtract_zero(q, z0);
    a[1] = subtract_zero(q >> 4, z1);
    a[2] = subtract_zero(q >> 8, z0);
    a[3] = subtract_zero(q >> 12, z1);
  }
};

// The bf16 pair -(128 + zero), twice, from a scale's last bits.
__device__ __forceinline__ u32 zero_of(u32 scale) { return (scale & 15u) * 0x10001u | 0xc300c300u; }

#define CODEBOOK_PARAMETER
#define DECODER(name) const Decoder name

#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32)
w4a16(const uint4* __restrict__ weights, const u32* __restrict__ scales, const unsigned short* __restrict__ x,
      unsigned short* __restrict__ y, int num_out, int num_in, int num_rows CODEBOOK_PARAMETER) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int units = num_in >> 7;
  const int tile0 = blockIdx.x * RT;
  const uint4* w = weights + (size_t)tile0 * units * 64 + lane;
  const uint4* sz = (const uint4*)(scales + (size_t)tile0 * units * PARTS * 16) + lane;
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
        const uint4* from = w + ((size_t)r * units + unit) * 64;
        copy_async(stage + lane * 16, from);
        copy_async(stage + 512 + lane * 16, from + 32);
        if (lane < 4 * PARTS) copy_async(stage + 1024 + lane * 16, sz + ((size_t)r * units + unit) * 4 * PARTS);
      }
    }
    commit_copies();
  };

  float acc[RT][NT][4] = {};
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++) fetch(warp + d * WARPS, d);

  // Where they fit into registers, the activations of a whole unit are on their way while its weights are waited for.
  constexpr bool early = NT <= 2;
  uint4 tokens[early ? 4 : 1][NT];
  auto load_tokens = [&](int unit, int quarter) {
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const int m = t * 8 + g;
      tokens[early ? quarter : 0][t] = make_uint4(0, 0, 0, 0);
      if (m < num_rows)
        tokens[early ? quarter : 0][t] = __ldg((const uint4*)(x + (size_t)m * num_in + unit * 128 + quarter * 32 + c * 8));
    }
  };

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
        scale[r][p][0] = *(const u32*)(stage + 1024 + p * 64 + g * 4);
        scale[r][p][1] = *(const u32*)(stage + 1024 + p * 64 + g * 4 + 32);
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
        const float s0 = __uint_as_float(scale[r][p][0]), s1 = __uint_as_float(scale[r][p][1]);
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

  await_copies<0>();
  __syncthreads();
  store_sums<RT, NT, WARPS>(acc, memory, y, tile0, num_out, num_rows, 1.0f);
}

// The same weight as bf16 [N, K], rounded once, for matrix products of many rows. Block (8 warps): a tile and 8 units.
extern "C" __global__ void __launch_bounds__(256)
dequantize_w4(const uint4* __restrict__ weights, const u32* __restrict__ scales, uint4* __restrict__ out,
              int units CODEBOOK_PARAMETER) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int in_tile = blockIdx.y * 8 + (threadIdx.x >> 5);
  if (in_tile >= units) return;
  DECODER(decode);
  const size_t unit = (size_t)blockIdx.x * units + in_tile;
  const uint4 now[2] = {__ldg(weights + unit * 64 + lane), __ldg(weights + unit * 64 + 32 + lane)};
#pragma unroll
  for (int quarter = 0; quarter < 4; quarter++) {
    const u32* scale = scales + (unit * PARTS + quarter * PARTS / 4) * 16 + g;
    const u32 s[2] = {__ldg(scale), __ldg(scale + 8)};
    u32 a[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
      decode(a[i], word(now[quarter >> 1], (quarter * 2 & 3) + i), zero_of(s[0]), zero_of(s[1]));
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float f = __uint_as_float(s[r]);
      // A row has 16 * units pieces of 16 bytes.
      out[(((size_t)blockIdx.x * 16 + g + 8 * r) * units + in_tile) * 16 + quarter * 4 + c] =
          make_uint4(scale_pair(a[0][r], f), scale_pair(a[0][2 + r], f), scale_pair(a[1][r], f), scale_pair(a[1][2 + r], f));
    }
  }
}
