// Stands for the attention kernel: blocks with as much shared memory, which say on which multiprocessor they are.
//
// Defined by the host: CLUSTER, as there.

#include "../../parallel/kernels/programmatic.cuh"

#if CLUSTER > 1
#define CLUSTER_SHAPE __cluster_dims__(1, CLUSTER, 1)
#else
#define CLUSTER_SHAPE
#endif

__device__ __forceinline__ unsigned long long now_ns() {
  unsigned long long time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

extern "C" __global__ void CLUSTER_SHAPE note_places(int* multiprocessors, int ns) {
  wait_for_predecessors();
  int place;
  asm volatile("mov.u32 %0, %smid;" : "=r"(place));
  if (threadIdx.x == 0) multiprocessors[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] = place;
  const unsigned long long start = now_ns();
  while (now_ns() - start < ns) {}
  let_successor_start();
}
