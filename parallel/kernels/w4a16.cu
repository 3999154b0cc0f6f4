// Y[m, n] = sum over k of X[m, k] * (q[n, k] - zero[n, k / 128]) * scale[n, k / 128]   for up to 8 * NT rows m.
//
// Weights are the 16-row side of mma.m16n8k16, so 8 tokens share a tile and none of it is wasted at batch 1. A block
// takes 16 * RT outputs; its warps deal the groups of 128 inputs among themselves and add up in shared memory, always in
// the same order. Each warp streams its groups through a ring of DEPTH stages in shared memory, filled by asynchronous
// copies: a warp has six scoreboards, so that loads to registers wait for one another (twice the time, measured).
//
// Defined by the host: NT (token tiles of 8), RT (row tiles of 16), WARPS, DEPTH (a power of two).
//
// Layouts (w4a16.py packs them):
//   weights  [N / 16][K / 128][2][32 lanes] of 16 bytes: step s = 4 * h + i of a group is 32-bit word i of half h. Lane
//            (g = lane / 4, c = lane % 4) holds rows g and g + 8 of four inputs from 32 * (s / 2) + 8 * c + 4 * (s % 2)
//            on: nibble j is (row g + 8 * (j & 1), input 2 * (j >> 1 & 1)), nibble j + 4 the input after it. The order
//            of inputs inside a group is free; with this one a lane reads X 16 bytes at a time, for two steps, and its
//            four neighbours read the 64 bytes in a row.
//   scales   [N / 16][K / 128][16] of 4 bytes: float32, its last 4 bits replaced by the zero (an error of 2**-20).

typedef unsigned int u32;

__device__ __forceinline__ void copy_async(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// (q & 0x000f000f) | 0x43004300 is the bf16 pair 128 + q; adding -(128 + zero) leaves q - zero exactly.
__device__ __forceinline__ u32 subtract_zero(u32 q, u32 negative_zero) {
  u32 pair;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(pair) : "r"(q));
  asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(0x3f803f80u), "r"(negative_zero));
  return pair;
}

// The bf16 pair -(128 + zero), twice, from a scale's last bits.
__device__ __forceinline__ u32 negative_zero(u32 scale) { return (scale & 15u) * 0x10001u | 0xc300c300u; }

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ __forceinline__ unsigned short to_bf16(float v) {
  unsigned short h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

#define STAGE_BYTES (RT * 1088)
#define RING_BYTES (DEPTH * STAGE_BYTES)
#define SUM_BYTES (RT * NT * 512)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
w4a16(const uint4* __restrict__ weights, const u32* __restrict__ scales, const unsigned short* __restrict__ x,
      unsigned short* __restrict__ y, int num_out, int num_in, int num_rows) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int groups = num_in >> 7;
  const int tile0 = blockIdx.x * RT;
  const uint4* w = weights + (size_t)tile0 * groups * 64 + lane;
  const uint4* sz = (const uint4*)(scales + (size_t)tile0 * groups * 16) + lane;

  // The ring while groups stream, then the partial sums.
  __shared__ __align__(16) unsigned char memory[WARPS * (RING_BYTES > SUM_BYTES ? RING_BYTES : SUM_BYTES)];
  const unsigned char* ring = memory + warp * RING_BYTES;
  const u32 ring_address = (u32)__cvta_generic_to_shared(ring);

  auto fetch = [&](int group, int slot) {
    if (group < groups) {
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const u32 stage = ring_address + slot * STAGE_BYTES + r * 1088;
        const uint4* from = w + ((size_t)r * groups + group) * 64;
        copy_async(stage + lane * 16, from);
        copy_async(stage + 512 + lane * 16, from + 32);
        if (lane < 4) copy_async(stage + 1024 + lane * 16, sz + ((size_t)r * groups + group) * 4);
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };

  float acc[RT][NT][4] = {};
#pragma unroll
  for (int d = 0; d < DEPTH - 1; d++) fetch(warp + d * WARPS, d);

  // Where they fit into registers, the activations of a whole group are on their way while its weights are waited for.
  constexpr bool early = NT <= 2;
  uint4 tokens[early ? 4 : 1][NT];
  auto load_tokens = [&](int group, int quarter) {
#pragma unroll
    for (int t = 0; t < NT; t++) {
      const int m = t * 8 + g;
      tokens[early ? quarter : 0][t] = make_uint4(0, 0, 0, 0);
      if (m < num_rows)
        tokens[early ? quarter : 0][t] = __ldg((const uint4*)(x + (size_t)m * num_in + group * 128 + quarter * 32 + c * 8));
    }
  };

  int slot = 0;
  for (int group = warp; group < groups; group += WARPS) {
    fetch(group + (DEPTH - 1) * WARPS, (slot + DEPTH - 1) & (DEPTH - 1));
    if (early) {
#pragma unroll
      for (int quarter = 0; quarter < 4; quarter++) load_tokens(group, quarter);
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 1) : "memory");
    __syncwarp();
    uint4 now[RT][2];
    u32 scale[RT][2];
#pragma unroll
    for (int r = 0; r < RT; r++) {
      const unsigned char* stage = ring + slot * STAGE_BYTES + r * 1088;
      now[r][0] = *(const uint4*)(stage + lane * 16);
      now[r][1] = *(const uint4*)(stage + 512 + lane * 16);
      scale[r][0] = *(const u32*)(stage + 1024 + g * 4);
      scale[r][1] = *(const u32*)(stage + 1024 + g * 4 + 32);
    }
    // The next round overwrites this slot.
    __syncwarp();
    slot = (slot + 1) & (DEPTH - 1);

    float part[RT][NT][4] = {};
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      if (!early) load_tokens(group, quarter);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int step = quarter * 2 + i;
#pragma unroll
        for (int r = 0; r < RT; r++) {
          const u32 q = word(now[r][step >> 2], step & 3);
          const u32 z0 = negative_zero(scale[r][0]), z1 = negative_zero(scale[r][1]);
          const u32 a[4] = {subtract_zero(q, z0), subtract_zero(q >> 4, z1), subtract_zero(q >> 8, z0),
                            subtract_zero(q >> 12, z1)};
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
      const float s0 = __uint_as_float(scale[r][0]), s1 = __uint_as_float(scale[r][1]);
#pragma unroll
      for (int t = 0; t < NT; t++) {
        acc[r][t][0] += part[r][t][0] * s0;
        acc[r][t][1] += part[r][t][1] * s0;
        acc[r][t][2] += part[r][t][2] * s1;
        acc[r][t][3] += part[r][t][3] * s1;
      }
    }
  }

  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  float(*sums)[RT * NT * 4][32] = (float(*)[RT * NT * 4][32])memory;
#pragma unroll
  for (int r = 0; r < RT; r++)
#pragma unroll
    for (int t = 0; t < NT; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[warp][(r * NT + t) * 4 + j][lane] = acc[r][t][j];
  __syncthreads();
  // Threads of a run of 16 take the 16 outputs of one token, which lie side by side in Y.
  for (int i = threadIdx.x; i < RT * NT * 128; i += WARPS * 32) {
    const int out = i & 15, m8 = (i >> 4) & 7, rt = i >> 7;
    const int t = rt % NT, r = rt / NT;
    const int source_lane = (out & 7) * 4 + (m8 >> 1), j = (out >> 3) * 2 + (m8 & 1);
    float total = 0;
#pragma unroll
    for (int v = 0; v < WARPS; v++) total += sums[v][(r * NT + t) * 4 + j][source_lane];
    const int m = t * 8 + m8;
    if (m < num_rows) y[(size_t)m * num_out + (tile0 + r) * 16 + out] = to_bf16(total);
  }
}

// The bf16 pair (q - zero) * scale, rounded once.
__device__ __forceinline__ u32 scaled_pair(u32 q, u32 scale) {
  const u32 pair = subtract_zero(q, negative_zero(scale));
  const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u), s = __uint_as_float(scale);
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high * s), "f"(low * s));
  return result;
}

// The same weight as bf16 [N, K], for matrix products of many rows. Block (8 warps): a tile and 8 groups.
extern "C" __global__ void __launch_bounds__(256)
dequantize_w4(const uint4* __restrict__ weights, const u32* __restrict__ scales, uint4* __restrict__ out, int groups) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  const int group = blockIdx.y * 8 + (threadIdx.x >> 5);
  if (group >= groups) return;
  const size_t unit = (size_t)blockIdx.x * groups + group;
  const uint4 now[2] = {__ldg(weights + unit * 64 + lane), __ldg(weights + unit * 64 + 32 + lane)};
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const u32 scale = __ldg(scales + unit * 16 + g + 8 * r);
    // A row has 16 * groups pieces of 16 bytes.
    uint4* to = out + ((size_t)blockIdx.x * 16 + g + 8 * r) * groups * 16 + group * 16 + c;
#pragma unroll
    for (int quarter = 0; quarter < 4; quarter++) {
      const u32 first = word(now[quarter >> 1], quarter * 2 & 3) >> 4 * r;
      const u32 second = word(now[quarter >> 1], (quarter * 2 & 3) + 1) >> 4 * r;
      to[quarter * 4] = make_uint4(scaled_pair(first, scale), scaled_pair(first >> 8, scale), scaled_pair(second, scale),
                               scaled_pair(second >> 8, scale));
    }
  }
}
