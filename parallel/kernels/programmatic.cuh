// Kernels whose blocks come to the card before the kernel ahead of them in the stream has ended: programmatic dependent
// launch, from sm_90 on. launch.py starts a kernel so where its source has a wait and a graph is being captured; started
// otherwise, or below sm_90, none of this does anything.
//
// Rules for the kernels of such a source:
// - Every thread waits, before it returns, writes, or reads anything but the weights of a linear layer, which no kernel
//   of a graph writes. That is for the sake of all kernels before, not only of the one right ahead: that one ends only
//   when it has waited itself, and so when all before it have ended. So sums, counters, flags and pages that
//   kernels hand on, or use one after the other, need nothing else.
// - One exception: what the kernel right ahead does not write may be read before the wait, from L2. That kernel has
//   waited before it let this one start, so that all before it have ended. Attention reads the page tables, lengths and
//   earlier tokens of a step so: of these, the kernel ahead writes the newest tokens only.
// - Only then it lets the successor start. So of a stream there are two kernels on the card at most, one that works and
//   one that waits: what waits for a peer, or for another block of its grid, has all kernels before it behind it and all
//   its own blocks on the card before any of the next take room.
// - Small kernels let it start at once. Kernels that fill the card do at the end of their loops: blocks that come while
//   some multiprocessors are still at work crowd together on the others.
// - What is const and __restrict__, or read by __ldg, is taken for constant as long as the kernel runs, and may be read
//   before the wait, or from a cache that has what was there before it: load_fresh does not.

#ifndef PROGRAMMATIC_CUH
#define PROGRAMMATIC_CUH

#if __CUDA_ARCH__ >= 900

#define STARTS_EARLY 1

// Until all kernels before have ended, and what they wrote can be seen.
__device__ __forceinline__ void wait_for_predecessors() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// The next kernel's blocks may come, once all blocks of this one have said so or ended.
__device__ __forceinline__ void let_successor_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// What an earlier kernel wrote; of 4, 8 or 16 bytes.
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load");
  __align__(16) unsigned int words[4];
  if (sizeof(T) == 4)
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(words[0]) : "l"(from) : "memory");
  else if (sizeof(T) == 8)
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from) : "memory");
  else
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(from) : "memory");
  return *(const T*)words;
}

#else

#define STARTS_EARLY 0

__device__ __forceinline__ void wait_for_predecessors() {}
__device__ __forceinline__ void let_successor_start() {}
template <class T>
__device__ __forceinline__ T load_fresh(const T* from) { return __ldg(from); }

#endif
#endif
