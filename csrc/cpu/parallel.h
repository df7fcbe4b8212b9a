// Work sharing on torch's own thread pool. Nothing here links OpenMP; see parallel.cpp.
#pragma once

#include <cstdint>

namespace pywm::cpu {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Run fn over [0, n) in contiguous pieces whose borders are multiples of `step`. One piece, in the calling thread,
// unless `work` (elements touched) is worth a fork and join, and torch.get_num_threads() allows more.
void parallel_for(int64_t n, int64_t step, int64_t work, void* context, RangeFn fn);

// How many threads a large call would use now.
int num_threads();

}  // namespace pywm::cpu
