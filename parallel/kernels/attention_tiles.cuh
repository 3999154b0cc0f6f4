// Sizes, places and small arithmetic of paged_attention.cu; its comments say what is what.

#define TILE 16
#define COLUMNS (8 * NT)
#define ELEMENT_BYTES (KV_FP8 ? 1 : 2)
#define ROW_BYTES (HEAD_DIM * ELEMENT_BYTES)
#define UNIT_BYTES (TILE * ROW_BYTES)
#define CHUNKS (ROW_BYTES / 16)
// What a lane reads at once of a row of values, and how often.
#define PIECE_BYTES (ROW_BYTES >= 128 ? 16 : 8)
#define PIECES (ROW_BYTES / (8 * PIECE_BYTES))
#define PIECE_DIMS (PIECE_BYTES / ELEMENT_BYTES)
#define DIM_TILES (HEAD_DIM / 16)
// Of a query head, a lane holds this many times 16 bytes.
#define QUERY_PARTS (HEAD_DIM / 32)
// With more columns, registers are short.
#define QUERY_SHARED (NT > 2)

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Where byte `byte` of token `row` lies in a unit. Eight lanes that read 16 bytes each at once, of keys (rows 2k and
// 2k + 1) or of values (every other row), find them in different banks.
__device__ __forceinline__ int place(int row, int byte) {
  const int turn = ((row & 6) ^ (row & 1) << 2) % CHUNKS;
  return row * ROW_BYTES + (byte ^ turn << 4);
}

// Where the first of the two dimensions of tile `tile` that lane group g holds lies in a row.
__device__ __forceinline__ int first_dim(int tile, int g) {
  constexpr int tiles = PIECE_DIMS / 2;
  return tile / tiles * (8 * PIECE_DIMS) + g * PIECE_DIMS + tile % tiles * 2;
}

// A pair in the type that tensor cores multiply.
__device__ __forceinline__ u32 pack(float low, float high) {
  return QUERY_F16 || KV_FP8 ? pack_f16(low, high) : pack_bf16(low, high);
}

__device__ __forceinline__ u32 pack_output(float low, float high) {
  return QUERY_F16 ? pack_f16(low, high) : pack_bf16(low, high);
}

// The query's pair as what tensor cores multiply.
__device__ __forceinline__ u32 convert_query(u32 pair) {
  if (QUERY_F16 || !KV_FP8) return pair;
  return pack_f16(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Over lanes of the same c.
__device__ __forceinline__ float max_over_rows(float v) {
  for (int step = 4; step < 32; step *= 2) v = fmaxf(v, __shfl_xor_sync(FULL, v, step));
  return v;
}

__device__ __forceinline__ float sum_over_rows(float v) {
  for (int step = 4; step < 32; step *= 2) v += __shfl_xor_sync(FULL, v, step);
  return v;
}

// What scores are shrunk by: the maximum, and 0 as long as nothing has been seen.
__device__ __forceinline__ float reference_of(float highest) { return highest == LOWEST ? 0 : highest; }

// The scores of the tokens of a tile: keys, from shared memory, times the query.
template <class Query>
__device__ __forceinline__ void multiply_keys(float (*scores)[2][4], const u8* unit, Query query, int g, int c) {
#pragma unroll
  for (int part = 0; part < ROW_BYTES / 64; part++) {
    const u8* from = unit + place(g, part * 64 + c * 16);
    const uint4 low = *(const uint4*)from, high = *(const uint4*)(from + 8 * ROW_BYTES);
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
      for (int n = 0; n < NT; n++) {
        const uint4 q = query(n, all / 2);
        // Two sums, so that fewer products wait for one another.
        multiply(scores[n][all % 2], a, word(q, all % 2 * 2), word(q, all % 2 * 2 + 1));
      }
    }
  }
}

// Adds the values of a tile, from shared memory, times their weights `p`.
__device__ __forceinline__ void multiply_values(float (*acc)[DIM_TILES][4], const u8* unit, const u32 (*p)[2], int g,
                                                int c) {
#pragma unroll
  for (int piece = 0; piece < PIECES; piece++) {
    u32 v[4][PIECE_BYTES / 4];
#pragma unroll
    for (int token = 0; token < 4; token++) {
      const int byte = (piece * 8 + g) * PIECE_BYTES;
      const u8* from = unit + place(2 * c + token % 2 + token / 2 * 8, byte);
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
}
