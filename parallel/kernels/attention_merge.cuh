// How the warps of a block of paged_attention.cu, and then the splits of a context, are added up.

// What a lane holds of a query head.
struct Found {
  float v[HEAD_DIM / 32];
};

__device__ __forceinline__ Found load_found(const float* row, int lane) {
  Found found;
  if (HEAD_DIM == 128) {
    const float4 four = __ldcg((const float4*)row + lane);
    found.v[0] = four.x, found.v[1] = four.y, found.v[HEAD_DIM / 32 - 2] = four.z, found.v[HEAD_DIM / 32 - 1] = four.w;
  } else {
    const float2 two = __ldcg((const float2*)row + lane);
    found.v[0] = two.x, found.v[1] = two.y;
  }
  return found;
}

// Adds up what `splits` blocks left, always in their order, and hands each pair of dimensions of each column to `write`.
// Sums are under way while their weights are worked out.
template <class Write>
__device__ __forceinline__ void combine(const float* partial, const float2* maxima_sums, int num_splits, int splits,
                                        int num_columns, Write write) {
  constexpr int at_once = 8;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll 1
  for (int column = warp; column < num_columns; column += WARPS) {
    auto load = [&](int split) {
      return load_found(partial + ((size_t)min(split, splits - 1) * COLUMNS + column) * HEAD_DIM, lane);
    };
    Found found[at_once];
#pragma unroll
    for (int i = 0; i < at_once; i++) found[i] = load(i);
    float2 own[MAX_SPLITS / 32];
    float highest = LOWEST, sum = 0;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      const int split = i * 32 + lane;
      own[i] = split < splits ? __ldcg(maxima_sums + column * num_splits + split) : make_float2(LOWEST, 0);
      highest = fmaxf(highest, own[i].x);
    }
    for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, step));
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      own[i].x = exp2_approximate(own[i].x - reference_of(highest));
      sum += own[i].x * own[i].y;
    }
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(FULL, sum, step);
    Found total = {};
#pragma unroll
    for (int part = 0; part < MAX_SPLITS / 32; part++)
      for (int first = part * 32; first < min(splits, part * 32 + 32); first += at_once) {
#pragma unroll
        for (int i = 0; i < at_once; i++) {
          const float weight = __shfl_sync(FULL, own[part].x, (first + i) & 31);
          // A split behind the last one is the last one again.
          if (first + i < splits)
            for (int d = 0; d < HEAD_DIM / 32; d++) total.v[d] += found[i].v[d] * weight;
          found[i] = load(first + at_once + i);
        }
      }
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 32; d += 2)
      write(column, lane * (HEAD_DIM / 32) + d, total.v[d], total.v[d + 1], sum);
  }
}

// The warps of a block: what each found, and with which maximum and sum, by column.
struct Warps {
  float highest[WARPS][COLUMNS], sum[WARPS][COLUMNS];

  __device__ __forceinline__ float highest_of(int column) const {
    float most = LOWEST;
#pragma unroll
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, highest[w][column]);
    return most;
  }

  __device__ __forceinline__ float sum_of(int column, float most) const {
    float total = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += sum[w][column] * exp2_approximate(highest[w][column] - reference_of(most));
    return total;
  }
};

// Adds up what the warps have in `acc`, through shared memory, and hands four neighbouring dimensions of a column at a
// time to `write`. All of `memory` is free, once all threads have come here.
template <class Write>
__device__ __forceinline__ void merge_warps(Warps& warps, u8* memory, float (*acc)[DIM_TILES][4],
                                            const float (*highest)[2], float (*sum)[2], Write write) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, c = lane & 3;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const int column = n * 8 + c * 2 + j;
      sum[n][j] = sum_over_rows(sum[n][j]);
      if (g == 0) warps.highest[warp][column] = highest[n][j], warps.sum[warp][column] = sum[n][j];
    }
  __syncthreads();
  float(*sums)[NT * DIM_TILES * 4][32] = (float(*)[NT * DIM_TILES * 4][32])memory;
#pragma unroll
  for (int n = 0; n < NT; n++)
#pragma unroll
    for (int j = 0; j < 2; j++) {
      // A warp that saw nothing has LOWEST, and shrinks to nothing.
      const float shrink = exp2_approximate(highest[n][j] - reference_of(warps.highest_of(n * 8 + c * 2 + j)));
#pragma unroll
      for (int t = 0; t < DIM_TILES; t++) {
        sums[warp][(n * DIM_TILES + t) * 4 + j][lane] = acc[n][t][j] * shrink;
        sums[warp][(n * DIM_TILES + t) * 4 + j + 2][lane] = acc[n][t][j + 2] * shrink;
      }
    }
  __syncthreads();
  for (int at = threadIdx.x; at < NT * DIM_TILES * 32; at += WARPS * 32) {
    const int j = at / 32 % 2, t = at / 64 % (DIM_TILES / 2) * 2, n = at / 64 / (DIM_TILES / 2);
    const int index = (n * DIM_TILES + t) * 4 + j;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      total.x += sums[w][index][lane], total.y += sums[w][index + 2][lane];
      total.z += sums[w][index + 4][lane], total.w += sums[w][index + 6][lane];
    }
    write(n * 8 + c * 2 + j, first_dim(t, g), total);
  }
}
