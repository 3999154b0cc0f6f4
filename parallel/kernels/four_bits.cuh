// 4-bit weights as w4a16.py packs them, and how a fragment of mma.m16n8k16 is made of them.
//
// Defined by the host: GROUP (inputs that share a scale: 128, 64 or 32), CODEBOOK (0 or 1), SCALE_BITS (of a scale and its
// zero: 32, 20 or 16), HALF (0 or 1: scales of less than 32 bits are in bf16 or in float16).
//
// Layouts:
//   weights  [N / 16][K / 128][2][32 lanes] of 16 bytes: step s = 4 * h + i of a unit is 32-bit word i of half h. Lane
//            (g, c) holds rows g and g + 8 of four inputs from 32 * (s / 2) + 8 * c + 4 * (s % 2) on: nibble j is
//            (row g + 8 * (j & 1), input 2 * (j >> 1 & 1)), nibble j + 4 the input after it. With CODEBOOK the input
//            after it is the next nibble instead.
//   scales   [N / 16][K / GROUP], for each group, by SCALE_BITS:
//            32: [16] of float32, without CODEBOOK their last 4 bits replaced by the zero (an error of 2**-20).
//            20: [16] of 2 bytes, then [8] bytes of zeros: that of row g in the low half of byte g, of g + 8 in the high.
//            16: [16] of 2 bytes; zeros are 8.
//   codebook [8] words: the low bytes of the 16 entries in bf16, then their high bytes.

#include "tile.cuh"

#define PARTS (128 / GROUP)
#define WEIGHT_BYTES 1024
// Of the scales of a group, and what is copied of them at a time.
#define GROUP_BYTES (2 * SCALE_BITS)
#define SCALE_PIECE (SCALE_BITS == 20 ? 8 : 16)
#define UNIT_BYTES ((WEIGHT_BYTES + PARTS * GROUP_BYTES + 15) / 16 * 16)
// Of the eight steps of 16 inputs in a unit, those whose weights a lane has in 16 bytes.
#define STEPS_PER_LOAD 4
#if CODEBOOK

#define UNIT 1.0f

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

// Weights are computed in 64ths.
#define UNIT 64.0f

struct Decoder {
  // The four registers of a fragment; z0 and z1: `zero_of` its upper and lower rows. As bf16, the last 8 bits are that
  // many times 2**-133; times 2**127 (or 2**123, of the upper nibble) and less the zero, exactly (q - zero) / 64.
  __device__ __forceinline__ void operator()(u32* a, u32 q, u32 z0, u32 z1) const {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      a[i] = fma_pair(q & 0x000f000fu, 0x7f007f00u, z0);
      a[i + 1] = fma_pair(q & 0x00f000f0u, 0x7d007d00u, z1);
      q >>= 8;
    }
  }
};

// The bf16 pair -zero / 64, twice, from a scale's last bits.
__device__ __forceinline__ u32 zero_of(u32 scale) {
  return fma_pair((SCALE_BITS == 16 ? 8 : scale & 15u) * 0x10001u, 0xff00ff00u, 0x80008000u);
}

#define CODEBOOK_PARAMETER
#define DECODER(name) const Decoder name

#endif

// The scale of row g + 8 * r of a tile in float32, its last 4 bits the zero where there is one, out of those of a group.
__device__ __forceinline__ u32 load_scale(const unsigned char* group, int g, int r) {
  if (SCALE_BITS == 32) return ((const u32*)group)[g + 8 * r];
  const unsigned short bits = ((const unsigned short*)group)[g + 8 * r];
  const u32 scale = HALF ? widen_half(bits) : (u32)bits << 16;
  return SCALE_BITS == 20 ? scale | group[32 + g] >> 4 * r & 15 : scale;
}

__device__ __forceinline__ float scale_of(u32 scale) {
  return __uint_as_float(SCALE_BITS == 20 ? scale & ~15u : scale);
}

// The fragment of a step, from the 16 bytes that have it.
__device__ __forceinline__ void decode_step(u32* a, const Decoder& decode, const uint4& loaded, int step, u32 z0, u32 z1) {
  decode(a, word(loaded, step & 3), z0, z1);
}
