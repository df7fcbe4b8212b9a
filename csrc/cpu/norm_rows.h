// A row's mean and deviation, and the two means that its derivative needs.
// Included by kernel sources only; everything has internal linkage (see kernels.h).
#pragma once

#include <cstdint>

#include "../math/norm.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// The sum of term(i) over [0, n), in as many partial sums as keep the adders busy: a compiler may not reorder it.
template <typename S, typename Term>
inline S sum_of(int64_t n, const Term& term) {
  constexpr int64_t kParts = 256 / sizeof(S);
  S parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] += term(i + j);
  for (int64_t j = 0; i < n; ++i, ++j) parts[j] += term(i);
  for (int64_t half = kParts / 2; half > 0; half /= 2)
    for (int64_t j = 0; j < half; ++j) parts[j] += parts[j + half];
  return parts[0];
}

template <typename S>
inline math::NormRow<S> norm_row(const S* x, int64_t D, bool layer, S eps) {
  const S mean = layer ? sum_of<S>(D, [&](int64_t i) { return x[i]; }) / S(D) : S(0);
  const S squares = sum_of<S>(D, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return math::norm_row(mean, squares / S(D), eps);
}

// grad_x := the gradient of x; q, the gradient of scale·x̂ + shift, may stand in the same place.
template <typename S>
inline void norm_row_backward(const S* x, const S* q, const S* scale, math::NormRow<S> row, bool layer, int64_t D,
                              S* grad_x) {
  const S mean_d = layer ? sum_of<S>(D, [&](int64_t i) { return scale[i] * q[i]; }) / S(D) : S(0);
  const S mean_d_hat = sum_of<S>(D, [&](int64_t i) { return scale[i] * q[i] * math::norm_hat(x[i], row); }) / S(D);
#pragma GCC ivdep
  for (int64_t i = 0; i < D; ++i)
    grad_x[i] = math::norm_grad(scale[i] * q[i], math::norm_hat(x[i], row), mean_d, mean_d_hat, row.inverse_std);
}

// What a block of rows contributes to the gradients of scale and shift, and a row of its own to compute in.
template <typename S>
struct NormSums {
  S *scale, *shift, *row;

  // Without `partial`, all of them are null.
  NormSums(S* partial, int64_t D) : scale(partial), shift(partial), row(partial) {
    if (!partial) return;
    shift += D;
    row += 2 * D;
    for (int64_t i = 0; i < 2 * D; ++i) partial[i] = S(0);
  }
  void add(const S* x, const S* q, math::NormRow<S> stats, int64_t D) {
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i) {
      scale[i] += q[i] * math::norm_hat(x[i], stats);
      shift[i] += q[i];
    }
  }
};

}  // namespace
}  // namespace pywm::cpu::PYWM_ISA
