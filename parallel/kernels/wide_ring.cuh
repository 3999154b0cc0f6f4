// What wide_wgmma.cu multiplies, in shared memory: two rings, which one thread fills with bulk copies. The first has
// TOKEN_STAGES times 64 inputs of a tile's tokens, the second WEIGHT_STAGES times the weights of 128 inputs of all its row
// tiles, then their scales. Weights are taken out, and given free, a unit before the tokens that go with them.

#include "bulk_copies.cuh"

// 64 inputs of all tokens. Boxes begin at multiples of 128, swapped ones of 1024.
#define HALF_BYTES (TOKENS * 128)
// Of a row tile: 40 bytes are copied as 48, since copies begin at multiples of 16. What all inputs share comes each time.
#define SCALE_BYTES ((PARTS ? PARTS : 1) * GROUP_BYTES)
#define SCALE_STEP ((SCALE_BYTES + 15) / 16 * 16)
#define SCALES_AT (ROW_TILES * WEIGHT_BYTES)
#define UNIT_COPIED (SCALES_AT + ROW_TILES * SCALE_STEP)
#define WEIGHT_STAGE_BYTES ((UNIT_COPIED + 127) / 128 * 128)
#define WEIGHTS_AT (TOKEN_STAGES * HALF_BYTES)
#define BARRIERS_AT (WEIGHTS_AT + WEIGHT_STAGES * WEIGHT_STAGE_BYTES)
// Boxes of weights and of scales are in pieces of 8 bytes.
#define PIECE 8

// A place in a ring; `parity` of the phase in which its stage is filled.
template <int stages>
struct Slot {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void step() {
    if (++index == stages) {
      index = 0;
      parity ^= 1;
    }
  }
};
typedef Slot<TOKEN_STAGES> TokenSlot;
typedef Slot<WEIGHT_STAGES> WeightSlot;

struct Ring {
  const unsigned char* memory;

  __device__ __forceinline__ u32 tokens(const TokenSlot& slot) const {
    return shared_address(memory) + slot.index * HALF_BYTES;
  }
  __device__ __forceinline__ const unsigned char* weights(const WeightSlot& slot) const {
    return memory + WEIGHTS_AT + slot.index * WEIGHT_STAGE_BYTES;
  }
  __device__ __forceinline__ u32 full(const TokenSlot& slot) const { return barrier(slot.index); }
  __device__ __forceinline__ u32 full(const WeightSlot& slot) const { return barrier(TOKEN_STAGES + slot.index); }
  template <class AnySlot>
  __device__ __forceinline__ u32 empty(const AnySlot& slot) const { return full(slot) + 8; }

  // By one thread; each of `readers` says that it has done with a stage.
  __device__ __forceinline__ void open(int readers) const {
    for (int i = 0; i < TOKEN_STAGES + WEIGHT_STAGES; i++) {
      open_barrier(barrier(i), 1);
      open_barrier(barrier(i) + 8, readers);
    }
    show_barriers();
  }

 private:
  __device__ __forceinline__ u32 barrier(int stage) const { return shared_address(memory) + BARRIERS_AT + stage * 16; }
};

// What is copied: X [rows, inputs], and by row tile all weights and all scales.
struct Maps {
  const TensorMap *tokens, *weights, *scales;
};

// The thread that fills both rings.
struct Filler {
  Ring ring;
  Maps maps;
  TokenSlot token_slot;
  WeightSlot weight_slot;

  // 128 inputs of a tile.
  __device__ __forceinline__ void fill(const Place& place, int unit) {
    const u32 full = ring.full(weight_slot), stage = shared_address(ring.weights(weight_slot));
    await_phase(ring.empty(weight_slot), weight_slot.parity ^ 1);
    arrive_and_announce(full, UNIT_COPIED);
    copy_box(stage, maps.weights, unit * (WEIGHT_BYTES / PIECE), place.tile, full);
    copy_box(stage + SCALES_AT, maps.scales, PARTS ? unit * SCALE_BYTES / 16 * 16 / PIECE : 0, place.tile, full);
    weight_slot.step();
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      await_phase(ring.empty(token_slot), token_slot.parity ^ 1);
      arrive_and_announce(ring.full(token_slot), HALF_BYTES);
      copy_box(ring.tokens(token_slot), maps.tokens, unit * 128 + half * 64, place.token, ring.full(token_slot));
      token_slot.step();
    }
  }
};
