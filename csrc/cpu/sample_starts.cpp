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

// Take the marks from cells [from, n) whose mask, from `at` on, is not kWanted.
template <bool kWanted>
void keep(const uint8_t* __restrict mask, int64_t at, int64_t from, int64_t n, uint8_t* __restrict marks) {
  for (int64_t i = from; i < n; ++i) marks[i] = (mask[at + i] != 0) == kWanted ? marks[i] : 0;
}

int64_t mark_starts(const StartMasks& a, bool beginnings, int64_t begin, int64_t end, uint8_t* __restrict marks) {
  const int64_t n = end - begin, early = (a.stack - 1) * a.N - begin;
  const int64_t from = beginnings || early < 0 ? 0 : (early < n ? early : n);
  for (int64_t i = 0; i < from; ++i) marks[i] = 0;
  for (int64_t i = from; i < n; ++i) marks[i] = 1;
  for (int64_t j = 0; j < (beginnings ? 1 : a.stack); ++j) {
    const int64_t at = begin - j * a.N;  // row t - j
    if (j == 0 && a.is_last) keep<false>(a.is_last, at, from, n, marks);
    if (a.valid) keep<true>(a.valid, at, from, n, marks);
    if (beginnings)
      keep<true>(a.is_first, at, from, n, marks);
    else if (j < a.stack - 1)
      keep<false>(a.is_first, at, from, n, marks);
  }
  int64_t count = 0;
  for (int64_t i = from; i < n; ++i) count += marks[i];
  return count;
}

}  // namespace

void fill_sample_starts(Kernels& table) { table.mark_starts = mark_starts; }

}  // namespace pywm::cpu::PYWM_ISA
