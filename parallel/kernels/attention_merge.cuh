// How the warps of a block of paged_attention.cu, and then the splits of a context, are added up.

// What a lane holds of a query head.
struct Found {
  float v[HEAD_DIM / 32];
};

__device__ __forceinline__ Found load_found(const float* from, bool is_there) {
  Found found = {};
  if (!is_there) return found;
  if (HEAD_DIM == 128) {
    const float4 four = __ldcg((const float4*)from);
    found.v[0] = four.x, found.v[1] = four.y, found.v[HEAD_DIM / 32 - 2] = four.z, found.v[HEAD_DIM / 32 - 1] = four.w;
  } else {
    const float2 two = __ldcg((const float2*)from);
    found.v[0] = two.x, found.v[1] = two.y;
  }
  return found;
}

// What the sums of the splits count, in the lane of the split (of split 32 in lane 0 again), and the sum of all.
struct Weights {
  float of_split[MAX_SPLITS / 32], sum;

  __device__ __forceinline__ void find(const float2* maxima_sums, int splits) {
    const int lane = threadIdx.x & 31;
    float2 own[MAX_SPLITS / 32];
    float highest = LOWEST;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      own[i] = i * 32 + lane < splits ? __ldcg(maxima_sums + i * 32 + lane) : make_float2(LOWEST, 0);
      highest = fmaxf(highest, own[i].x);
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, step));
    sum = 0;
#pragma unroll
    for (int i = 0; i < MAX_SPLITS / 32; i++) {
      of_split[i] = exp2_approximate(own[i].x - reference_of(highest));
      sum += of_split[i] * own[i].y;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(FULL, sum, step);
  }

  __device__ __forceinline__ float of(int split) const {
    return __shfl_sync(FULL, split < 32 ? of_split[0] : of_split[MAX_SPLITS / 32 - 1], split & 31);
  }
};

// Adds up what `splits` blocks left, always in their order, and hands each pair of dimensions of a column to `write`.
// Sums are under way while their weights are worked out, and those of two columns where a warp has two.
template <class Write>
__device__ __forceinline__ void combine(int warp, const float* partial, const float2* maxima_sums, int num_splits,
                                        int splits, int num_columns, Write write) {
  constexpr int at_once = 8, stride = COLUMNS * HEAD_DIM, num = COLUMNS > WARPS ? 2 : 1;
  const int dim = (threadIdx.x & 31) * (HEAD_DIM / 32);
#pragma unroll 1
  for (int first = warp; first < num_columns; first += num * WARPS) {
    int columns[num];
    Weights weights[num];
    Found found[num][at_once], total[num] = {};
#pragma unroll
    for (int k = 0; k < num; k++) {
      // Where there is no second one, the first twice.
      columns[k] = first + k * WARPS < num_columns ? first + k * WARPS : first;
#pragma unroll
      for (int i = 0; i < at_once; i++)
        found[k][i] = load_found(partial + i * stride + columns[k] * HEAD_DIM + dim, i < splits);
    }
#pragma unroll
    for (int k = 0; k < num; k++) weights[k].find(maxima_sums + columns[k] * num_splits, splits);
#pragma unroll 1
    for (int done = 0; done < splits; done += at_once) {
#pragma unroll
      for (int k = 0; k < num; k++) {
        const float* next = partial + (done + at_once) * stride + columns[k] * HEAD_DIM + dim;
#pragma unroll
        for (int i = 0; i < at_once; i++) {
          const float weight = weights[k].of(done + i);
#pragma unroll
          for (int d = 0; d < HEAD_DIM / 32; d++) total[k].v[d] += found[k][i].v[d] * weight;
          found[k][i] = load_found(next + i * stride, done + at_once + i < splits);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < num; k++) {
      const float by = weights[k].sum > 0 ? reciprocal(weights[k].sum) : 0;
#pragma unroll
      for (int d = 0; d < HEAD_DIM / 32; d += 2)
        write(columns[k], dim + d, total[k].v[d] * by, total[k].v[d + 1] * by);
    }
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

// Of the sums of four dimensions that a block makes, the column of number `at`, and its first dimension.
__device__ __forceinline__ int column_of(int at) {
  return at / 64 / (DIM_TILES / 2) * 8 + (at & 3) * 2 + at / 32 % 2;
}
__device__ __forceinline__ int dim_of(int at) { return first_dim(at / 64 % (DIM_TILES / 2) * 2, at / 4 % 8); }

// Whether `num - 1` blocks have come here before this one, and what they wrote can be read.
__device__ __forceinline__ bool is_last_to_come(u32* counter, u32 num) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) is_last = count_up(counter, num - 1) == num - 1;
  __syncthreads();
  return is_last;
}

// Adds up what the warps have in `acc`, through shared memory, and hands four neighbouring dimensions of a column at a
// time to `write`, as sum `at` (column_of, dim_of). All of `memory` is free, once all threads have come here.
template <class Write>
__device__ __forceinline__ void merge_warps(int warp, Warps& warps, u8* memory, float (*acc)[DIM_TILES][4],
                                            const float (*highest)[2], float (*sum)[2], Write write) {
  const int lane = threadIdx.x & 31, g = lane >> 2, c = lane & 3;
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
    const int index = at / 64 * 8 + at / 32 % 2;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      total.x += sums[w][index][lane], total.y += sums[w][index + 2][lane];
      total.z += sums[w][index + 4][lane], total.w += sums[w][index + 6][lane];
    }
    write(at, total);
  }
}
