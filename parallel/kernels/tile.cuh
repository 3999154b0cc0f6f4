// What the kernels of packed weights share: bf16 tensor cores, asynchronous copies, and the sum over a block's warps.
//
// Weights are the 16-row side of mma.m16n8k16, so 8 tokens share a tile and none of it is wasted at batch 1. Inputs of a
// group are taken in an order of the packers' choice: lane (g = lane / 4, c = lane % 4) has, in quarter s of a group of
// 128, inputs 32 * s + 8 * c to + 7, four for each of two steps, of rows g and g + 8. So a lane reads X 16 bytes at a
// time, and its four neighbours read the 64 bytes in a row.

typedef unsigned int u32;

__device__ __forceinline__ void copy_async(u32 shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the last `pending` commits of this thread have arrived.
template <int pending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

__device__ __forceinline__ u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }

// a * b + c of two bf16 pairs, subnormal numbers included.
__device__ __forceinline__ u32 fma_pair(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Byte i of the result is the byte of (a, b) that nibble i of `selector` names, 0 to 7; with bit 3, its sign repeated.
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

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

// A bf16 pair times a float, rounded once.
__device__ __forceinline__ u32 scale_pair(u32 pair, float scale) {
  const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
  u32 result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high * scale), "f"(low * scale));
  return result;
}

// Adds up `acc` over the warps of a block, always in the same order, and writes it times `unit` for the tokens there are.
template <int row_tiles, int token_tiles, int warps>
__device__ __forceinline__ void store_sums(const float (&acc)[row_tiles][token_tiles][4], void* memory, unsigned short* y,
                                           int tile0, int num_out, int num_rows, float unit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float(*sums)[row_tiles * token_tiles * 4][32] = (float(*)[row_tiles * token_tiles * 4][32])memory;
#pragma unroll
  for (int r = 0; r < row_tiles; r++)
#pragma unroll
    for (int t = 0; t < token_tiles; t++)
#pragma unroll
      for (int j = 0; j < 4; j++) sums[warp][(r * token_tiles + t) * 4 + j][lane] = acc[r][t][j];
  __syncthreads();
  // Threads of a run of 16 take the 16 outputs of one token, which lie side by side in Y.
  for (int i = threadIdx.x; i < row_tiles * token_tiles * 128; i += warps * 32) {
    const int out = i & 15, m8 = (i >> 4) & 7, rt = i >> 7;
    const int t = rt % token_tiles, r = rt / token_tiles;
    const int source_lane = (out & 7) * 4 + (m8 >> 1), j = (out >> 3) * 2 + (m8 & 1);
    float total = 0;
#pragma unroll
    for (int v = 0; v < warps; v++) total += sums[v][(r * token_tiles + t) * 4 + j][source_lane];
    const int m = t * 8 + m8;
    if (m < num_rows) y[(size_t)m * num_out + (tile0 + r) * 16 + out] = to_bf16(total * unit);
  }
}
