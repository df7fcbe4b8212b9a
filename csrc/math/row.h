// Rows of numbers on the CPU: largest, sum, softmax. Loops that compilers vectorise; nothing is allocated.
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"
#include "exp.h"

#if !defined(__CUDACC__)

namespace pywm::math {

// Partial results side by side, which fill a vector register. What a row's sum comes to depends on K alone.
constexpr int64_t kParts = 16;

// Partial results into one, by halves.
template <int64_t kCount, typename S, typename Combine>
PYWM_HD S fold(S* parts, const Combine& combine) {
  if constexpr (kCount == 1) {
    return parts[0];
  } else {
    S halves[kCount / 2];
    for (int64_t j = 0; j < kCount / 2; ++j) halves[j] = combine(parts[j], parts[j + kCount / 2]);
    return fold<kCount / 2>(halves, combine);
  }
}

// The largest of a row; -inf for none. A NaN may get lost here, but not in the sum of exponentials. More parts hide the
// latency of comparing where rows are long.
template <typename S, int64_t kParts = math::kParts>
PYWM_HD S row_max(const S* __restrict x, int64_t n) {
  S parts[kParts];
  for (int64_t j = 0; j < kParts; ++j) parts[j] = -S(INFINITY);
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] = x[i + j] > parts[j] ? x[i + j] : parts[j];
  for (int64_t j = 0; i + j < n; ++j) parts[j] = x[i + j] > parts[j] ? x[i + j] : parts[j];
  return fold<kParts>(parts, [](S a, S b) { return b > a ? b : a; });
}

// Sum of term(i) over [0, n).
template <typename S, typename Term>
PYWM_HD S row_sum(int64_t n, const Term& term) {
  S parts[kParts];
  for (int64_t j = 0; j < kParts; ++j) parts[j] = S(0);
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] += term(i + j);
  for (int64_t j = 0; i + j < n; ++j) parts[j] += term(i + j);
  return fold<kParts>(parts, [](S a, S b) { return a + b; });
}

template <typename S>
struct SoftmaxRow {
  S top, total;  // the largest logit, and the sum of exp(logit - top)
};

// softmax [K] of logits [K].
template <typename S>
PYWM_HD SoftmaxRow<S> softmax_row(const S* __restrict logits, S* __restrict softmax, int64_t K) {
  const S top = row_max(logits, K);
#pragma GCC ivdep
  for (int64_t k = 0; k < K; ++k) softmax[k] = exp(logits[k] - top);
  const S total = row_sum<S>(K, [&](int64_t k) { return softmax[k]; });
  const S inverse = S(1) / total;
#pragma GCC ivdep
  for (int64_t k = 0; k < K; ++k) softmax[k] *= inverse;
  return {top, total};
}

}  // namespace pywm::math

#endif
