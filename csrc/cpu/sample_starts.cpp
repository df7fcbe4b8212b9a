// Which rows of stored rollouts an imagined one can start from, on the CPU. See pywm/ops/sample_starts.py.
//
// What: marks of cells [begin, end) of [T, N], and how many are set; dispatch.cpp counts and draws by them.
// Layout: masks [T, N], bytes.
// Mapping: one thread; cells side by side, for the vector units, mask by mask.
// Cost: reads a byte of is_first for each row of a stack, of is_last once, and of valid, where there is one, like
//   is_first.
// Numerics: none.
// Source: Kaiser et al. (2020).

#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

int64_t mark_starts(const StartMasks& a, bool beginnings, int64_t begin, int64_t end, uint8_t* __restrict marks) {
  const int64_t n = end - begin, early = (a.stack - 1) * a.N - begin;
  const int64_t from = beginnings || early < 0 ? 0 : (early < n ? early : n);
  for (int64_t i = 0; i < from; ++i) marks[i] = 0;
  for (int64_t i = from; i < n; ++i) marks[i] = 1;
  const auto require = [&](const uint8_t* __restrict mask, bool value, int64_t back) {
    for (int64_t i = from; i < n; ++i) marks[i] &= (mask[begin - back * a.N + i] != 0) == value;
  };
  if (a.is_last) require(a.is_last, false, 0);
  if (a.valid) require(a.valid, true, 0);
  if (beginnings) require(a.is_first, true, 0);
  for (int64_t j = 0; j < a.stack - 1 && !beginnings; ++j) {
    require(a.is_first, false, j);
    if (a.valid) require(a.valid, true, j + 1);
  }
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += marks[i];
  return count;
}

}  // namespace

void fill_sample_starts(Kernels& table) { table.mark_starts = mark_starts; }

}  // namespace pywm::cpu::PYWM_ISA
