// Do lines of 16 bytes in host memory come whole? One half of a card's blocks writes lines whose four words are the same
// number, over and over with the next one; the other half reads those of another card meanwhile and looks for mixed ones.

typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ void write_line(uint4* line, u32 number) {
  const u64 word = (u64)number << 32 | number;
  asm volatile("{\n.reg .b128 line;\nmov.b128 line, {%1, %1};\nst.relaxed.sys.global.b128 [%0], line;\n}" ::"l"(line),
               "l"(word)
               : "memory");
}

__device__ __forceinline__ void read_line(const uint4* line, u64& low, u64& high) {
  asm volatile("{\n.reg .b128 line;\nld.relaxed.sys.global.b128 line, [%2];\nmov.b128 {%0, %1}, line;\n}"
               : "=l"(low), "=l"(high) : "l"(line) : "memory");
}

// counts: lines read, lines found with a new number, words of 8 bytes mixed, lines mixed, threads that gave up.
extern "C" __global__ void write_and_read(uint4* own, const uint4* other, u64* counts, int rounds, int most_reads) {
  const int half = gridDim.x / 2, line = blockIdx.x % half * blockDim.x + threadIdx.x;
  if ((int)blockIdx.x < half) {
    for (int n = 1; n <= rounds; ++n) write_line(own + line, (u32)n);
    return;
  }
  u64 reads = 0, news = 0, words = 0, lines = 0, before = 0;
  for (bool last = false; !last && reads < (u64)most_reads; ++reads) {
    u64 low, high;
    read_line(other + line, low, high);
    news += low != before;
    words += (u32)low != (u32)(low >> 32);
    words += (u32)high != (u32)(high >> 32);
    lines += low != high;
    before = low;
    last = (u32)low == (u32)rounds;
  }
  atomicAdd(counts + 0, reads);
  atomicAdd(counts + 1, news);
  atomicAdd(counts + 2, words);
  atomicAdd(counts + 3, lines);
  atomicAdd(counts + 4, (u64)((u32)before != (u32)rounds));
}
