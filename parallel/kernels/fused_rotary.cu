// Queries and keys of merged q/k/v rows, normed where there are norms, and rotated; keys and values into pages.
//
// A group of lanes takes one head of one token. A lane holds 8 numbers of the first half of the head and the 8 of the
// second half that they rotate with.
//
// Defined by the host: HEAD_DIM (a multiple of 16, up to 256), PAGE_SIZE (tokens), E4M3 (1: pages hold e4m3, 0: bf16).

#include "device.cuh"

typedef long long i64;

constexpr int LANES = HEAD_DIM / 16;
// Groups of a power of two: lanes of one exchange their sums.
constexpr int GROUP = LANES <= 4 ? 4 : LANES <= 8 ? 8 : 16;
constexpr int THREADS = 128;

__device__ __forceinline__ void unpack8(const uint4& v, float* x) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = low(words[i]), x[2 * i + 1] = high(words[i]);
}

__device__ __forceinline__ uint4 pack8(const float* x) {
  return make_uint4(to_pair(x[0], x[1]), to_pair(x[2], x[3]), to_pair(x[4], x[5]), to_pair(x[6], x[7]));
}

// To the nearest, ties to even, beyond 448 to 448; only what is no number stays none. By integers: cards before sm_89
// have no instruction for it.
__device__ __forceinline__ u32 to_e4m3(float value) {
  const u32 bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
  const float size = fminf(fabsf(value), 448.0f);
  const u32 wide = __float_as_uint(size);
  // Below 2**-6 the step is 2**-9, which is the last bit of numbers from 2**14 on.
  const u32 small = __float_as_uint(size + 16384.0f) - 0x46800000u;
  const u32 normal = ((wide + 0x7ffffu + (wide >> 20 & 1u)) >> 20) - (120u << 3);
  const u32 code = value != value ? 0x7fu : size < 0.015625f ? small : normal;
  return sign | code;
}

__device__ __forceinline__ u32 four_e4m3(const float* x) {
  return to_e4m3(x[0]) | to_e4m3(x[1]) << 8 | to_e4m3(x[2]) << 16 | to_e4m3(x[3]) << 24;
}

__device__ __forceinline__ void store8(void* pages, i64 at, const float* x) {
#if E4M3
  *(uint2*)((unsigned char*)pages + at) = make_uint2(four_e4m3(x), four_e4m3(x + 4));
#else
  *(uint4*)((unsigned short*)pages + at) = pack8(x);
#endif
}

__device__ __forceinline__ float sum_group(float value) {
#pragma unroll
  for (int step = GROUP / 2; step; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

// bf16(x * factor) * weight, rounded, as transformers' norm does.
__device__ __forceinline__ void scale8(float* x, float factor, const uint4& weight) {
  float w[8];
  unpack8(weight, w);
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    const u32 normed = to_pair(x[i] * factor, x[i + 1] * factor);
    const u32 scaled = to_pair(low(normed) * w[i], high(normed) * w[i + 1]);
    x[i] = low(scaled), x[i + 1] = high(scaled);
  }
}

__device__ __forceinline__ void load8(const float4* table, float* x) {
  const float4 a = __ldg(table), b = __ldg(table + 1);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

// row_stride in pieces of 16 bytes, page strides in numbers. q_norm and k_norm may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
rotary_and_cache(const uint4* __restrict__ qkv, const float4* __restrict__ cos, const float4* __restrict__ sin,
                 const i64* __restrict__ positions, const i64* __restrict__ slots, void* __restrict__ key_pages,
                 void* __restrict__ value_pages, uint4* __restrict__ query, const uint4* __restrict__ q_norm,
                 const uint4* __restrict__ k_norm, i64 key_stride, i64 value_stride, int row_stride, int heads,
                 int kv_heads, float eps) {
  wait_for_predecessors();
  let_successor_start();
  const size_t token = blockIdx.x;
  const int unit = blockIdx.y * (THREADS / GROUP) + threadIdx.x / GROUP, lane = threadIdx.x % GROUP;
  const bool works = unit < heads + 2 * kv_heads && lane < LANES;
  const bool is_query = unit < heads, is_value = unit >= heads + kv_heads;
  const i64 position = load_fresh(positions + token), slot = load_fresh(slots + token);

  float first[8] = {}, second[8] = {};
  if (works) {
    const uint4* from = qkv + token * row_stride + unit * (2 * LANES) + lane;
    unpack8(load_fresh(from), first);
    unpack8(load_fresh(from + LANES), second);
  }
  if (q_norm || k_norm) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) sum += first[i] * first[i] + second[i] * second[i];
    const float factor = rsqrtf(sum_group(sum) / HEAD_DIM + eps);
    const uint4* norm = is_query ? q_norm : is_value ? 0 : k_norm;
    if (works && norm) {
      scale8(first, factor, __ldg(norm + lane));
      scale8(second, factor, __ldg(norm + lane + LANES));
    }
  }
  if (!works) return;

  if (!is_value) {
    float c[8], s[8];
    load8(cos + position * (2 * LANES) + lane * 2, c);
    load8(sin + position * (2 * LANES) + lane * 2, s);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float a = first[i], b = second[i];
      first[i] = a * c[i] - b * s[i];
      second[i] = b * c[i] + a * s[i];
    }
  }
  if (is_query) {
    uint4* to = query + (token * heads + unit) * (2 * LANES) + lane;
    to[0] = pack8(first);
    to[LANES] = pack8(second);
    return;
  }
  const u32 page = (u32)slot / PAGE_SIZE, offset = (u32)slot % PAGE_SIZE;
  const int head = unit - heads - (is_value ? kv_heads : 0);
  void* pages = is_value ? value_pages : key_pages;
  const i64 at = page * (is_value ? value_stride : key_stride) + (i64)(head * PAGE_SIZE + offset) * HEAD_DIM + lane * 8;
  store8(pages, at, first);
  store8(pages, at + HEAD_DIM / 2, second);
}
