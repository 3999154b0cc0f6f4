// Weights packed for the host's int4 operator (host_int4.py) as bf16 [K, N], for products on the card.
//
// A block of threads takes a group of inputs of BLOCK outputs. For each input these are BLOCK / 2 bytes, of which the low
// halves are the first outputs and the high halves the others: a thread takes 8 bytes, 8 outputs of either half.
//
// Defined by the host: BLOCK (64 or 32).

#include "device.cuh"

#define THREADS 256
#define PIECES (BLOCK / 16)
#define INPUTS (THREADS / PIECES)

// Outputs of a thread in one of the halves: low or high bits of 8 bytes, each times its scale and with its shift.
__device__ __forceinline__ uint4 decode(const u32* words, const u32* scales, int shift) {
  u32 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 two = words[i >> 1] >> (16 * (i & 1) + shift);
    const int first = (int)(two & 15) - 8, second = (int)(two >> 8 & 15) - 8;
    // The products are exact, so that only the sum is rounded, and then to bf16.
    pairs[i] = to_pair(first * low(scales[2 * i]) + high(scales[2 * i]),
                       second * low(scales[2 * i + 1]) + high(scales[2 * i + 1]));
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// `scales`: pairs of scale and shift, of the first output that is taken; `all` outputs have them for each group.
extern "C" __global__ void __launch_bounds__(THREADS)
dequantize_host(const u32* __restrict__ packed, const u32* __restrict__ scales, uint4* __restrict__ out, int num_in,
                int num_out, int all, int group_size) {
  const int block = blockIdx.x, group = blockIdx.y;
  const int piece = threadIdx.x % PIECES, place = threadIdx.x / PIECES;
  const int output = block * BLOCK + piece * 8;
  u32 own[2][8];
#pragma unroll
  for (int half = 0; half < 2; half++)
#pragma unroll
    for (int i = 0; i < 8; i++) own[half][i] = scales[(size_t)group * all + output + half * (BLOCK / 2) + i];
  for (int i = place; i < group_size; i += INPUTS) {
    const int input = group * group_size + i;
    const u32* from = packed + (((size_t)block * num_in + input) * PIECES + piece) * 2;
    const u32 words[2] = {from[0], from[1]};
    uint4* to = out + ((size_t)input * num_out + output) / 8;
    to[0] = decode(words, own[0], 0);
    to[BLOCK / 16] = decode(words, own[1], 4);
  }
}
