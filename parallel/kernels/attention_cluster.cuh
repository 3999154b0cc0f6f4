// How the CLUSTER blocks of a cluster of paged_attention.cu add up their splits: each owns a share of the sums, which the
// others store into its shared memory. Stores count themselves there: no fence, which takes as long as all of this, and one
// trip, where counting in global memory takes three.
//
// Clusters of a pass, where a context needs more than one, leave their sums in global memory, and the last of the blocks
// of one rank adds up its share, always in the same order:
//   partial       [sequences][passes][KV heads][groups][SUMS] of four numbers
//   maxima_sums   [sequences][passes][KV heads][groups][SUMS] pairs

#define SUMS (NT * DIM_TILES * 32)
#define SHARE (SUMS / CLUSTER)
// Tiles of a block up to which one cluster takes all: 128 KiB, which a multiprocessor reads in about the time that it
// takes to meet in global memory.
#define TILES_ALONE 16

__device__ __forceinline__ int splits_of_clusters(int tiles, int num_splits) {
  return tiles <= TILES_ALONE * CLUSTER ? CLUSTER : num_splits;
}

#if CLUSTER > 1

struct Shares {
  float4 sums[CLUSTER][SHARE];
  // Maximum and sum.
  float2 weights[CLUSTER][COLUMNS];
  u64 arrivals;

  // One thread, before it arrives at the cluster.
  __device__ __forceinline__ void expect() { expect_bytes(&arrivals, sizeof sums + sizeof weights); }

  // All blocks of the cluster must have begun.
  __device__ __forceinline__ void send(int rank, int at, const float4& v) {
    store_in_block(&sums[rank][at % SHARE], at / SHARE, v, &arrivals);
  }

  __device__ __forceinline__ void send_weights(int rank, const Warps& warps) {
    for (int at = threadIdx.x; at < COLUMNS * CLUSTER; at += WARPS * 32) {
      const float most = warps.highest_of(at % COLUMNS);
      const float2 found = make_float2(most, warps.sum_of(at % COLUMNS, most));
      store_in_block(&weights[rank][at % COLUMNS], at / COLUMNS, found, &arrivals);
    }
  }

  // Hands each sum of this block's share to `write`, with its maximum and what weights sum up to.
  template <class Write>
  __device__ __forceinline__ void add_up(int rank, Write write) {
    await_bytes(&arrivals);
    for (int own = threadIdx.x; own < SHARE; own += WARPS * 32) {
      const int at = rank * SHARE + own;
      float2 found[CLUSTER];
      float4 parts[CLUSTER];
#pragma unroll
      for (int i = 0; i < CLUSTER; i++) found[i] = weights[i][column_of(at)], parts[i] = sums[i][own];
      add_up_parts<CLUSTER>(parts, found, [&](const float4& v, float most, float sum) { write(at, v, most, sum); });
    }
  }

  template <int NUM, class Write>
  static __device__ __forceinline__ void add_up_parts(const float4* parts, const float2* found, Write write) {
    float most = LOWEST, sum = 0;
    float4 total = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < NUM; i++) most = fmaxf(most, found[i].x);
#pragma unroll
    for (int i = 0; i < NUM; i++) {
      const float weight = exp2_approximate(found[i].x - reference_of(most));
      sum += found[i].y * weight;
      total.x += parts[i].x * weight, total.y += parts[i].y * weight;
      total.z += parts[i].z * weight, total.w += parts[i].w * weight;
    }
    write(total, most, sum);
  }
};

// What the clusters of a pass leave for the last of them.
struct Groups {
  float4* partial;
  float2* weights;
  int num;

  __device__ __forceinline__ Groups(float* all_partial, float* all_weights, size_t pair, int num)
      : partial((float4*)all_partial + pair * num * SUMS), weights((float2*)all_weights + pair * num * SUMS), num(num) {}

  __device__ __forceinline__ void leave(int group, int at, const float4& v, float most, float sum) {
    partial[group * SUMS + at] = v;
    weights[group * SUMS + at] = make_float2(most, sum);
  }

  template <class Write>
  __device__ __forceinline__ void add_up(int rank, Write write) const {
    for (int at = rank * SHARE + threadIdx.x; at < (rank + 1) * SHARE; at += WARPS * 32) {
      float2 found[MAX_GROUPS];
      float4 parts[MAX_GROUPS];
#pragma unroll
      for (int i = 0; i < MAX_GROUPS; i++) {
        found[i] = i < num ? __ldcg(weights + i * SUMS + at) : make_float2(LOWEST, 0);
        parts[i] = i < num ? __ldcg(partial + i * SUMS + at) : make_float4(0, 0, 0, 0);
      }
      Shares::add_up_parts<MAX_GROUPS>(parts, found, [&](const float4& v, float, float sum) { write(at, v, sum); });
    }
  }
};

#endif
