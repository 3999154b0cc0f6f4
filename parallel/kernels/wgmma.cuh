// Products by the tensor cores of sm_90 a warp group at a time (wgmma): weights from registers, tokens from shared memory.
//
// Four warps have 16 rows each of 64, in the registers of mma.m16n8k16, and so have the sums. Tokens lie in shared memory
// input by input, 64 inputs of a token in 128 bytes, whose pieces of 16 bytes are swapped as the hardware asks: piece i of
// token n at i ^ (n & 7).
//
// Written against the PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
// tests/parallel/kernels/emulated_groups.h has the same in C++.

#ifndef WGMMA_CUH
#define WGMMA_CUH

__device__ __forceinline__ void start_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the last `pending` commits of this warp group are done.
template <int pending>
__device__ __forceinline__ void await_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// Registers of products that are under way: neither moved nor used for anything else before this.
template <int n>
__device__ __forceinline__ void hold(float (&sums)[n][4]) {
#pragma unroll
  for (int i = 0; i < n * 4; i++) asm volatile("" : "+f"(sums[i >> 2][i & 3])::"memory");
}
template <int n>
__device__ __forceinline__ void hold(u32 (&fragments)[n][4]) {
#pragma unroll
  for (int i = 0; i < n * 4; i++) asm volatile("" : "+r"(fragments[i >> 2][i & 3])::"memory");
}

// How tokens lie: swapped over 128 bytes (1 << 62), with 1024 bytes from eight tokens to the next; 0x40000040. The low half:
__device__ __forceinline__ u32 describe_tokens(u32 address) { return 1u << 16 | (address >> 4 & 0x3fffu); }

#define SUMS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SUMS_64 SUMS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
                ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SUMS_128 SUMS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
                 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95" \
                 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
                 ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define OF_TILE(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define OF_TILES_2(t) OF_TILE(t), OF_TILE(t + 1)
#define OF_TILES_4(t) OF_TILES_2(t), OF_TILES_2(t + 2)
#define OF_TILES_8(t) OF_TILES_4(t), OF_TILES_4(t + 4)
#define OF_TILES_16(t) OF_TILES_8(t), OF_TILES_8(t + 8)
#define OF_TILES_32(t) OF_TILES_16(t), OF_TILES_16(t + 16)
#define PRODUCT(tokens, sums, a0, a1, a2, a3, b, tiles)                                                            \
  asm volatile("{.reg .b64 at;\nmov.b64 at, {" b ", 0x40000040};\n"                                                \
               "wgmma.mma_async.sync.aligned.m64n" tokens "k16.f32.bf16.bf16 {" sums "}, {" a0 ", " a1 ", " a2 ", " a3 \
               "}, at, 1, 1, 1, 0;}"                                                                               \
               : tiles : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(tokens_at) : "memory")

// d += 16 inputs of 64 outputs times those of 8 * NT tokens.
__device__ __forceinline__ void multiply_tokens(float (&d)[NT][4], const u32 (&a)[4], u32 tokens_at) {
#if NT == 8
  PRODUCT("64", SUMS_32, "%32", "%33", "%34", "%35", "%36", OF_TILES_8(0));
#elif NT == 16
  PRODUCT("128", SUMS_64, "%64", "%65", "%66", "%67", "%68", OF_TILES_16(0));
#elif NT == 32
  PRODUCT("256", SUMS_128, "%128", "%129", "%130", "%131", "%132", OF_TILES_32(0));
#else
#error "tokens of a tile: 64, 128 or 256"
#endif
}

// An 8 x 8 matrix of 16 bits, of which lane (g, c) has columns 2 * c and 2 * c + 1 of row g: its transpose.
__device__ __forceinline__ u32 transpose_pairs(u32 pair) {
  u32 d;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(pair));
  return d;
}

// A warp group's registers a thread from here on: fewer than before, or as many more as others gave.
template <int registers>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }

#endif
