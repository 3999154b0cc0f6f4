// The ring of wide_wgmma.cu: STAGES units of 128 inputs in shared memory, filled by one thread with bulk copies. A stage has
// the tokens' first 64 inputs, their second, the weights of all row tiles, then their scales; of gates and ups, first those
// of all gates.

#include "bulk_copies.cuh"

// 64 inputs of all tokens.
#define HALF_BYTES (TOKENS * 128)
#define WEIGHTS_AT (2 * HALF_BYTES)
#define SCALES_AT (WEIGHTS_AT + ROW_TILES * WEIGHT_BYTES)
// Of a row tile: 40 bytes are copied as 48, since copies begin at multiples of 16.
#define SCALE_BYTES (PARTS * GROUP_BYTES)
#define SCALE_STEP ((SCALE_BYTES + 15) / 16 * 16)
// Of all row tiles, of the ups behind the gates: boxes begin at multiples of 128.
#define SCALES_BYTES ((ROW_TILES >> SWIGLU) * SCALE_STEP)
#define SCALES_ROOM ((SCALES_BYTES + 127) / 128 * 128)
#define COPIED_BYTES (SCALES_AT + (1 + SWIGLU) * SCALES_BYTES)
#define STAGE_BYTES ((SCALES_AT + (1 + SWIGLU) * SCALES_ROOM + 1023) / 1024 * 1024)
// Boxes of weights and of scales are in pieces of 8 bytes.
#define PIECE 8

struct Barriers {
  u32 address;
  __device__ __forceinline__ u32 full(int slot) const { return address + slot * 16; }
  __device__ __forceinline__ u32 empty(int slot) const { return address + slot * 16 + 8; }
};

// A place in the ring; `parity` of the phase in which its stage is filled.
struct Slot {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void step() {
    if (++index == STAGES) {
      index = 0;
      parity ^= 1;
    }
  }
};

// What is copied: X [rows, inputs], and by row tile all weights and all scales.
struct Maps {
  const TensorMap *tokens, *weights, *scales;
};

// Fills the ring, a unit at a time, over the end of a tile too. One thread's work.
struct Filler {
  Maps maps;
  u32 ring;
  Barriers barriers;
  int left, num_tiles, units, num_rows;
  // Of the next unit.
  int unit;
  Place place;
  Slot slot;

  __device__ __forceinline__ void fill() {
    if (left == 0) return;
    const u32 stage = ring + slot.index * STAGE_BYTES, full = barriers.full(slot.index);
    await_phase(barriers.empty(slot.index), slot.parity ^ 1);
    arrive_and_announce(full, COPIED_BYTES);
    copy_box(stage, maps.tokens, unit * 128, place.token, full);
    copy_box(stage + HALF_BYTES, maps.tokens, unit * 128 + 64, place.token, full);
#pragma unroll
    for (int i = 0; i < 1 + SWIGLU; i++) {
      // Of gates and ups, the first tile of each.
      const int tile = (place.tile >> SWIGLU) + i * (num_tiles >> 1), share = ROW_TILES >> SWIGLU;
      copy_box(stage + WEIGHTS_AT + i * share * WEIGHT_BYTES, maps.weights, unit * (WEIGHT_BYTES / PIECE), tile, full);
      if (PARTS)
        copy_box(stage + SCALES_AT + i * SCALES_ROOM, maps.scales, unit * SCALE_BYTES / 16 * 16 / PIECE, tile, full);
    }
    left--;
    slot.step();
    if (++unit == units) {
      unit = 0;
      place.step(num_rows);
    }
  }
};
