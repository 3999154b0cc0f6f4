// How lanes swap packed weights for products by warp groups (wgmma.cuh), whose inputs keep their order: packed weights have
// them dealt by eights to the four lanes c of a row.

// The four lanes of a row give one another what they loaded of 32 inputs: each has eight in a row, and gets the inputs
// 2 * c, 2 * c + 1, 2 * c + 8 and 2 * c + 9 of both steps of 16. What is swapped is two inputs of rows g and g + 8: at 8
// bits a word, at 4 bits half of one. First lanes c and c ^ 2, then c and c ^ 1.
struct Swap {
  bool upper, odd;
  u32 kept, given, joined;

  __device__ __forceinline__ Swap() : upper(threadIdx.x & 2), odd(threadIdx.x & 1) {
#if BITS == 4
    // Bytes of a pair of inputs, which pairs alternate in words that are no codebook's.
    const u32 place = CODEBOOK ? 0x1010 : 0x2020, step = CODEBOOK ? 0x2222 : 0x1111;
    const u32 both = place + (upper ? 0x0044 : 0x4400);
    kept = both + odd * step;
    given = both + !odd * step;
    joined = (CODEBOOK ? 0x1010 : 0x1100) + (CODEBOOK ? (odd ? 0x0044 : 0x4400) : (odd ? 0x0404 : 0x4040));
#endif
  }

  // 64 inputs at 4 bits, 32 at 8.
  __device__ __forceinline__ void operator()(uint4& v) const {
    if (BITS == 4) {
      words(v.x, v.y);
      words(v.z, v.w);
    } else {
      pieces(v);
    }
  }

  // The words of both steps.
  __device__ __forceinline__ void words(u32& first, u32& second) const {
    const u32 mine = upper ? second : first;
    const u32 other = __shfl_xor_sync(~0u, upper ? first : second, 2);
    const u32 keeps = permute(mine, other, kept), gets = __shfl_xor_sync(~0u, permute(mine, other, given), 1);
    first = permute(keeps, gets, joined);
    second = permute(keeps, gets, joined + 0x2222);
  }

  // The 16 bytes that have both steps.
  __device__ __forceinline__ void pieces(uint4& v) const {
    const u32 r0 = __shfl_xor_sync(~0u, upper ? v.x : v.z, 2), r1 = __shfl_xor_sync(~0u, upper ? v.y : v.w, 2);
    const u32 a0 = upper ? r0 : v.x, a1 = upper ? r1 : v.y, b0 = upper ? v.z : r0, b1 = upper ? v.w : r1;
    const u32 a = odd ? a1 : a0, b = odd ? b1 : b0;
    const u32 c = __shfl_xor_sync(~0u, odd ? a0 : a1, 1), d = __shfl_xor_sync(~0u, odd ? b0 : b1, 1);
    v = odd ? make_uint4(c, a, d, b) : make_uint4(a, c, b, d);
  }
};
