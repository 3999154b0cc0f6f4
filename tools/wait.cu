// Waits for a number of the card's clocks, while blocks beside those that wait fetch memory ahead of its use.

#include "../parallel/kernels/prefetch.cuh"

extern "C" __global__ void __launch_bounds__(256) wait(long long clocks, AHEAD_PARAMETERS) {
  if (FETCHES_AHEAD) return;
  const long long start = clock64();
  if (threadIdx.x == 0)
    while (clock64() - start < clocks) {}
}
