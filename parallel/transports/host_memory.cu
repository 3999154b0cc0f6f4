// All-reduce and all-gather of small messages through slots in pinned host memory that every rank's card reads.
//
// One kernel writes this rank's message into its slot and polls the slots of its peers. A message travels in lines of
// 16 bytes, two words of 8: four bytes of data with the epoch (the number of the call) beside them. The data is its own
// flag, so that neither a fence nor a second round trip is needed. PTX takes a vector access for as many accesses of
// its elements, in any order, and an aligned access of 8 bytes for a single one: a word whose epoch is right has its
// data, whichever of the two words comes first.
//
// Region (host_memory.py, Layout): a page with an error word a rank, 64 bytes apart; then for each rank two slots of
// `slot_lines` lines. The slot of a call is its epoch's parity; why two are enough is said in host_memory.py.

#include "host_memory_common.cuh"

#define LINE_BYTES 16
#define DATA_BYTES 8

__device__ __forceinline__ void write_line(u8* line, uint2 data, u32 epoch) {
  const u64 flag = (u64)epoch << 32;
  asm volatile("st.relaxed.sys.global.v2.b64 [%0], {%1, %2};" ::"l"(line), "l"(flag | data.x), "l"(flag | data.y)
               : "memory");
}

struct Words {
  u64 first, second;
  __device__ bool complete(u32 epoch) const { return (u32)(first >> 32) == epoch && (u32)(second >> 32) == epoch; }
  __device__ uint2 data() const { return make_uint2((u32)first, (u32)second); }
};

__device__ __forceinline__ Words read_line(const u8* line) {
  Words words;
  asm volatile("ld.relaxed.sys.global.v2.b64 {%0, %1}, [%2];" : "=l"(words.first), "=l"(words.second) : "l"(line)
               : "memory");
  return words;
}

// Eight bytes of `data` from 8 * line on; those beyond its end are zero. `data` is aligned to 8.
__device__ __forceinline__ uint2 load_message(const u8* data, int line, int num_bytes) {
  const int start = line * DATA_BYTES;
  if (start + DATA_BYTES <= num_bytes) return *(const uint2*)(data + start);
  uint2 result = make_uint2(0, 0);
  for (int i = start; i < num_bytes; ++i) {
    u32& word = i - start < 4 ? result.x : result.y;
    word |= (u32)data[i] << (8 * (i & 3));
  }
  return result;
}

__device__ __forceinline__ void store_message(u8* data, int line, int num_bytes, bool aligned, uint2 value) {
  const int start = line * DATA_BYTES;
  if (aligned && start + DATA_BYTES <= num_bytes) {
    *(uint2*)(data + start) = value;
    return;
  }
  for (int i = 0; i < DATA_BYTES && start + i < num_bytes; ++i)
    data[start + i] = (u8)((i < 4 ? value.x : value.y) >> (8 * (i & 3)));
}

// What is done with line `line` of every rank.
template <class Element>
struct Reduce {
  static __device__ void apply(const uint2* values, u8* out, int line, int num_bytes) {
    u32 first[WORLD], second[WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; ++r) first[r] = values[r].x, second[r] = values[r].y;
    store_message(out, line, num_bytes, true, make_uint2(Sum<Element>::of(first), Sum<Element>::of(second)));
  }
};

struct Gather {
  static __device__ void apply(const uint2* values, u8* out, int line, int num_bytes) {
#pragma unroll
    for (int r = 0; r < WORLD; ++r)
      store_message(out + (size_t)r * num_bytes, line, num_bytes, num_bytes % DATA_BYTES == 0, values[r]);
  }
};

// Reads one line of every peer into `values`; false: one of them did not answer in time.
__device__ __forceinline__ bool read_peers(uint2* values, const u8* line, size_t stride, int rank, u32 epoch,
                                           Watch& watch, State* state, u8* error) {
  u32 missing = ((1u << WORLD) - 1) & ~(1u << rank);
  for (;;) {
    Words words[WORLD];
#pragma unroll
    for (int r = 0; r < WORLD; ++r)
      if (missing >> r & 1) words[r] = read_line(line + r * stride);
#pragma unroll
    for (int r = 0; r < WORLD; ++r)
      if ((missing >> r & 1) && words[r].complete(epoch)) values[r] = words[r].data(), missing &= ~(1u << r);
    if (missing == 0) return true;
    if (watch.given_up(state, error, __ffs((int)missing) - 1)) return false;
  }
}

template <class Step>
__device__ __forceinline__ void exchange(const u8* in, u8* out, State* state, u8* region, int num_bytes, int slot_lines,
                                         int rank, int timeout_ms) {
  const int start = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const int num_lines = (num_bytes + DATA_BYTES - 1) / DATA_BYTES;
  // Asked for before the epoch is known, so that the two waits overlap.
  uint2 own = start < num_lines ? load_message(in, start, num_bytes) : make_uint2(0, 0);
  u32 epoch;
  if (!begin(state, epoch)) return;
  const size_t slot_bytes = (size_t)slot_lines * LINE_BYTES, stride = 2 * slot_bytes;
  u8* slots = region + PAGE_BYTES + (epoch & 1) * slot_bytes;

  for (int k = start; k < num_lines; k += step)
    write_line(slots + rank * stride + (size_t)k * LINE_BYTES, k == start ? own : load_message(in, k, num_bytes), epoch);

  Watch watch = watch_for(timeout_ms);
  for (int k = start; k < num_lines; k += step) {
    if (k != start) own = load_message(in, k, num_bytes);
    uint2 values[WORLD];
    if (!read_peers(values, slots + (size_t)k * LINE_BYTES, stride, rank, epoch, watch, state,
                    region + rank * ERROR_STRIDE))
      return;
#pragma unroll
    for (int r = 0; r < WORLD; ++r)
      if (r == rank) values[r] = own;
    Step::apply(values, out, k, num_bytes);
  }
}

#define KERNEL(name, step)                                                                                             \
  extern "C" __global__ void __launch_bounds__(512)                                                                    \
  name(const u8* in, u8* out, State* state, u8* region, int num_bytes, int slot_lines, int rank, int timeout_ms) {     \
    wait_for_predecessors();                                                                                           \
    let_successor_start();                                                                                             \
    exchange<step>(in, out, state, region, num_bytes, slot_lines, rank, timeout_ms);                                   \
  }

KERNEL(reduce_bfloat16, Reduce<BFloat16>)
KERNEL(reduce_float16, Reduce<Float16>)
KERNEL(reduce_float32, Reduce<float>)
KERNEL(gather_bytes, Gather)
