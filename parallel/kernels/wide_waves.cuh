// How wide_wgmma.cu hands tiles of Y to its blocks: in waves, one to each. What is left of them is dealt in units, as in
// wide_tiles.cuh, so that parts of sums are written for a part of Y only.

// Units `first` to `stop` of a tile.
struct Run {
  int tile, first, stop;
};

// The work of this block: a tile of each of `num_waves`, then its share of those after them.
struct Waves {
  int num_waves;
  Deal rest;
  int wave = 0, work, end;

  __device__ __forceinline__ Waves(int num_tiles, int units, int num_rows, int num_waves, int sharing)
      : num_waves(num_waves),
        rest{units, (count_places(num_tiles, num_rows) - num_waves * (int)gridDim.x) * units, sharing},
        work(rest.begin(blockIdx.x)),
        end(rest.begin(blockIdx.x + 1)) {}
  __device__ __forceinline__ int total() const { return num_waves * rest.units + end - rest.begin(blockIdx.x); }
  // Of a tile, its number among those that are dealt.
  __device__ __forceinline__ int dealt(int tile) const { return tile - num_waves * (int)gridDim.x; }

  __device__ __forceinline__ bool next(Run& run) {
    if (wave < num_waves) {
      run = {wave++ * (int)gridDim.x + (int)blockIdx.x, 0, rest.units};
      return true;
    }
    if (work >= end) return false;
    const int index = work / rest.units, first = work % rest.units, stop = min(rest.units, first + end - work);
    run = {num_waves * (int)gridDim.x + index, first, stop};
    work += stop - first;
    return true;
  }
};
