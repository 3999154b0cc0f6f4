// All-reduce of large messages through pinned host memory: every rank sums one part of the message, then all read the
// sums. A byte crosses each card's link twice in each direction at most, and writing overlaps with reading.
//
// A message of 16-byte units is cut into WORLD parts of `part` units (the last ones may be short or empty), each part
// into chunks of CHUNK units. A block takes chunk c of every part, in three steps:
//   send     writes the peers' parts of its message into its slot, then raises flag (0, rank, c)
//   sum      waits for the peers' flags (0, *, c), adds up its own part in rank order, writes the sum to the output and
//            to its slot of sums, raises flag (1, rank, c)
//   collect  waits for flag (1, p, c) of each peer p and reads the sums of part p
// The send of a block's next chunk comes before the sum of this one, the collect after it, so that the link is busy in
// both directions. A flag is raised by carrying the epoch of the call; two slots by its parity are enough for the reason
// given in host_memory.py: a call ends only when it has read every peer's flags.
//
// Region (two_step.py, TwoStepLayout): a page of error words; the flags, [2][WORLD][MAX_CHUNKS] in room for MAX_RANKS;
// for each rank two slots of `slot_units` units, then two slots of sums of half as many.

#include "host_memory_common.cuh"

#define THREADS 512
#define UNITS_PER_THREAD 4
#define CHUNK (THREADS * UNITS_PER_THREAD)
#define MAX_CHUNKS 256
#define MAX_RANKS 4
#define UNIT_BYTES 16
#define FLAG_BYTES 4

// Host memory that peers write and read: never from a cache that does not see them.
__device__ __forceinline__ uint4 read_unit(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void write_unit(uint4* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

struct Call {
  const uint4* in;
  uint4* out;
  State* state;
  u8* region;
  int units, part, slot_units, rank;
  u32 epoch;
  Watch watch;

  __device__ u8* flag(int kind, int r, int chunk) const {
    return region + PAGE_BYTES + (((size_t)kind * WORLD + r) * MAX_CHUNKS + chunk) * FLAG_BYTES;
  }
  __device__ uint4* area(int r) const {
    return (uint4*)(region + PAGE_BYTES + 2 * MAX_RANKS * MAX_CHUNKS * FLAG_BYTES) + (size_t)r * 3 * slot_units;
  }
  __device__ uint4* slot(int r) const { return area(r) + (size_t)(epoch & 1) * slot_units; }
  __device__ uint4* sums(int r) const { return area(r) + 2 * (size_t)slot_units + (epoch & 1) * (slot_units / 2); }

  // Whether this thread has a unit `i` of chunk `chunk` in part `r`, and which one, counted in the message.
  __device__ bool unit(int r, int chunk, int i, int& in_part, int& in_message) const {
    in_part = chunk * CHUNK + i * THREADS + threadIdx.x;
    in_message = r * part + in_part;
    return in_part < part && in_message < units;
  }

  // After all threads' writes: the barrier orders them before the release.
  __device__ void raise(int kind, int chunk) const {
    __syncthreads();
    if (threadIdx.x == 0)
      asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag(kind, rank, chunk)), "r"(epoch) : "memory");
  }

  // Thread r waits for rank r; false on all threads: one of them did not answer in time.
  __device__ bool wait(int kind, int chunk) {
    const int r = threadIdx.x;
    bool given_up = false;
    if (r < WORLD && r != rank) {
      const u8* where = flag(kind, r, chunk);
      u32 seen;
      for (;;) {
        asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(where) : "memory");
        if (seen == epoch) break;
        given_up = watch.given_up(state, region + rank * ERROR_STRIDE, r);
        if (given_up) break;
      }
    }
    return !__syncthreads_or(given_up);
  }

  __device__ void send(int chunk) const {
#pragma unroll
    for (int d = 1; d < WORLD; ++d) {
      const int r = (rank + d) % WORLD;
      uint4 values[UNITS_PER_THREAD];
      int in_part, at;
#pragma unroll
      for (int i = 0; i < UNITS_PER_THREAD; ++i)
        if (unit(r, chunk, i, in_part, at)) values[i] = in[at];
#pragma unroll
      for (int i = 0; i < UNITS_PER_THREAD; ++i)
        if (unit(r, chunk, i, in_part, at)) write_unit(slot(rank) + at, values[i]);
    }
    raise(0, chunk);
  }

  template <class Element>
  __device__ bool sum(int chunk) {
    if (!wait(0, chunk)) return false;
    uint4 values[UNITS_PER_THREAD][WORLD];
    int in_part, at;
#pragma unroll
    for (int i = 0; i < UNITS_PER_THREAD; ++i)
      if (unit(rank, chunk, i, in_part, at))
#pragma unroll
        for (int r = 0; r < WORLD; ++r) values[i][r] = r == rank ? in[at] : read_unit(slot(r) + at);
#pragma unroll
    for (int i = 0; i < UNITS_PER_THREAD; ++i)
      if (unit(rank, chunk, i, in_part, at)) {
        u32 words[4][WORLD];
#pragma unroll
        for (int r = 0; r < WORLD; ++r) {
          words[0][r] = values[i][r].x, words[1][r] = values[i][r].y;
          words[2][r] = values[i][r].z, words[3][r] = values[i][r].w;
        }
        const uint4 total = make_uint4(Sum<Element>::of(words[0]), Sum<Element>::of(words[1]),
                                       Sum<Element>::of(words[2]), Sum<Element>::of(words[3]));
        out[at] = total;
        write_unit(sums(rank) + in_part, total);
      }
    raise(1, chunk);
    return true;
  }

  __device__ bool collect(int chunk) {
    if (!wait(1, chunk)) return false;
#pragma unroll
    for (int d = 1; d < WORLD; ++d) {
      const int r = (rank + d) % WORLD;
      uint4 values[UNITS_PER_THREAD];
      int in_part, at;
#pragma unroll
      for (int i = 0; i < UNITS_PER_THREAD; ++i)
        if (unit(r, chunk, i, in_part, at)) values[i] = read_unit(sums(r) + in_part);
#pragma unroll
      for (int i = 0; i < UNITS_PER_THREAD; ++i)
        if (unit(r, chunk, i, in_part, at)) out[at] = values[i];
    }
    return true;
  }

  template <class Element>
  __device__ void run() {
    const int chunks = (part + CHUNK - 1) / CHUNK, step = gridDim.x;
    if ((int)blockIdx.x < chunks) send(blockIdx.x);
    for (int c = blockIdx.x; c < chunks; c += step) {
      if (c + step < chunks) send(c + step);
      if (!sum<Element>(c)) return;
      if (c >= step && !collect(c - step)) return;
      if (c + step >= chunks && !collect(c)) return;
    }
  }
};

#define KERNEL(name, element)                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                                \
  name(const uint4* in, uint4* out, State* state, u8* region, int num_bytes, int slot_units, int rank,                 \
       int timeout_ms) {                                                                                               \
    wait_for_predecessors();                                                                                           \
    let_successor_start();                                                                                             \
    u32 epoch;                                                                                                         \
    if (!begin(state, epoch)) return;                                                                                  \
    const int units = num_bytes / UNIT_BYTES;                                                                          \
    Call call = {in, out, state, region, units, (units + WORLD - 1) / WORLD, slot_units, rank, epoch,                  \
                 watch_for(timeout_ms)};                                                                               \
    call.run<element>();                                                                                               \
  }

KERNEL(reduce_bfloat16, BFloat16)
KERNEL(reduce_float16, Float16)
KERNEL(reduce_float32, float)
