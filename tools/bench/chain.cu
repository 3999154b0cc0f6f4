// Stands for the wait of an all-reduce: one block that does nothing for some time.

#include "../../parallel/kernels/programmatic.cuh"

__device__ __forceinline__ unsigned long long now_ns() {
  unsigned long long time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

extern "C" __global__ void stall(int ns) {
  wait_for_predecessors();
  let_successor_start();
  const unsigned long long start = now_ns();
  while (now_ns() - start < ns) {}
}
