// All-reduce in one hop through slots in pinned host memory: every rank writes its message once and reads those of its
// peers.
//
// A message travels in lines of 16 bytes, 14 of data and a tag of 16 bits in the upper end. As in host_memory.cu data and
// flag come in one access, with no fence and no second hop, but one of 128 bits (host_memory_lines.cuh).
//
// A tile is what a warp carries at a time: UNITS units of 16 bytes a lane in LINES lines. How units become
// lines, and lines sums, says whoever includes this: UNITS, LINES, `pack` and `sum_tile`.
//
// Reading a message that is not there costs as much of the link as reading it. So a warp looks at one line of a tile,
// the last one written, until that has come, and only then reads the tile. The look is a hint; each line is checked.
//
// Tags come again. A line must not keep one for so long, also where messages are short: each call writes a row of 32
// lines anew that its message leaves alone, each time the next one (dense.py counts the calls).
//
// Region (dense.py, DenseLayout): a page of error words; then for each rank two slots of `slot_tiles` tiles, by the
// parity of the call; why two are enough is said in host_memory.py.

#define TILE_UNITS (UNITS * LANES)
#define NUM_TAGS 65535
#define ALL_LANES 0xffffffffu

// Never zero: untouched lines carry that.
__device__ __forceinline__ u32 tag_of(u32 epoch) { return epoch % NUM_TAGS + 1; }

__device__ __forceinline__ bool is_complete(uint4 line, u32 tag) { return line.w >> 16 == tag; }

struct Call {
  const uint4* in;
  uint4* out;
  State* state;
  u8* region;
  int units, slot_tiles, rank, lane;
  Watch watch;
  u32 epoch, tag;

  // A row is a line of every lane; a tile has LINES rows.
  __device__ uint4* line(int r, int row, int of_lane) const {
    const size_t slot = 2 * r + (epoch & 1);
    return (uint4*)(region + PAGE_BYTES) + (slot * slot_tiles * LINES + row) * LANES + of_lane;
  }

  __device__ bool has_units(int tile, int of_lane) const { return tile * TILE_UNITS + of_lane < units; }

  __device__ void load(int tile, uint4* own) const {
#pragma unroll
    for (int i = 0; i < UNITS; ++i) {
      const int at = tile * TILE_UNITS + i * LANES + lane;
      own[i] = at < units ? in[at] : make_uint4(0, 0, 0, 0);
    }
  }

  template <class Element>
  __device__ void send(int tile, const uint4* own) const {
    if (!has_units(tile, lane)) return;
    uint4 lines[LINES];
    pack<Element>(own, lines, tag);
#pragma unroll
    for (int i = 0; i < LINES; ++i) write_line(line(rank, tile * LINES + i, lane), lines[i]);
  }

  // What this call's message does not cover of one row.
  __device__ void renew() const {
    const int row = (int)((epoch >> 1) % (u32)(slot_tiles * LINES));
    if (!has_units(row / LINES, lane)) write_line(line(rank, row, lane), make_uint4(0, tag << 16, 0, tag << 16));
  }

  // Calls `attempt` until it finds nothing missing on any lane, a bit a rank; false on all: one did not answer in time.
  template <class Attempt>
  __device__ bool until_complete(Attempt attempt) {
    for (;;) {
      const u32 missing = attempt();
      if (!__any_sync(ALL_LANES, missing != 0)) return true;
      const bool lost = missing && watch.given_up(state, region + rank * ERROR_STRIDE, __ffs((int)missing) - 1);
      if (__any_sync(ALL_LANES, lost)) return false;
    }
  }

  // Lane r looks for the last line of rank r.
  __device__ bool wait(int tile) {
    const int last = min(LANES, units - tile * TILE_UNITS) - 1;
    u32 missing = lane < WORLD && lane != rank ? 1u << lane : 0;
    return until_complete([&] {
      if (missing && is_complete(read_line(line(lane, tile * LINES + LINES - 1, last)), tag)) missing = 0;
      return missing;
    });
  }

  __device__ bool read_peers(int tile, uint4 (*lines)[LINES]) {
    u32 missing = has_units(tile, lane) ? ((1u << WORLD) - 1) & ~(1u << rank) : 0;
    return until_complete([&] {
#pragma unroll
      for (int r = 0; r < WORLD; ++r)
        if (missing >> r & 1)
#pragma unroll
          for (int i = 0; i < LINES; ++i) lines[r][i] = read_line(line(r, tile * LINES + i, lane));
#pragma unroll
      for (int r = 0; r < WORLD; ++r) {
        bool complete = true;
#pragma unroll
        for (int i = 0; i < LINES; ++i) complete &= is_complete(lines[r][i], tag);
        if (complete) missing &= ~(1u << r);
      }
      return missing;
    });
  }

  template <class Element>
  __device__ bool receive(int tile) {
    // Asked for before the peers', which take longer.
    uint4 own[UNITS], lines[WORLD][LINES] = {};
    load(tile, own);
    if (!wait(tile) || !read_peers(tile, lines)) return false;
    sum_tile<Element>(own, lines, rank, [&](int i, uint4 unit) {
      const int at = tile * TILE_UNITS + i * LANES + lane;
      if (at < units) out[at] = unit;
    });
    return true;
  }

  // The next tile is sent before this one is received, so that the link is busy in both directions.
  template <class Element>
  __device__ void run() {
    const int tiles = (units + TILE_UNITS - 1) / TILE_UNITS, step = (int)(gridDim.x * (blockDim.x / LANES));
    // Neighbours in different blocks.
    const int first = (int)(threadIdx.x / LANES * gridDim.x + blockIdx.x);
    // Asked for before the epoch is known, so that the two waits overlap.
    uint4 own[UNITS];
    load(first, own);
    if (!begin(state, epoch)) return;
    tag = tag_of(epoch);
    send<Element>(first, own);
    if (first == step - 1) renew();
    for (int tile = first; tile < tiles; tile += step) {
      if (tile + step < tiles) {
        load(tile + step, own);
        send<Element>(tile + step, own);
      }
      if (!receive<Element>(tile)) return;
    }
  }
};

#define KERNEL(name, element)                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                    \
  name(const uint4* in, uint4* out, State* state, u8* region, int num_bytes, int slot_tiles, int rank,                 \
       int timeout_ms) {                                                                                               \
    wait_for_predecessors();                                                                                           \
    let_successor_start();                                                                                             \
    const int lane = threadIdx.x % LANES;                                                                              \
    Call call = {in, out, state, region, num_bytes / UNIT_BYTES, slot_tiles, rank, lane, watch_for(timeout_ms)};       \
    call.run<element>();                                                                                               \
  }
