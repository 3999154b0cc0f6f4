// What paged_attention.cu is made of: instructions that C++ has no name for, and arithmetic on small vectors.
//
// Defined by the host: QUERY_F16 and KV_FP8, as there.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define FULL 0xffffffffu
#define LOWEST __int_as_float(0xff800000)

// Copies BYTES, or writes zeros without reading.
template <int BYTES>
__device__ __forceinline__ void copy_async(const void* shared, const void* global, bool present) {
  const u32 to = (u32)__cvta_generic_to_shared(shared);
  const int size = present ? BYTES : 0;
  if (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The 8x8 matrix whose row g lies in lanes (g, 0..3), two elements each, transposed.
__device__ __forceinline__ u32 transpose(u32 pair) {
  u32 transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(pair));
  return transposed;
}

__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ u32 pack_f16(float low, float high) {
  u32 pair;
  asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}"
      : "=r"(pair) : "f"(low), "f"(high));
  return pair;
}

__device__ __forceinline__ void multiply(float* c, const u32* a, u32 b0, u32 b1) {
#if QUERY_F16 || KV_FP8
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four e4m3 numbers as two fp16 pairs, exactly.
__device__ __forceinline__ void unpack_e4m3(u32 four, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h;}"
      : "=r"(low), "=r"(high) : "r"(four));
#else
  // Exponent and mantissa moved into place are the number divided by 2**8; here NaN would read 480.
  const u32 pairs[2] = {__byte_perm(four, 0, 0x1404), __byte_perm(four, 0, 0x3424)};
  u32 moved[2];
  for (int i = 0; i < 2; i++) {
    moved[i] = (pairs[i] & 0x80008000u) | ((pairs[i] & 0x7f007f00u) >> 1);
    asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(moved[i]) : "r"(0x5c005c00u));
  }
  low = moved[0];
  high = moved[1];
#endif
}

__device__ __forceinline__ u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// A pair in the type that tensor cores multiply.
__device__ __forceinline__ u32 pack(float low, float high) {
  return QUERY_F16 || KV_FP8 ? pack_f16(low, high) : pack_bf16(low, high);
}

__device__ __forceinline__ uint2 pack_output(const float4& v) {
  if (QUERY_F16) return make_uint2(pack_f16(v.x, v.y), pack_f16(v.z, v.w));
  return make_uint2(pack_bf16(v.x, v.y), pack_bf16(v.z, v.w));
}

__device__ __forceinline__ float4 scaled(const float4& v, float by) {
  return make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
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
