// What kernels in bf16 are made of: pairs in a 32-bit word, the first in the low half, and instructions as PTX, since
// NVRTC comes without CUDA's own headers. tests/parallel/kernels/emulated.h has the same in C++.

#ifndef DEVICE_CUH
#define DEVICE_CUH

#include "programmatic.cuh"

typedef unsigned int u32;

// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) DYNAMIC_SHARED_AT(16, name)
#define DYNAMIC_SHARED_AT(alignment, name) extern __shared__ __align__(alignment) unsigned char name[]

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

template <int bytes = 16>
__device__ __forceinline__ void copy_async(u32 shared, const void* global) {
  if (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(bytes) : "memory");
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

// The bits of a float16 number in float32.
__device__ __forceinline__ u32 widen_half(unsigned short bits) {
  float v;
  asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
  return __float_as_uint(v);
}

__device__ __forceinline__ unsigned short to_bf16(float v) {
  unsigned short h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v));
  return h;
}

// The bf16 pair of two floats.
__device__ __forceinline__ u32 to_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

#endif
