// 8-bit weights as w8a16.py packs them, and how a fragment of mma.m16n8k16 is made of them.
//
// Defined by the host: GROUPED, E4M3 (0 or 1).
//
// Layouts:
//   weights  [N / 16][K / 128][4][32 lanes] of 16 bytes: quarter s of a unit. Word 2 * i + p of lane (g, c) holds inputs
//            32 * s + 8 * c + 4 * i + 2 * p and the one after it, in its low and its high half, of row g and row g + 8.
//            Integers: row g in the low byte. E4M3: row g in bits 15 (sign) and 10 to 4, which is where bf16 has them;
//            row g + 8 in the bits left: 11 (sign), 14 to 12 and 3 to 0.
//   scales   [N / 16][K / 128 or 1][16] of 4 bytes: float32; of integers the last 8 bits are the zero, and the scale is
//            what it is without them.

#include "tile.cuh"

#define PARTS GROUPED
#define WEIGHT_BYTES 2048
// Of the scales of a group, and what is copied of them at a time.
#define GROUP_BYTES 64
#define SCALE_PIECE 16
#define UNIT_BYTES (WEIGHT_BYTES + PARTS * GROUP_BYTES)
// Of the eight steps of 16 inputs in a unit, those whose weights a lane has in 16 bytes.
#define STEPS_PER_LOAD 2
#define CODEBOOK_PARAMETER

// The scale of row g + 8 * r of a tile, with its zero, out of those of a group.
__device__ __forceinline__ u32 load_scale(const unsigned char* group, int g, int r) {
  return ((const u32*)group)[g + 8 * r];
}

#if E4M3

#define UNIT 1.0f

__device__ __forceinline__ float scale_of(u32 scale) { return __uint_as_float(scale); }

__device__ __forceinline__ u32 zero_of(u32) { return 0x80008000u; }

// Exponents of bf16 begin 120 lower than those of e4m3; the product is exact, for subnormal numbers too.
__device__ __forceinline__ void decode(u32* a, u32 w, u32 z0, u32 z1) {
  a[0] = fma_pair(w & 0x87f087f0u, 0x7b807b80u, z0);
  a[1] = fma_pair(w << 4 & 0x80f080f0u | w >> 4 & 0x07000700u, 0x7b807b80u, z1);
}

#else

// Weights are computed in 64ths.
#define UNIT 64.0f

__device__ __forceinline__ float scale_of(u32 scale) { return __uint_as_float(scale & 0xffffff00u); }

// The bf16 pair -zero / 64, twice, from a scale's last bits.
__device__ __forceinline__ u32 zero_of(u32 scale) {
  return fma_pair((scale & 255u) * 0x10001u, 0xff00ff00u, 0x80008000u);
}

// As bf16, the bits of a byte are that many times 2**-133; times 2**127 and less the zero, exactly (q - zero) / 64.
__device__ __forceinline__ void decode(u32* a, u32 w, u32 z0, u32 z1) {
  a[0] = fma_pair(w & 0x00ff00ffu, 0x7f007f00u, z0);
  a[1] = fma_pair(permute(w, 0, 0x4341), 0x7f007f00u, z1);
}

#endif

struct Decoder {};
#define DECODER(name) const Decoder name

// The fragment of a step, from the 16 bytes that have it.
__device__ __forceinline__ void decode_step(u32* a, const Decoder&, const uint4& loaded, int step, u32 z0, u32 z1) {
  decode(a, word(loaded, 2 * (step & 1)), z0, z1);
  decode(a + 2, word(loaded, 2 * (step & 1) + 1), z0, z1);
}
