// Attention of the newest tokens of sequences over their paged keys and values; softmax in float32, grouped-query
// heads.
//
// Block (KV head and pass, split, sequence) takes the query heads of a KV head, of all rows of its sequence, so that
// keys and values are read once. Keys, then values, are the 16-row side of mma.m16n8k16 and 8 query heads, of one row
// or of several, are its columns. Where rows have more than NT tiles of columns, passes take them, beside one another.
// A warp works on tiles of 16 tokens, warps of all splits in turn, with a running maximum and sum; warps meet at the
// end of the split. The last block of a pass to finish adds up the splits, always in the same order; with CLUSTER, so
// many blocks add up theirs in shared memory before (attention_cluster.cuh). How many splits there are is the host's
// choice; how many tiles they have follows from the sequence's length, read here, so that a captured graph stays right
// as sequences grow. Pages are looked up before the length is known: one wait for memory, not two.
//
// The kernel right ahead makes the query, the masks, and the keys and values of the newest token, or with TREE of those
// from `starts` on. All else was written before, and a warp fills its ring with it while that kernel still works, as
// programmatic.cuh allows. The next kernel starts once a warp has asked for all it needs: what that one fetches early
// comes after it.
//
// With TREE, tokens from `starts` of the sequence on are nodes of a tree, in order, and bit i of a row's mask of `words`
// says whether it sees node i; tokens before are seen by all rows. A row whose mask is 0 is empty, and its output zeros.
//
// Defined by the host: HEAD_DIM (64, 128), PAGE_SIZE (a multiple of 16), NT (tiles of 8 columns), WARPS, DEPTH (units
// of a warp's ring), BLOCKS (for a multiprocessor), MAX_SPLITS (32, 64), MAX_COUNTERS, MAX_WORDS (of a mask, with 64
// bits each), TREE, QUERY_F16 (0: bf16), KV_FP8 (0: as the query; 1: e4m3, multiplied in fp16, which holds every e4m3
// number), CLUSTER (1, or from sm_90 on 2, 4, 8), MAX_GROUPS (clusters of a pass).
//
// Layouts:
//   keys, values  [pages][KV heads][PAGE_SIZE][HEAD_DIM]
//   query, out    [sequences][rows][KV heads * group][HEAD_DIM]; query with a stride between rows
//   masks         [sequences][rows][words]; block_table with a stride between sequences
//   partial       [sequences][passes][KV heads][splits][COLUMNS][HEAD_DIM] float32
//   maxima_sums   [sequences][passes][KV heads][COLUMNS][splits] pairs; with CLUSTER both as attention_cluster.cuh says
//
// A tile's keys, and its values, are one piece of memory, which a warp copies as it lies. Which token and which
// dimension is which row or step of an mma is free as long as both sides agree: lane (g, c) reads 16 bytes of keys g
// and g + 8 at a time, for two steps of the product with the query (four of e4m3), and for the other product all its
// dimensions of tokens 2c, 2c + 1, 2c + 8, 2c + 9, which byte permutations pair up.

#include "attention.cuh"
#include "attention_tiles.cuh"
#include "attention_merge.cuh"
#include "attention_cluster.cuh"

// Blocks of a sequence, KV head and pass that have finished; zero again after the last.
__device__ u32 arrivals[MAX_COUNTERS];

extern "C" __global__ void CLUSTER_SHAPE __launch_bounds__(WARPS * 32, BLOCKS)
paged_attention(const u16* __restrict__ query, const u8* __restrict__ keys, const u8* __restrict__ values,
                const int* __restrict__ block_table, const int* __restrict__ lengths, const int* __restrict__ starts,
                const u64* __restrict__ masks, u16* out, float* partial, float* maxima_sums, float scale_log2,
                int query_stride, int table_stride, int max_pages, int kv_heads, int group, int rows, int words) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
  // The same in all lanes, as the compiler cannot know by itself.
  const int warp = __shfl_sync(FULL, (int)threadIdx.x >> 5, 0);
  const int head = blockIdx.x % kv_heads, first_column = blockIdx.x / kv_heads * COLUMNS;
  const int split = blockIdx.y, num_splits = gridDim.y, sequence = blockIdx.z;
  const int num_columns = min(COLUMNS, rows * group - first_column);
  const int first_tile = split * WARPS + warp;
  int tile_step = num_splits * WARPS;

  // Lane i holds the page of this warp's tile i, for 32 tiles at a time.
  auto look_up = [&](int i, int step) {
    const int index = (first_tile + (i + lane) * step) / (PAGE_SIZE / TILE);
    return index < max_pages ? load_kept(block_table + (size_t)sequence * table_stride + index) : 0;
  };
  int pages = look_up(0, tile_step);
  const int pages_alone = num_splits > CLUSTER && CLUSTER > 1 ? look_up(0, CLUSTER * WARPS) : pages;
  const int length = min(load_kept(lengths + sequence), max_pages * PAGE_SIZE);
  const int start = TREE ? load_kept(starts + sequence) : length;
  const int tiles = divide_up(max(0, length), TILE);
  const int used_splits =
      CLUSTER > 1 ? splits_of_clusters(tiles, num_splits) : min(num_splits, divide_up(tiles, WARPS));
  if (CLUSTER > 1 && used_splits < num_splits) tile_step = CLUSTER * WARPS, pages = pages_alone;
  const int count = split < used_splits ? max(0, divide_up(tiles - first_tile, tile_step)) : 0;

  // The rings while tiles stream and the query of all warps, then the warps' sums.
  DYNAMIC_SHARED(memory);
  u8* ring = memory + warp * DEPTH * UNIT_BYTES;
  uint4(*shared_query)[32] = (uint4(*)[32])(memory + WARPS * DEPTH * UNIT_BYTES);

  // Tokens that are there: before the wait without those of the kernel ahead.
  int known = STARTS_EARLY ? min(length, TREE ? start : length - 1) : length;
  const u32 ring_address = shared_address(ring);
  auto token_at = [&](int page, int tile) {
    return ((size_t)page * kv_heads + head) * PAGE_SIZE + tile % (PAGE_SIZE / TILE) * TILE;
  };
  auto fetch = [&](const u8* stored, int i, int slot) {
    if (i < count) {
      const int tile = first_tile + i * tile_step, present = length - tile * TILE, ready = known - tile * TILE;
      const u8* from = stored + token_at(__shfl_sync(FULL, pages, i & 31), tile) * ROW_BYTES + lane * 16;
#pragma unroll
      for (int part = 0; part < UNIT_BYTES / 512; part++) {
        const int row = part * 32 / CHUNKS + lane / CHUNKS;
        const u32 to = ring_address + slot * UNIT_BYTES + place(row, lane % CHUNKS * 16);
        if (row < ready || row >= present) copy_async(to, from + part * 512, row < present);
      }
    }
    commit_copies();
  };
  // Unit 2i is the keys of tile i, unit 2i + 1 its values.
  auto fetch_unit = [&](bool is_values, int i, int slot) {
    if (!is_values && i % 32 == 0 && i != 0 && i < count) pages = look_up(i, tile_step);
    fetch(is_values ? values : keys, i, slot);
  };
#pragma unroll 1
  for (int unit = 0; unit < DEPTH - 1; unit++) fetch_unit(unit % 2, unit / 2, unit);
#if CLUSTER > 1
  SHARED_IN_CLUSTER(Shares, shares);
  if (threadIdx.x == 0) shares.expect();
#endif
  const int first_new_token = known;
  const int first_new = STARTS_EARLY ? max(0, divide_up(max(0, known) / TILE - first_tile, tile_step)) : count;
  wait_for_predecessors();
  known = length;

  auto row_of = [&](int column) { return TREE ? (first_column + column) / group : 0; };
  // Of a column, in query heads.
  auto head_at = [&](int column, int row) { return head * group + first_column + column - row * group; };
  // Of the rows that have columns here, which are fewer.
  __shared__ u64 row_masks[COLUMNS * MAX_WORDS];
  __shared__ bool is_row[COLUMNS];
  const int first_row = row_of(0), num_rows = row_of(num_columns - 1) + 1 - first_row;
  auto write_pair = [&](int column, int dim, float low, float high) {
    const int row = row_of(column);
    const size_t at = ((size_t)(sequence * rows + row) * kv_heads * group + head_at(column, row)) * HEAD_DIM + dim;
    *(u32*)(out + at) = TREE && !is_row[row - first_row] ? 0 : pack_output(low, high);
  };
  if (length <= 0) {
    if (split == 0)
      for (int at = threadIdx.x; at < num_columns * HEAD_DIM / 2; at += WARPS * 32)
        write_pair(at / (HEAD_DIM / 2), at % (HEAD_DIM / 2) * 2, 0, 0);
    return;
  }
  if (split >= used_splits) return;
#if CLUSTER > 1
  arrive_at_cluster();
#endif

  // Dimensions in the order in which a lane meets those of the keys.
  auto load_query = [&](int n, int i) {
    const int column = n * 8 + g, row = row_of(column);
    const int dim = KV_FP8 ? i / 2 * 64 + c * 16 + i % 2 * 8 : i * 32 + c * 8;
    const u16* own_row = query + (size_t)(sequence * rows + row) * query_stride;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (column < num_columns) v = load_fresh((const uint4*)(own_row + head_at(column, row) * HEAD_DIM + dim));
    return make_uint4(convert_query(v.x), convert_query(v.y), convert_query(v.z), convert_query(v.w));
  };
  uint4 own_query[QUERY_SHARED ? 1 : NT][QUERY_PARTS];
  if (QUERY_SHARED) {
    for (int at = warp; at < NT * QUERY_PARTS; at += WARPS)
      shared_query[at][lane] = load_query(at / QUERY_PARTS, at % QUERY_PARTS);
  } else {
#pragma unroll
    for (int at = 0; at < NT * QUERY_PARTS; at++)
      own_query[QUERY_SHARED ? 0 : at / QUERY_PARTS][at % QUERY_PARTS] = load_query(at / QUERY_PARTS, at % QUERY_PARTS);
  }
  // Of units that are under way, the tokens that could not be read before.
#pragma unroll 1
  for (int i = first_new; i < count && 2 * i < DEPTH - 1; i++) {
    constexpr int at_once = TREE ? 4 : 1;
    const int tile = first_tile + i * tile_step, first = max(0, first_new_token - tile * TILE);
    const int end = min(TILE, length - tile * TILE), unit = 2 * i + lane / CHUNKS;
    const bool works = lane < 2 * CHUNKS && unit < DEPTH - 1;
    const u8* stored = lane < CHUNKS ? keys : values;
    const u8* from = stored + token_at(__shfl_sync(FULL, pages, i & 31), tile) * ROW_BYTES + lane % CHUNKS * 16;
#pragma unroll 1
    for (int row = first; row < end; row += at_once) {
      uint4 found[at_once];
#pragma unroll
      for (int k = 0; k < at_once; k++)
        if (works && row + k < end) found[k] = load_fresh((const uint4*)(from + (row + k) * ROW_BYTES));
#pragma unroll
      for (int k = 0; k < at_once; k++)
        if (works && row + k < end) *(uint4*)(ring + unit * UNIT_BYTES + place(row + k, lane % CHUNKS * 16)) = found[k];
    }
  }
  if (TREE && threadIdx.x < num_rows) {
    const u64* own_masks = masks + ((size_t)sequence * rows + first_row + threadIdx.x) * words;
    u64 any = 0;
    for (int w = 0; w < words; w++) any |= row_masks[threadIdx.x * words + w] = load_fresh(own_masks + w);
    is_row[threadIdx.x] = any != 0;
  }
  if (TREE || QUERY_SHARED) __syncthreads();
  auto query_part = [&](int n, int i) {
    return QUERY_SHARED ? shared_query[n * QUERY_PARTS + i][lane] : own_query[QUERY_SHARED ? 0 : n][i];
  };

  float acc[NT][DIM_TILES][4] = {}, highest[NT][2], sum[NT][2] = {};
#pragma unroll
  for (int n = 0; n < NT; n++) highest[n][0] = highest[n][1] = LOWEST;

  int slot = 0;
  // Waits for the unit at `slot`, and asks for one in the place of the unit before it, which all lanes have read.
  auto turn = [&](bool is_values, int i) {
    await_copies<DEPTH - 2>();
    __syncwarp();
    fetch_unit(is_values, i, slot == 0 ? DEPTH - 1 : slot - 1);
    const u8* unit = ring + slot * UNIT_BYTES;
    slot = slot + 1 == DEPTH ? 0 : slot + 1;
    return unit;
  };
#pragma unroll 1
  for (int i = 0;; i++) {
    if (i + (DEPTH - 1) / 2 >= count) let_successor_start();
    if (i >= count) break;
    float scores[NT][2][4] = {};
    multiply_keys(scores, turn((DEPTH - 1) % 2, i + (DEPTH - 1) / 2), query_part, g, c);

    const int first_token = (first_tile + i * tile_step) * TILE;
    const bool has_nodes = TREE && first_token + TILE > start;
    u32 p[NT][2];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float s[4];
#pragma unroll
      for (int j = 0; j < 4; j++)
        s[j] = first_token + g + j / 2 * 8 < length ? (scores[n][0][j] + scores[n][1][j]) * scale_log2 : LOWEST;
      if (has_nodes) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int node = first_token + g + j / 2 * 8 - start, row = row_of(n * 8 + c * 2 + j % 2) - first_row;
          const bool is_known = node < words * 64 && row < num_rows;
          if (node >= 0 && !(is_known && row_masks[row * words + node / 64] >> node % 64 & 1)) s[j] = LOWEST;
        }
      }
      float before[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        before[j] = highest[n][j];
        highest[n][j] = fmaxf(before[j], max_over_rows(fmaxf(s[j], s[j + 2])));
      }
      // Seldom after the first tiles.
      if (__any_sync(FULL, before[0] != highest[n][0] || before[1] != highest[n][1])) {
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const float shrink = exp2_approximate(before[j] - reference_of(highest[n][j]));
          sum[n][j] *= shrink;
#pragma unroll
          for (int t = 0; t < DIM_TILES; t++) acc[n][t][j] *= shrink, acc[n][t][j + 2] *= shrink;
        }
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const float most = highest[n][j % 2];
        s[j] = exp2_approximate(s[j] - (TREE ? reference_of(most) : most));
      }
      sum[n][0] += s[0] + s[2];
      sum[n][1] += s[1] + s[3];
      p[n][0] = transpose(pack(s[0], s[1]));
      p[n][1] = transpose(pack(s[2], s[3]));
    }
    multiply_values(acc, turn(DEPTH % 2, i + DEPTH / 2), p, g, c);
  }
  await_copies<0>();

  __shared__ Warps warps;
  const size_t pair = (size_t)sequence * gridDim.x + blockIdx.x;
  // A row that sees nothing has a sum of 0.
  auto write = [&](int at, const float4& v, float sum) {
    const float by = sum > 0 ? reciprocal(sum) : 0;
    if (column_of(at) >= num_columns) return;
    write_pair(column_of(at), dim_of(at), v.x * by, v.y * by);
    write_pair(column_of(at), dim_of(at) + 2, v.z * by, v.w * by);
  };
#if CLUSTER > 1
  const int rank = split % CLUSTER;
  wait_for_cluster();
  merge_warps(warp, warps, memory, acc, highest, sum, [&](int at, const float4& v) { shares.send(rank, at, v); });
  shares.send_weights(rank, warps);
  if (used_splits == CLUSTER) {
    shares.add_up(rank, [&](int at, const float4& v, float, float sum) { write(at, v, sum); });
  } else {
    Groups groups(partial, maxima_sums, pair, num_splits / CLUSTER);
    shares.add_up(rank, [&](int at, const float4& v, float most, float sum) {
      groups.leave(split / CLUSTER, at, v, most, sum);
    });
    if (is_last_to_come(&arrivals[pair * CLUSTER + rank], used_splits / CLUSTER)) groups.add_up(rank, write);
  }
#else
  float* own_partial = partial + pair * num_splits * COLUMNS * HEAD_DIM;
  float2* own_maxima_sums = (float2*)maxima_sums + pair * COLUMNS * num_splits;
  merge_warps(warp, warps, memory, acc, highest, sum, [&](int at, const float4& v) {
    const int column = column_of(at);
    if (used_splits == 1) write(at, v, warps.sum_of(column, warps.highest_of(column)));
    else *(float4*)(own_partial + ((size_t)split * COLUMNS + column) * HEAD_DIM + dim_of(at)) = v;
  });
  if (used_splits == 1) return;
  if (threadIdx.x < num_columns) {
    const float most = warps.highest_of(threadIdx.x);
    own_maxima_sums[threadIdx.x * num_splits + split] = make_float2(most, warps.sum_of(threadIdx.x, most));
  }
  if (is_last_to_come(&arrivals[pair], used_splits))
    combine(warp, own_partial, own_maxima_sums, num_splits, used_splits, num_columns, write_pair);
#endif
}
