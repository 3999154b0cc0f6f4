// Brings memory into L2 ahead of its use, while a kernel leaves the memory idle.
//
// Blocks of blockIdx.z = 0 do the kernel's work; those above, which start after them, only ask for memory and end. What
// is asked for is a hint that nothing waits for, so that no kernel ends later for it, unless it is more than the memory
// delivers meanwhile.
//
// Defined by the host: FETCH, how memory is asked for: 0 by lines, 1 by sectors, 2 in bulk (lines before sm_90), 3 by
// lines, no sooner than the memory can deliver them; and BYTES_PER_CLOCK, which it delivers in a clock of the card.

#ifndef PREFETCH_CUH
#define PREFETCH_CUH

#if FETCH == 2 && __CUDA_ARCH__ >= 900
#define FETCH_BYTES 4096
#define THREADS_PER_FETCH 32
#elif FETCH == 1
#define FETCH_BYTES 32
#define THREADS_PER_FETCH 1
#else
#define FETCH_BYTES 128
#define THREADS_PER_FETCH 1
#endif
#define LINE_MASK 127ull

// Two pieces of memory, as the last parameters of a kernel.
#define AHEAD_PARAMETERS const void *ahead, const void *more_ahead, int ahead_bytes, int more_ahead_bytes
#define FETCHES_AHEAD fetches_ahead(ahead, more_ahead, ahead_bytes, more_ahead_bytes)

// What others ask for meanwhile must not queue behind all that is fetched.
__device__ __forceinline__ void await_turn(long long begun, unsigned long long bytes_before) {
#if FETCH == 3
  while (clock64() - begun < (long long)(bytes_before / BYTES_PER_CLOCK)) __nanosleep(100);
#endif
}

__device__ __forceinline__ void fetch(unsigned long long at, unsigned long long end) {
#if FETCH_BYTES == 4096
  const unsigned int bytes = end - at < FETCH_BYTES ? (unsigned int)(end - at) : FETCH_BYTES;
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(bytes) : "memory");
#else
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}

// Whole lines: what lies beside a piece in its first and last is of the same page.
__device__ __forceinline__ void fetch_piece(const void* piece, int bytes, int worker, int workers, long long begun) {
  if (bytes <= 0) return;
  const unsigned long long start = (unsigned long long)piece & ~LINE_MASK;
  const unsigned long long end = ((unsigned long long)piece + bytes + LINE_MASK) & ~LINE_MASK;
  unsigned long long at = start + (unsigned long long)worker * FETCH_BYTES;
  for (; at < end; at += (unsigned long long)workers * FETCH_BYTES) {
    await_turn(begun, at - start);
    fetch(at, end);
  }
}

// Every thread of a kernel asks this first; true: it has fetched, and has nothing to do.
__device__ __forceinline__ bool fetches_ahead(AHEAD_PARAMETERS) {
  if (blockIdx.z == 0) return false;
  const int block = ((blockIdx.z - 1) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int blocks = (gridDim.z - 1) * gridDim.y * gridDim.x;
  const int thread = block * blockDim.x + threadIdx.x, threads = blocks * blockDim.x;
  if (thread % THREADS_PER_FETCH) return true;
  const int worker = thread / THREADS_PER_FETCH, workers = threads / THREADS_PER_FETCH;
  // Scales, the smaller piece, go first: every block of the linear waits for some of them.
  fetch_piece(more_ahead, more_ahead_bytes, worker, workers, clock64());
  fetch_piece(ahead, ahead_bytes, worker, workers, clock64());
  return true;
}

#endif
