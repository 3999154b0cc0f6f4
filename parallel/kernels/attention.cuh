// Instructions of paged_attention.cu that C++ has no name for. tests/parallel/kernels/emulated_attention.h has the same in C++.
//
// Defined by the host: QUERY_F16, KV_FP8 and CLUSTER, as there.

#ifndef ATTENTION_CUH
#define ATTENTION_CUH

#include "programmatic.cuh"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL 0xffffffffu
#define LOWEST __int_as_float(0xff800000)
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) u8 name[]

__device__ __forceinline__ u32 shared_address(const void* memory) { return (u32)__cvta_generic_to_shared(memory); }

// Copies 16 bytes, or writes zeros without reading.
__device__ __forceinline__ void copy_async(u32 shared, const void* global, bool present) {
  const int size = present ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(size) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The 8x8 matrix whose row g lies in lanes (g, 0..3), two elements each, transposed.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 pair;
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(pair) : "f"(low), "f"(high));
  return pair;
}

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
#if QUERY_F16 || KV_FP8
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four e4m3 numbers as two fp16 pairs, exactly.
__device__ __forceinline__ void unpack_e4m3(u32 four, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
      : "=r"(low), "=r"(high) : "r"(four));
#else
  // Exponent and mantissa moved into place are the number divided by 2**8; here NaN would read 480.
  const u32 pairs[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
  u32 moved[2];
  for (int i = 0; i < 2; i++) {
    moved[i] = (pairs[i] & 0x80008000u) | ((pairs[i] & 0x7f007f00u) >> 1);
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(moved[i]) : "r"(0x5c005c00u));
  }
  low = moved[0];
  high = moved[1];
#endif
}

// What kernels before the one right ahead wrote, and no kernel since: read from L2, since the first level may have what
// was there earlier, and kept in L2, where all layers of a step find it although their weights pass through.
__device__ __forceinline__ int load_kept(const int* from) {
  u64 policy;
  int value;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("ld.relaxed.gpu.global.L2::cache_hint.b32 %0, [%1], %2;" : "=r"(value) : "l"(from), "l"(policy) : "memory");
  return value;
}

#if CLUSTER > 1
#define CLUSTER_SHAPE __cluster_dims__(1, CLUSTER, 1)
// Shared memory that other blocks of the cluster store into.
#define SHARED_IN_CLUSTER(type, name) __shared__ type name

// Threads that have come here need not wait.
__device__ __forceinline__ void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

// Until all threads of all blocks of the cluster have come.
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// One thread, before it arrives at the cluster: `arrivals` will have come once blocks have stored so many bytes.
__device__ __forceinline__ void expect_bytes(u64* arrivals, int bytes) {
  const u32 at = shared_address(arrivals);
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

// Until they have.
__device__ __forceinline__ void await_bytes(u64* arrivals) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;}"
      ::"r"(shared_address(arrivals)) : "memory");
}

// The place in the shared memory of block `rank` of the cluster that `own` has in this one's.
__device__ __forceinline__ u32 address_in_block(const void* own, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

// Stores to the place that `own` has in block `rank`, and tells `arrivals` there.
__device__ __forceinline__ void store_in_block(float4* own, int rank, const float4& v, u64* arrivals) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_in_block(own, rank)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w),
               "r"(address_in_block(arrivals, rank)) : "memory");
}

__device__ __forceinline__ void store_in_block(float2* own, int rank, const float2& v, u64* arrivals) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   address_in_block(own, rank)), "f"(v.x), "f"(v.y), "r"(address_in_block(arrivals, rank)) : "memory");
}
#else
#define CLUSTER_SHAPE
#endif

// Counts to `last`, then from zero again. What blocks wrote before they counted is seen by those that count later.
__device__ __forceinline__ u32 count_up(u32* counter, u32 last) {
  u32 found;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(found) : "l"(counter), "r"(last) : "memory");
  return found;
}

#endif
