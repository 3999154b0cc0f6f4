// Lines of 16 bytes in host memory that come whole, data and flag in one access: "CUDA runtime requires that 1-byte,
// 2-byte, 4-byte, 8-byte, and 16-byte naturally aligned loads and stores to host memory initiated from the device are
// preserved as single accesses from the point of view of the host and other devices" (CUDA Programming Guide, Mapped
// Memory). Whoever includes it has u64.

__device__ __forceinline__ void write_line(uint4* line, uint4 v) {
  asm volatile("{\n.reg .b128 line;\nmov.b128 line, {%1, %2};\nst.relaxed.sys.global.b128 [%0], line;\n}" ::"l"(line),
               "l"((u64)v.y << 32 | v.x), "l"((u64)v.w << 32 | v.z)
               : "memory");
}

__device__ __forceinline__ uint4 read_line(const uint4* line) {
  u64 low, high;
  asm volatile("{\n.reg .b128 line;\nld.relaxed.sys.global.b128 line, [%2];\nmov.b128 {%0, %1}, line;\n}"
               : "=l"(low), "=l"(high) : "l"(line) : "memory");
  return make_uint4((u32)low, (u32)(low >> 32), (u32)high, (u32)(high >> 32));
}
