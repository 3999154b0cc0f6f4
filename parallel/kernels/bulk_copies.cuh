// Copies to shared memory in bulk, the barriers that count their bytes (sm_90), and barriers of some threads of a block.
//
// Written against the PTX ISA, "Asynchronous Copy", "mbarrier" and "barrier". tests/parallel/kernels/emulated_groups.h has the same
// in C++.

#ifndef BULK_COPIES_CUH
#define BULK_COPIES_CUH

#include "device.cuh"

// A CUtensorMap, as the driver made it.
struct __align__(64) TensorMap {
  unsigned char bytes[128];
};

// A barrier in shared memory, 8 bytes: its phase ends when all its arrivals have come, and all bytes that were announced.
__device__ __forceinline__ void open_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all barriers are open, before any copy is started.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive_at(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void arrive_and_announce(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; the first is of parity 0.
__device__ __forceinline__ void await_phase(u32 barrier, u32 parity) {
  asm volatile("{.reg .pred done;\nagain_%=:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again_%=;}"
               ::"r"(barrier), "r"(parity) : "memory");
}

// A box of the map, from column x and row y on. What lies beyond the tensor comes as zeros.
__device__ __forceinline__ void copy_box(u32 shared, const TensorMap* map, int x, int y, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
                   shared), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}

// The first `threads` of a block meet; whether any of them says so.
template <int threads>
__device__ __forceinline__ void meet_threads() { asm volatile("barrier.sync 1, %0;" ::"n"(threads) : "memory"); }
template <int threads>
__device__ __forceinline__ bool any_thread(bool mine) {
  u32 any;
  asm volatile("{.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbarrier.red.or.pred q, 1, %2, p;\nselp.u32 %0, 1, 0, q;}"
               : "=r"(any) : "r"((u32)mine), "n"(threads) : "memory");
  return any;
}

#endif
