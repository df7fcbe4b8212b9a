// Work sharing on torch's own thread pool. Nothing here links OpenMP; see parallel.cpp.
#pragma once

#include <cstdint>

#include "../macros.h"

namespace pywm::cpu {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Run fn over [0, n) in contiguous pieces whose borders are multiples of `step`. One piece, in the calling thread,
// unless `work` (elements touched) is worth a fork and join, and torch.get_num_threads() allows more.
void parallel_for(int64_t n, int64_t step, int64_t work, void* context, RangeFn fn);

// A member of a team of threads that goes through phases together.
struct Team {
  int64_t rank, size;
  void* barrier;

  // All members have done what comes before, and see it. A member that waits long gives its core away.
  PYWM_HD void sync() const {
    if (size > 1) wait(barrier, size);
  }
  // The next piece of work that nobody has taken; `counter` began at `size`, for piece `rank` is each member's own.
  static int64_t take(int64_t* counter);
  // This member's part of n items: [begin(n), end(n)).
  PYWM_HD int64_t begin(int64_t n) const { return n * rank / size; }
  PYWM_HD int64_t end(int64_t n) const { return n * (rank + 1) / size; }

 private:
  static void wait(void* barrier, int64_t size);
};

// Run fn once on each member of a team of `members` threads at most, all at the same time. `size` is what the region
// got.
using TeamFn = void (*)(void* context, const Team& team);
void run_team(int64_t members, void* context, TeamFn fn);

// The same for work of less than a millisecond: of one member, unless the last such work ended so recently that the
// threads still look for more. To wake them takes 50 µs, and 4 to 8 ms on systems that put them on the core of whoever
// woke them, where they wait until the next tick.
void run_short_team(int64_t members, void* context, TeamFn fn);

// How many threads a large call would use now.
int num_threads();

}  // namespace pywm::cpu
