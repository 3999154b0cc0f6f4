// Do lines of 16 bytes in host memory come whole? For some time one half of a card's blocks writes lines whose four words
// are the same number, over and over with the next one; the other half reads those of another card meanwhile and looks
// for mixed ones. Time ends it and not a number of writes: how fast lines go that are read as they are written is the
// host's affair, and nothing here waits for another card.

typedef unsigned int u32;
typedef unsigned long long u64;

// Looking at the clock takes as long as some writes.
#define WRITES_PER_LOOK 16

__device__ __forceinline__ u64 now_ns() {
  u64 time;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
  return time;
}

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

// counts: lines read, lines found with a new number, lines mixed.
extern "C" __global__ void write_and_read(uint4* own, const uint4* other, u64* counts, int milliseconds) {
  const int half = gridDim.x / 2, line = blockIdx.x % half * blockDim.x + threadIdx.x;
  const u64 end = now_ns() + milliseconds * 1000000ull;
  if ((int)blockIdx.x < half) {
    for (u32 number = 1; number % WRITES_PER_LOOK != 1 || now_ns() < end; ++number) write_line(own + line, number);
    return;
  }
  u64 reads = 0, news = 0, mixed = 0, before = 0;
  for (; now_ns() < end; ++reads) {
    u64 low, high;
    read_line(other + line, low, high);
    news += low != before;
    mixed += low != high || (u32)low != (u32)(low >> 32);
    before = low;
  }
  atomicAdd(counts + 0, reads);
  atomicAdd(counts + 1, news);
  atomicAdd(counts + 2, mixed);
}
