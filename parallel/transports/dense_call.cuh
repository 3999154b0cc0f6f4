// All-reduce in one hop through slots in pinned host memory: every rank writes its message once and reads those of its
// peers.
//
// A message travels in lines of 16 bytes, 14 of data and a tag of 16 bits in the upper end. As in host_memory.cu data and
// flag come in one access, with no fence and no second hop, but one of 128 bits (host_memory_lines.cuh).
//
// A tile is what a warp carries at a time: UNITS units of 16 bytes a lane in LINES lines. How units become
// lines, and lines sums, says whoever includes this: UNITS, LINES, `pack` and `sum_tile`.
//
// What a card asks of the host waits on the link behind all that it wrote before, whichever warp wrote it. So few bytes
// are written ahead: a warp asks for a tile of its peers, writes its own next one while that comes, and only goes on when
// it has come. Reading a message that is not there costs as much of the link as reading it. But the peers' tile was
// written when the own one was, mostly in time; where it was not, the warp looks at one line of it, the last one written,
// until that has come, and then asks again. Each line is checked.
//
// Tags come again. A line must not keep one for so long, also where messages are short: each call writes a row of 32
// lines anew that its message leaves alone, each time the next one (dense.py counts the calls).
//
// Region (dense.py, DenseLayout): a page of error words; then for each rank two slots of `slot_tiles` tiles, by the
// parity of the call; why two are enough is said in host_memory.py.

#define TILE_UNITS (UNITS * LANES)
// Times that a tile is asked for before its last line is looked at: a look that finds it costs a round trip more.
#define HOPES 3
#define NUM_TAGS 65535
#define ALL_LANES 0xffffffffu
// The lines of three peers leave no registers for the own units beside them.
#define LATE_OWN (WORLD > 3)
#define PEERS(rank) (((1u << WORLD) - 1) & ~(1u << (rank)))

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
  __device__ void send(int tile, const uint4* own, uint4* packed) const {
    pack<Element>(own, packed, tag);
    if (!has_units(tile, lane)) return;
#pragma unroll
    for (int i = 0; i < LINES; ++i) write_line(line(rank, tile * LINES + i, lane), packed[i]);
  }

  // What this call's message does not cover of one row.
  __device__ void renew() const {
    const int row = (int)((epoch >> 1) % (u32)(slot_tiles * LINES));
    if (!has_units(row / LINES, lane)) write_line(line(rank, row, lane), make_uint4(0, tag << 16, 0, tag << 16));
  }

  // Lane r looks for the last line of rank r, until all have come; false on all: one did not answer in time.
  __device__ bool wait(int tile) {
    const int last = min(LANES, units - tile * TILE_UNITS) - 1;
    u32 missing = lane < WORLD && lane != rank ? 1u << lane : 0;
    for (;;) {
      if (missing && is_complete(read_line(line(lane, tile * LINES + LINES - 1, last)), tag)) missing = 0;
      if (!__any_sync(ALL_LANES, missing != 0)) return true;
      if (__any_sync(ALL_LANES, missing && given_up(missing))) return false;
    }
  }

  __device__ bool given_up(u32 missing) {
    return watch.given_up(state, region + rank * ERROR_STRIDE, __ffs((int)missing) - 1);
  }

  // The ranks, a bit each, whose lines of a tile this lane is to have.
  __device__ u32 wanted(int tile) const { return has_units(tile, lane) ? PEERS(rank) : 0; }

  // Nothing here waits for the lines to come.
  __device__ void ask(int tile, u32 missing, uint4 (*lines)[LINES]) const {
#pragma unroll
    for (int r = 0; r < WORLD; ++r)
      if (missing >> r & 1)
#pragma unroll
        for (int i = 0; i < LINES; ++i) lines[r][i] = read_line(line(r, tile * LINES + i, lane));
  }

  __device__ u32 still_missing(u32 missing, const uint4 (*lines)[LINES]) const {
#pragma unroll
    for (int r = 0; r < WORLD; ++r) {
      bool complete = true;
#pragma unroll
      for (int i = 0; i < LINES; ++i) complete &= is_complete(lines[r][i], tag);
      if (complete) missing &= ~(1u << r);
    }
    return missing;
  }

  // Until what was asked for has come, as asked for again; false on all lanes: a rank did not answer in time.
  __device__ bool settle(int tile, u32 missing, uint4 (*lines)[LINES]) {
    for (int times_asked = 1;; ++times_asked) {
      missing = still_missing(missing, lines);
      if (!__any_sync(ALL_LANES, missing != 0)) return true;
      if (__any_sync(ALL_LANES, missing && given_up(missing))) return false;
      if (times_asked >= HOPES && !wait(tile)) return false;
      ask(tile, missing, lines);
    }
  }

  template <class Element>
  __device__ void finish(int tile, const uint4* own, const uint4* packed, const uint4 (*lines)[LINES]) const {
    sum_tile<Element>(own, packed, lines, rank, [&](int i, uint4 unit) {
      const int at = tile * TILE_UNITS + i * LANES + lane;
      if (at < units) out[at] = unit;
    });
  }

  template <class Element>
  __device__ void run() {
    const int tiles = (units + TILE_UNITS - 1) / TILE_UNITS, step = (int)(gridDim.x * (blockDim.x / LANES));
    // Neighbours in different blocks.
    const int first = (int)(threadIdx.x / LANES * gridDim.x + blockIdx.x);
    // Asked for before the epoch is known, so that the two waits overlap.
    uint4 own[UNITS], next[UNITS], packed[LINES], next_packed[LINES];
    load(first, own);
    load(first + step, next);
    if (!begin(state, epoch)) return;
    tag = tag_of(epoch);
    send<Element>(first, own, packed);
    if (first == step - 1) renew();
    for (int tile = first; tile < tiles; tile += step) {
      uint4 lines[WORLD][LINES] = {};
      ask(tile, wanted(tile), lines);
      // What it takes is here: were it still to come from memory, it would be waited for together with the lines.
      if (tile + step < tiles) send<Element>(tile + step, next, next_packed);
      load(tile + 2 * step, next);
      if (!LATE_OWN) load(tile, own);
      if (!settle(tile, wanted(tile), lines)) return;
      if (LATE_OWN) load(tile, own);
      finish<Element>(tile, own, packed, lines);
#pragma unroll
      for (int i = 0; i < LINES; ++i) packed[i] = next_packed[i];
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
