// A block's threads in turns on one of the CPU's: each goes on until it waits for others. Who is next is drawn, so that
// what is read before all have met is now and then not there yet.
#undef _FORTIFY_SOURCE  // Its longjmp does not leave a stack for another.
#include <setjmp.h>
#include <ucontext.h>

#include <cstdlib>
#include <utility>
#include <vector>

namespace fibers {

static const size_t STACK_BYTES = 256 * 1024;
struct Fiber {
  // Not written here, so that what no kernel uses takes no memory.
  char* stack = new char[STACK_BYTES];
  ucontext_t start;
  jmp_buf place;
  bool has_begun;
};
static std::vector<Fiber> all;
// Of those that have not ended; drawn anew when all have had a turn.
static std::vector<int> order;
static size_t turn;
static int running, turns_in_vain;
static jmp_buf home;
static void (*function)(const void*, int);
static const void* captured;
static unsigned drawn = 1;

inline void draw_order() {
  for (size_t left = order.size(); left > 1; left--) {
    drawn = drawn * 1664525u + 1013904223u;
    std::swap(order[left - 1], order[(drawn >> 8) % left]);
  }
  turn = 0;
}

[[noreturn]] inline void enter_next() {
  if (order.empty()) _longjmp(home, 1);
  if (++turn >= order.size()) draw_order();
  Fiber& next = all[running = order[turn]];
  if (next.has_begun) _longjmp(next.place, 1);
  next.has_begun = true;
  setcontext(&next.start);
  abort();
}
inline void run_one() {
  function(captured, running);
  turns_in_vain = 0;
  order.erase(order.begin() + turn--);
  enter_next();
}
// Others write while it waits, which the compiler cannot see.
__attribute__((noipa)) inline void give_way() {
  if (!_setjmp(all[running].place)) enter_next();
}
// Aborts where all wait for one another.
template <class Condition> inline void wait_until(Condition is_true) {
  for (; !is_true(); give_way())
    if (turns_in_vain++ > 2 * (int)order.size()) abort();
  turns_in_vain = 0;
}

// Calls it with each number from 0 on; returns when all have ended.
template <class Function> inline void run(int count, const Function& called) {
  if ((int)all.size() < count) all.resize(count);
  function = [](const void* called, int number) { (*(const Function*)called)(number); };
  captured = &called;
  for (int i = 0; i < count; i++) {
    Fiber& each = all[i];
    each.has_begun = false;
    getcontext(&each.start);
    each.start.uc_stack.ss_sp = each.stack;
    each.start.uc_stack.ss_size = STACK_BYTES;
    makecontext(&each.start, run_one, 0);
    order.push_back(i);
  }
  turn = count;
  if (!_setjmp(home)) enter_next();
}

struct Barrier {
  int threads, here = 0, met = 0;
  explicit Barrier(int threads) : threads(threads) {}
  void meet() {
    const int before = met;
    if (++here == threads) here = 0, met++;
    wait_until([&] { return met != before; });
  }
};

}  // namespace fibers
