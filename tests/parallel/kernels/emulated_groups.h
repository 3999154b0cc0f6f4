// parallel/kernels/bulk_copies.cuh and wgmma.cuh, on fibers. Copies and products are done as early or as late as
// they may be: when they are asked for, or when somebody waits for them.
#define BULK_COPIES_CUH
#define WGMMA_CUH

#include <map>

#define __grid_constant__
#undef shared_address
#define shared_address(memory) ((u32)((const unsigned char*)(memory) - dynamic_shared))

// A tensor of bytes, and the boxes that are copied of it.
struct TensorMap {
  const unsigned char* from;
  long rows, row_bytes;
  int box_rows, box_bytes, element_bytes;
  bool is_swapped;
};
inline TensorMap describe(const void* from, long rows, long row_bytes, int box_rows, int box_bytes, int element_bytes, bool swapped) {
  return {(const unsigned char*)from, rows, row_bytes, box_rows, box_bytes, element_bytes, swapped};
}

struct BoxCopy { u32 to; TensorMap map; int x, y; };
struct Phases { int expected, pending; long bytes; u32 phase; std::vector<BoxCopy> copies; };
static std::map<u32, Phases> phases;

inline u32 swapped_place(u32 at) { return at ^ (at >> 7 & 7) << 4; }
inline void settle(Phases& each) {
  if (each.pending || each.bytes) return;
  each.phase++;
  each.pending = each.expected;
}
inline void land(Phases& each) {
  for (const BoxCopy& copy : each.copies) {
    const TensorMap& map = copy.map;
    if (copy.to % (map.is_swapped ? 1024 : 128)) abort();
    for (int r = 0; r < map.box_rows; r++)
      for (int i = 0; i < map.box_bytes; i++) {
        const long column = (long)copy.x * map.element_bytes + i, row = copy.y + r;
        const u32 at = copy.to + r * map.box_bytes + i;
        dynamic_shared[map.is_swapped ? swapped_place(at) : at] =
            row < map.rows && column < map.row_bytes ? map.from[row * map.row_bytes + column] : 0;
      }
    each.bytes -= map.box_rows * map.box_bytes;
  }
  if (each.copies.empty()) return;
  each.copies.clear();
  settle(each);
}
inline void open_barrier(u32 barrier, int arrivals) { phases[barrier] = {arrivals, arrivals, 0, 0, {}}; }
inline void show_barriers() {}
inline void arrive_and_announce(u32 barrier, int bytes) {
  Phases& each = phases.at(barrier);
  if (each.pending-- <= 0) abort();
  each.bytes += bytes;
  settle(each);
}
inline void arrive_at(u32 barrier) { arrive_and_announce(barrier, 0); }
inline void await_phase(u32 barrier, u32 parity) {
  Phases& each = phases.at(barrier);
  fibers::wait_until([&] {
    if ((each.phase & 1) == parity) land(each);
    return (each.phase & 1) != parity;
  });
}
inline void copy_box(u32 shared, const TensorMap* map, int x, int y, u32 barrier) {
  Phases& each = phases.at(barrier);
  each.copies.push_back({shared, *map, x, y});
  if (is_early) land(each);
}

// Of the only threads that meet so.
static Barrier& meeting_of(int threads) {
  static Barrier meeting(threads);
  return meeting;
}
static int said;
template <int threads> inline void meet_threads() { meeting_of(threads).meet(); }
template <int threads> inline bool any_thread(bool mine) {
  meet_threads<threads>();
  said = 0;
  meet_threads<threads>();
  if (mine) said = 1;
  meet_threads<threads>();
  return said;
}
template <int registers> inline void give_registers() {}
template <int registers> inline void take_registers() {}

inline u32 __shfl_xor_sync(u32 mask, u32 value, int lanes) { return __shfl_sync(mask, value, own_lane() ^ lanes); }
inline u32 transpose_pairs(u32 pair) {
  Warp& warp = own_warp();
  warp.word[own_lane()] = pair;
  warp.meet();
  const int g = own_lane() / 4, c = own_lane() % 4;
  u32 found = 0;
  for (int i = 0; i < 2; i++) found |= (warp.word[(2 * c + i) * 4 + g / 2] >> g % 2 * 16 & 0xffff) << 16 * i;
  warp.meet();
  return found;
}

inline void multiply_now(const Product& product) {
  Warp& warp = own_warp();
  memcpy(warp.a[own_lane()], product.weights, 16);
  warp.meet();
  for (int i = 0; i < 4 * NT; i++) {
    const int row = own_lane() / 4 + i % 4 / 2 * 8, token = i / 4 * 8 + own_lane() % 4 * 2 + i % 2;
    double sum = product.sums[i / 4][i % 4];
    for (int k = 0; k < 16; k++) {
      const u32 weight = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> k % 2 * 16 & 0xffff;
      const unsigned char* at = dynamic_shared + swapped_place(product.tokens + token * 128 + k * 2);
      sum += (double)from_bf16(weight) * from_bf16(*(const unsigned short*)at);
    }
    product.sums[i / 4][i % 4] = sum;
  }
  warp.meet();
}
inline u32 describe_tokens(u32 address) { return address >> 4; }
inline void start_products() {}
inline void multiply_tokens(float (&sums)[NT][4], const u32 (&weights)[4], u32 tokens) {
  const Product product{sums, weights, tokens << 4};
  if (is_early) multiply_now(product);
  else this_thread().asked.push_back(product);
}
inline void commit_products() { commit(this_thread().asked, this_thread().under_way); }
template <int pending> inline void await_products() {
  for (auto& under_way = this_thread().under_way; (int)under_way.size() > pending; under_way.pop_front())
    for (const Product& product : under_way.front()) multiply_now(product);
}
template <class T> inline void hold(T&) {}
