// Attention of one new token a sequence over its paged keys and values; softmax in float32, grouped-query heads.
//
// Block (KV head, split, sequence) takes all query heads of a KV head, so that keys and values are read once. Keys, then
// values, are the 16-row side of mma.m16n8k16 and 8 query heads are its columns: a second token of a sequence would be
// more columns (NT) with a bound of its own. A warp works on 16 tokens at a time, warps in turn, each with a running
// maximum and sum; they meet at the end of the split. The last block of a sequence and KV head to finish adds up the
// splits, always in the same order. How many splits there are is the host's choice; how long they are follows from the
// sequence's length, read here, so that a captured graph stays right as sequences grow.
//
// Defined by the host: HEAD_DIM (64, 128), PAGE_SIZE (a multiple of 16), NT (tiles of 8 query heads), WARPS, DEPTH (units
// of a warp's ring), MAX_SPLITS, MAX_COUNTERS, QUERY_F16 (0: bf16), KV_FP8 (0: as the query; 1: e4m3, multiplied in fp16,
// which holds every e4m3 number).
//
// Layouts:
//   keys, values  [pages][KV heads][PAGE_SIZE][HEAD_DIM]
//   query, out    [sequences][KV heads * group][HEAD_DIM]; query and block_table with a stride between sequences
//   partial       [sequences][KV heads][splits][group][HEAD_DIM] float32; maxima_sums likewise, pairs without HEAD_DIM
//
// A lane copies into shared memory just what it reads itself, so that a warp's ring needs no barrier. Which token and
// which dimension is which row or step of an mma is free as long as both sides agree: lane (g, c) reads 16 bytes of keys
// g and g + 8 at a time, for two steps of the product with the query (four of e4m3), and for the other product all its
// dimensions of tokens 2c, 2c + 1, 2c + 8, 2c + 9, which byte permutations pair up.

#include "attention.cuh"

#define TILE 16
#define COLUMNS (8 * NT)
#define ELEMENT_BYTES (KV_FP8 ? 1 : 2)
#define ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define UNIT_BYTES (TILE * ROW_BYTES)
// What a lane reads at once of a row of values, and how often.
#define PIECE_BYTES (ROW_BYTES >= 128 ? 16 : 8)
#define PIECES (ROW_BYTES / (8 * PIECE_BYTES))
#define PIECE_DIMS (PIECE_BYTES / ELEMENT_BYTES)
#define DIM_TILES (HEAD_DIM / 16)

// Blocks of a sequence and KV head that have finished; zero again after the last.
__device__ u32 arrivals[MAX_COUNTERS];

// Where the first of the two dimensions of tile `tile` that lane group g holds lies in a row.
__device__ __forceinline__ int first_dim(int tile, int g) {
  constexpr int tiles = PIECE_DIMS / 2;
  return tile / tiles * (8 * PIECE_DIMS) + g * PIECE_DIMS + tile % tiles * 2;
}

// Adds up what `splits` blocks left, in their order, and writes the output of this sequence and KV head.
__device__ __forceinline__ void combine(const float4* partial, const float2* maxima_sums, uint2* out, float* weights,
                                        int splits, int group) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int column = warp; column < group; column += WARPS) {
    float2 own[MAX_SPLITS / 32];
    float highest = LOWEST, sum = 0;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      const int split = i * 32 + lane;
      own[i] = split < splits ? __ldcg(maxima_sums + split * group + column) : make_float2(LOWEST, 0);
      highest = fmaxf(highest, own[i].x);
    }
    for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, step));
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      own[i].x = exp2_approximate(own[i].x - highest);
      sum += own[i].x * own[i].y;
    }
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(FULL, sum, step);
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++)
      if (i * 32 + lane < splits) weights[(i * 32 + lane) * group + column] = own[i].x / sum;
  }
  __syncthreads();
  const int quarters = group * HEAD_DIM / 4;
  for (int at = threadIdx.x; at < quarters; at += WARPS * 32) {
    const int column = at / (HEAD_DIM / 4);
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll 8
    for (int split = 0; split < splits; split++) {
      const float4 v = scaled(__ldcg(partial + (size_t)split * quarters + at), weights[split * group + column]);
      total = make_float4(total.x + v.x, total.y + v.y, total.z + v.z, total.w + v.w);
    }
    out[at] = pack_output(total);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, NT == 1 ? 2 : 1)
paged_attention(const u16* __restrict__ query, const u8* __restrict__ keys, const u8* __restrict__ values,
                const int* __restrict__ block_table, const int* __restrict__ lengths, u16* out, float* partial,
                float* maxima_sums, float scale_log2, int query_stride, int table_stride, int max_pages, int kv_heads,
                int group) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
  const int head = blockIdx.x, split = blockIdx.y, sequence = blockIdx.z, num_splits = gridDim.y;
  const int pair = sequence * kv_heads + head;
  uint2* own_out = (uint2*)(out + (size_t)pair * group * HEAD_DIM);

  const int length = min(lengths[sequence], max_pages * PAGE_SIZE);
  if (length <= 0) {
    if (split == 0)
      for (int at = threadIdx.x; at < group * HEAD_DIM / 4; at += WARPS * 32) own_out[at] = make_uint2(0, 0);
    return;
  }
  // Splits are of whole rounds, a tile for each warp.
  const int rounds = divide_up(length, TILE * WARPS);
  const int split_rounds = divide_up(rounds, num_splits);
  const int used_splits = divide_up(rounds, split_rounds);
  if (split >= used_splits) return;
  const int tiles = divide_up(length, TILE);
  const int first_tile = split * split_rounds * WARPS + warp;
  const int count = max(0, divide_up(min(tiles, (split + 1) * split_rounds * WARPS) - first_tile, WARPS));

  // The rings while tiles stream, then the warps' sums, then the weights of the splits.
  extern __shared__ __align__(16) u8 memory[];
  u8* ring = memory + warp * DEPTH * UNIT_BYTES;

  // Lane i holds the page of this warp's tile i, for 32 tiles at a time.
  int pages = 0;
  auto tile_offset = [&](int i) {
    const int page = __shfl_sync(FULL, pages, i & 31), tile = first_tile + i * WARPS;
    return (((size_t)page * kv_heads + head) * PAGE_SIZE + tile % (PAGE_SIZE / TILE) * TILE) * ROW_BYTES;
  };
  auto fetch_keys = [&](int i, int slot) {
    if (i < count) {
      if (i % 32 == 0) {
        const int tile = min(first_tile + (i + lane) * WARPS, tiles - 1);
        pages = block_table[sequence * table_stride + tile / (PAGE_SIZE / TILE)];
      }
      const u8* from = keys + tile_offset(i);
      const int present = length - (first_tile + i * WARPS) * TILE;
#pragma unroll
      for (int part = 0; part < ROW_BYTES / 32; part++) {
        const int row = g + part % 2 * 8;
        copy_async<16>(ring + slot * UNIT_BYTES + part * 512 + lane * 16,
                       from + row * ROW_BYTES + part / 2 * 64 + c * 16, row < present);
      }
    }
    commit_copies();
  };
  auto fetch_values = [&](int i, int slot) {
    if (i < count) {
      const u8* from = values + tile_offset(i);
      const int present = length - (first_tile + i * WARPS) * TILE;
#pragma unroll
      for (int part = 0; part < 4 * PIECES; part++) {
        const int token = part % 4, row = 2 * c + token % 2 + token / 2 * 8;
        copy_async<PIECE_BYTES>(ring + slot * UNIT_BYTES + (part * 32 + lane) * PIECE_BYTES,
                                from + row * ROW_BYTES + (part / 4 * 8 + g) * PIECE_BYTES, row < present);
      }
    }
    commit_copies();
  };
  // Unit 2i is the keys of tile i, unit 2i + 1 its values.
#pragma unroll
  for (int unit = 0; unit < DEPTH - 1; unit++) {
    if (unit % 2) fetch_values(unit / 2, unit);
    else fetch_keys(unit / 2, unit);
  }

  // Dimensions in the order in which a lane meets those of the keys.
  uint4 q[NT][HEAD_DIM / 32];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 32; i++) {
      const int column = n * 8 + g, dim = KV_FP8 ? i / 2 * 64 + c * 16 + i % 2 * 8 : i * 32 + c * 8;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (column < group)
        v = __ldg((const uint4*)(query + (size_t)sequence * query_stride + (head * group + column) * HEAD_DIM + dim));
      q[n][i] = make_uint4(convert_query(v.x), convert_query(v.y), convert_query(v.z), convert_query(v.w));
    }

  float acc[NT][DIM_TILES][4] = {}, highest[NT][2], sum[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; n++) highest[n][0] = highest[n][1] = LOWEST;

  int slot = 0;
  for (int i = 0; i < count; i++) {
    constexpr int ahead = DEPTH - 1;
    const int behind = slot == 0 ? ahead : slot - 1;
    if (ahead % 2) fetch_values(i + ahead / 2, behind);
    else fetch_keys(i + ahead / 2, behind);
    wait_copies<ahead>();

    // Two sums, so that fewer products wait for one another.
    float scores[NT][2][4] = {};
#pragma unroll
    for (int part = 0; part < ROW_BYTES / 64; part++) {
      const u8* unit = ring + slot * UNIT_BYTES + part * 1024 + lane * 16;
      const uint4 low = *(const uint4*)unit, high = *(const uint4*)(unit + 512);
#pragma unroll
      for (int step = 0; step < (KV_FP8 ? 4 : 2); step++) {
        u32 a[4];
        if (KV_FP8) {
          unpack_e4m3(word(low, step), a[0], a[2]);
          unpack_e4m3(word(high, step), a[1], a[3]);
        } else {
          a[0] = word(low, step * 2), a[2] = word(low, step * 2 + 1);
          a[1] = word(high, step * 2), a[3] = word(high, step * 2 + 1);
        }
        const int all = part * (KV_FP8 ? 4 : 2) + step;
#pragma unroll
        for (int n = 0; n < NT; n++)
          multiply(scores[n][all % 2], a, word(q[n][all / 2], all % 2 * 2), word(q[n][all / 2], all % 2 * 2 + 1));
      }
    }

    const int present = length - (first_tile + i * WARPS) * TILE;
    u32 p[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float s[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        s[j] = g + j / 2 * 8 < present ? (scores[n][0][j] + scores[n][1][j]) * scale_log2 : LOWEST;
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float before = highest[n][j];
        highest[n][j] = fmaxf(before, max_over_rows(fmaxf(s[j], s[j + 2])));
        const float shrink = exp2_approximate(before - highest[n][j]);
        s[j] = exp2_approximate(s[j] - highest[n][j]);
        s[j + 2] = exp2_approximate(s[j + 2] - highest[n][j]);
        sum[n][j] = sum[n][j] * shrink + s[j] + s[j + 2];
#pragma unroll
        for (int t = 0; t < DIM_TILES; t++) acc[n][t][j] *= shrink, acc[n][t][j + 2] *= shrink;
      }
      p[n][0] = transpose(pack(s[0], s[1]));
      p[n][1] = transpose(pack(s[2], s[3]));
    }

    if (ahead % 2) fetch_keys(i + (ahead + 1) / 2, slot);
    else fetch_values(i + ahead / 2, slot);
    wait_copies<ahead>();
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
      u32 v[4][PIECE_BYTES / 4];
#pragma unroll
      for (int token = 0; token < 4; token++) {
        const u8* from = ring + slot * UNIT_BYTES + ((piece * 4 + token) * 32 + lane) * PIECE_BYTES;
        if (PIECE_BYTES == 16) {
          const uint4 four = *(const uint4*)from;
#pragma unroll
          for (int w = 0; w < PIECE_BYTES / 4; w++) v[token][w] = word(four, w);
        } else {
          const uint2 two = *(const uint2*)from;
          v[token][0] = two.x, v[token][1] = two.y;
        }
      }
#pragma unroll
      for (int t = 0; t < PIECE_DIMS / 2; t++) {
        const int w = KV_FP8 ? t / 2 : t;
        u32 a[4];
        if (KV_FP8) {
          const u32 order = t % 2 ? 0x7362 : 0x5140;
          unpack_e4m3(__byte_perm(v[0][w], v[1][w], order), a[0], a[1]);
          unpack_e4m3(__byte_perm(v[2][w], v[3][w], order), a[2], a[3]);
        } else {
          a[0] = __byte_perm(v[0][w], v[1][w], 0x5410), a[1] = __byte_perm(v[0][w], v[1][w], 0x7632);
          a[2] = __byte_perm(v[2][w], v[3][w], 0x5410), a[3] = __byte_perm(v[2][w], v[3][w], 0x7632);
        }
#pragma unroll
        for (int n = 0; n < NT; n++) multiply(acc[n][piece * (PIECE_DIMS / 2) + t], a, p[n][0], p[n][1]);
      }
    }
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
  }
  wait_copies<0>();

  __shared__ float warp_highest[WARPS][COLUMNS], warp_sum[WARPS][COLUMNS];
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      sum[n][j] = sum_over_rows(sum[n][j]);
      if (g == 0) warp_highest[warp][n * 8 + c * 2 + j] = highest[n][j], warp_sum[warp][n * 8 + c * 2 + j] = sum[n][j];
    }
  __syncthreads();
  float(*sums)[NT * DIM_TILES * 4][32] = (float(*)[NT * DIM_TILES * 4][32])memory;
  auto highest_of = [&](int column) {
    float most = LOWEST;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, warp_highest[w][column]);
    return most;
  };
  auto sum_of = [&](int column, float most) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += warp_sum[w][column] * exp2_approximate(warp_highest[w][column] - most);
    return total;
  };
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      // A warp without a tile has LOWEST, and shrinks to nothing.
      const float shrink = exp2_approximate(highest[n][j] - highest_of(n * 8 + c * 2 + j));
#pragma unroll
      for (int t = 0; t < DIM_TILES; t++) {
        sums[warp][(n * DIM_TILES + t) * 4 + j][lane] = acc[n][t][j] * shrink;
        sums[warp][(n * DIM_TILES + t) * 4 + j + 2][lane] = acc[n][t][j + 2] * shrink;
      }
    }
  __syncthreads();

  // Four neighbouring dimensions of a query head at a time.
  float4* own_partial = (float4*)partial + (size_t)pair * num_splits * group * (HEAD_DIM / 4);
  float2* own_maxima_sums = (float2*)maxima_sums + (size_t)pair * num_splits * group;
  for (int at = threadIdx.x; at < NT * DIM_TILES * 32; at += WARPS * 32) {
    const int j = at / 32 % 2, t = at / 64 % (DIM_TILES / 2) * 2, n = at / 64 / (DIM_TILES / 2);
    const int column = n * 8 + c * 2 + j, index = (n * DIM_TILES + t) * 4 + j;
    if (column >= group) continue;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      total.x += sums[w][index][lane], total.y += sums[w][index + 2][lane];
      total.z += sums[w][index + 4][lane], total.w += sums[w][index + 6][lane];
    }
    const int place = (column * HEAD_DIM + first_dim(t, g)) / 4;
    if (used_splits == 1) own_out[place] = pack_output(scaled(total, 1 / sum_of(column, highest_of(column))));
    else own_partial[(size_t)split * group * (HEAD_DIM / 4) + place] = total;
  }
  if (used_splits == 1) return;
  if (threadIdx.x < group) {
    const float most = highest_of(threadIdx.x);
    own_maxima_sums[split * group + threadIdx.x] = make_float2(most, sum_of(threadIdx.x, most));
  }

  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  // Wraps to zero by itself, ready for the next launch.
  if (threadIdx.x == 0) is_last = atomicInc(&arrivals[pair], used_splits - 1) == used_splits - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  combine(own_partial, own_maxima_sums, own_out, (float*)memory, used_splits, group);
}
