// All-reduce of the rows of a decode step through slots in pinned host memory, and what follows it, in one kernel:
// residual += sum over the ranks, out = norm of residual. The sum is in registers when the norm begins.
//
// Its numbers are those of the two kernels it stands for, bit for bit: sums as in host_memory.cu, the norm as in
// ../kernels/fused_norm.cu, whose threads hold the same two pieces of 16 bytes of a row. The threads of a row are those
// of `row_blocks` blocks. These exchange the sums of their warps through `sums`, [rows, MAX_WARPS] on the card: a word
// is a float32 with the epoch above it. They wait for one another, so all of a row's must be on the card at once; that
// they are neighbours in the grid sees to it.
//
// A thread's two pieces travel in three lines of 16 bytes, each with 12 bytes of data and the epoch above them
// (host_memory_lines.cuh). Neighbouring threads have neighbouring lines.
//
// Region (host_memory_norm.py, NormLayout): a page of error words; then for each rank two slots of `slot_lines` lines,
// by the parity of the call; why two are enough is said in host_memory.py.

#include "host_memory_common.cuh"
#include "host_memory_lines.cuh"

__device__ __forceinline__ float low(u32 pair) { return BFloat16::low(pair); }
__device__ __forceinline__ float high(u32 pair) { return BFloat16::high(pair); }
__device__ __forceinline__ u32 to_pair(float low, float high) { return BFloat16::pair(low, high); }

#include "../kernels/norm.cuh"

#define LANES 32
#define VECTORS 2
#define LINES 3
#define ALL_LANES 0xffffffffu
#define ALL_LINES ((1u << LINES) - 1)
// From so many rows on a warp first waits for one line of each peer: reading a message that is not there costs as much
// of the link as reading it.
#define LOOK_ROWS 5
#define POLLS_PER_CHECK 32

__device__ __forceinline__ u32 word(uint4 a, int i) { return i == 0 ? a.x : i == 1 ? a.y : i == 2 ? a.z : a.w; }

struct Call {
  State* state;
  u64* sums;
  u8* region;
  int pieces, slot_lines, row_blocks, rank;
  Watch watch;
  u32 epoch;

  __device__ int lane() const { return threadIdx.x % LANES; }
  __device__ int row() const { return blockIdx.x / row_blocks; }
  __device__ int row_threads() const { return row_blocks * blockDim.x; }
  // Among those of the row.
  __device__ int thread() const { return blockIdx.x % row_blocks * blockDim.x + threadIdx.x; }
  __device__ bool has_data() const { return thread() < pieces; }
  __device__ bool has_piece(int i) const { return thread() + i * row_threads() < pieces; }
  __device__ size_t piece(int i) const { return (size_t)row() * pieces + thread() + i * row_threads(); }
  __device__ u8* error() const { return region + rank * ERROR_STRIDE; }

  __device__ uint4* line(int r, int i, int of_thread) const {
    const size_t slot = 2 * r + (epoch & 1);
    return (uint4*)(region + PAGE_BYTES) + slot * slot_lines + (row() * LINES + i) * row_threads() + of_thread;
  }

  __device__ void load(const uint4* rows, uint4* values) const {
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) values[i] = has_piece(i) ? rows[piece(i)] : make_uint4(0, 0, 0, 0);
  }

  __device__ void send(const uint4* own) const {
    if (!has_data()) return;
    write_line(line(rank, 0, thread()), make_uint4(own[0].x, own[0].y, own[0].z, epoch));
    write_line(line(rank, 1, thread()), make_uint4(own[0].w, own[1].x, own[1].y, epoch));
    write_line(line(rank, 2, thread()), make_uint4(own[1].z, own[1].w, 0, epoch));
  }

  // Lane r looks for the last line of rank r that a warp reads; false on all: one did not answer in time.
  __device__ bool wait() {
    const int first = thread() - lane(), last = min(first + LANES, pieces) - 1;
    bool missing = lane() < WORLD && lane() != rank && first < pieces;
    for (;;) {
      if (missing && read_line(line(lane(), LINES - 1, last)).w == epoch) missing = false;
      if (!__any_sync(ALL_LANES, missing)) return true;
      const bool lost = missing && watch.given_up(state, error(), lane());
      if (__any_sync(ALL_LANES, lost)) return false;
    }
  }

  // The lines of every peer; false: one did not answer in time.
  __device__ bool read_peers(uint4* lines) {
    u32 missing = has_data() ? ((1u << (LINES * WORLD)) - 1) & ~(ALL_LINES << (LINES * rank)) : 0;
    while (missing) {
#pragma unroll
      for (int i = 0; i < WORLD * LINES; ++i)
        if (missing >> i & 1) lines[i] = read_line(line(i / LINES, i % LINES, thread()));
#pragma unroll
      for (int i = 0; i < WORLD * LINES; ++i)
        if (lines[i].w == epoch) missing &= ~(1u << i);
      if (missing && watch.given_up(state, error(), (__ffs((int)missing) - 1) / LINES)) return false;
    }
    return true;
  }

  // The sum over all ranks, where `lines` are the peers'.
  __device__ void reduce(const uint4* own, const uint4* lines, uint4* sum) const {
    u32 total[VECTORS * 4];
#pragma unroll
    for (int k = 0; k < VECTORS * 4; ++k) {
      u32 values[WORLD];
#pragma unroll
      for (int r = 0; r < WORLD; ++r) {
        const uint4 line = lines[r * LINES + k / 3];
        const u32 theirs = k % 3 == 0 ? line.x : k % 3 == 1 ? line.y : line.z;
        values[r] = r == rank ? word(own[k / 4], k % 4) : theirs;
      }
      total[k] = Sum<BFloat16>::of(values);
    }
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
      sum[i] = make_uint4(total[4 * i], total[4 * i + 1], total[4 * i + 2], total[4 * i + 3]);
  }

  // The sum over the row in every thread, in the order of fused_norm.cu; false on all of a block or a warp: one is lost.
  __device__ bool sum_row(float& value, bool lost) const {
    value = sum_warp(value);
    const bool complete = row_blocks == 1 ? meet_in_block(value, lost) : meet_in_row(value, lost);
    if (complete) value = sum_warp(value);
    return complete;
  }

  // Lane k gets the sum of the row's warp k.
  __device__ bool meet_in_block(float& value, bool lost) const {
    __shared__ float shared_sums[MAX_WARPS];
    if (lane() == 0) shared_sums[threadIdx.x / LANES] = value;
    if (__syncthreads_or(lost)) return false;
    value = lane() < blockDim.x / LANES ? shared_sums[lane()] : 0;
    return true;
  }

  __device__ bool meet_in_row(float& value, bool lost) const {
    if (__any_sync(ALL_LANES, lost)) return false;
    volatile u64* const words = sums + row() * MAX_WARPS;
    if (lane() == 0) words[thread() / LANES] = (u64)epoch << 32 | __float_as_uint(value);
    u64 word = (u64)epoch << 32;
    if (lane() < row_threads() / LANES) lost = !await_word(words + lane(), word);
    value = __uint_as_float((u32)word);
    return !__any_sync(ALL_LANES, lost);
  }

  // Without a limit of its own: a block that does not come has given up a peer, and says so.
  __device__ bool await_word(volatile u64* at, u64& word) const {
    for (u32 polls = 1; (u32)((word = *at) >> 32) != epoch; ++polls)
      if (polls % POLLS_PER_CHECK == 0 && *(volatile u32*)&state->failed) return false;
    return true;
  }

  __device__ void run(const uint4* in, uint4* residual, const uint4* weight, uint4* out, float eps) {
    uint4 own[VECTORS], x[VECTORS], w[VECTORS], update[VECTORS];
    // Asked for before the epoch is known, so that the waits overlap.
    load(in, own);
    if (!begin(state, epoch)) return;
    send(own);
    // On their way while the peers' lines are.
    load(residual, x);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
      w[i] = has_piece(i) ? load_fresh(weight + thread() + i * row_threads()) : make_uint4(0, 0, 0, 0);

    uint4 lines[WORLD * LINES] = {};
    const bool lost = (gridDim.x >= LOOK_ROWS * row_blocks && !wait()) || !read_peers(lines);
    reduce(own, lines, update);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
      x[i] = add(update[i], x[i]);
      if (has_piece(i) && !lost) residual[piece(i)] = x[i];
      sum += has_piece(i) ? squares(x[i]) : 0;
    }
    if (!sum_row(sum, lost)) return;
    const float factor = norm_factor(sum, pieces, eps);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i)
      if (has_piece(i)) out[piece(i)] = scale(x[i], factor, w[i]);
  }
};

// pieces: of 16 bytes in a row; its threads are half as many, rounded up to whole warps.
extern "C" __global__ void __launch_bounds__(512)
reduce_bfloat16_and_norm(const uint4* in, uint4* residual, const uint4* weight, uint4* out, State* state, u64* sums,
                         u8* region, int pieces, int slot_lines, int row_blocks, int rank, int timeout_ms, float eps) {
  wait_for_predecessors();
  let_successor_start();
  Call call = {state, sums, region, pieces, slot_lines, row_blocks, rank, watch_for(timeout_ms)};
  call.run(in, residual, weight, out, eps);
}
