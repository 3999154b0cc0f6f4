// Values that every rank can make of every rank, for all-reduces whose sums are checked where they are.
//
// A value is a whole number that depends on rank, call and place; sums of four are exact in every type.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u32 mixed(u32 x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// 16 bits hold sums up to 256 in bfloat16, float32 those up to 2^24.
template <int BYTES>
__device__ __forceinline__ int value(u32 rank, u32 call, u32 place) {
  const u32 bits = mixed(mixed(place + 0x9e3779b9u * call) ^ 0x85ebca6bu * (rank + 1));
  return BYTES == 2 ? (int)(bits % 127) - 63 : (int)(bits >> 10) - (1 << 21);
}

struct BFloat16 {
  typedef unsigned short Stored;
  static __device__ Stored store(float v) { return (Stored)(__float_as_uint(v) >> 16); }
  static __device__ float load(Stored v) { return __uint_as_float((u32)v << 16); }
};

struct Float16 {
  typedef unsigned short Stored;
  static __device__ Stored store(float v) {
    Stored result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(v));
    return result;
  }
  static __device__ float load(Stored v) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(v));
    return result;
  }
};

struct Float32 {
  typedef float Stored;
  static __device__ float store(float v) { return v; }
  static __device__ float load(float v) { return v; }
};

template <class Element>
__device__ void fill(typename Element::Stored* data, const u64* calls, int count, int call, int rank) {
  const u32 number = (u32)*calls + call;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    data[i] = Element::store((float)value<sizeof(typename Element::Stored)>(rank, number, i));
}

// Counts the elements that are not the sum in float64, and calls with any.
template <class Element>
__device__ void check(const typename Element::Stored* data, const u64* calls, u64* wrong, int count, int call) {
  const u32 number = (u32)*calls + call;
  u32 found = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    double sum = 0;
    for (int r = 0; r < WORLD; ++r) sum += value<sizeof(typename Element::Stored)>(r, number, i);
    found += !((double)Element::load(data[i]) == sum);
  }
  if (found) atomicAdd(wrong, (u64)found);
}

#define KERNELS(name, element)                                                                               \
  extern "C" __global__ void fill_##name(element::Stored* data, const u64* calls, int count, int call, int rank) { \
    fill<element>(data, calls, count, call, rank);                                                           \
  }                                                                                                          \
  extern "C" __global__ void check_##name(const element::Stored* data, const u64* calls, u64* wrong, int count,   \
                                          int call) {                                                        \
    check<element>(data, calls, wrong, count, call);                                                         \
  }

KERNELS(bfloat16, BFloat16)
KERNELS(float16, Float16)
KERNELS(float32, Float32)
