// Groups of K classes with a share of uniform probability: p = (1 - unimix)·softmax(logits) + unimix/K; sampling by
// inverse CDF, the straight-through gradient, and KL divergence. See pywm/ops/categorical_sample.py and kl_balance.py.
//
// Elements for every backend, and whole rows for the CPU. The CDF is summed one class after the other, k = 0, 1, ...,
// in the tensor's dtype, in all backends: the same probabilities give the same sample everywhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

// Classes that an index of one byte can tell apart.
constexpr int64_t kMaxClasses = 256;

// 1 - unimix, and unimix/K.
template <typename S>
struct Unimix {
  S keep, floor;
};
template <typename S>
PYWM_HD Unimix<S> unimix_of(double unimix, int64_t K) {
  return {S(1 - unimix), S(unimix / static_cast<double>(K))};
}

template <typename S>
PYWM_HD S unimix_prob(S softmax, Unimix<S> mix) {
  return mix.keep * softmax + mix.floor;
}

// How a gradient passes through the unimix and the softmax: d/d(logit) for the class of probability `softmax`, whose
// p has the gradient `grad`; `mean` is the sum of softmax·grad over the group.
template <typename S>
PYWM_HD S unimix_softmax_grad(S softmax, S grad, S mean, Unimix<S> mix) {
  return mix.keep * softmax * (grad - mean);
}

// ---- rows, for the CPU: K numbers side by side, nothing allocated ---------------------------------------------------

#if !defined(__CUDACC__)

// Partial results side by side, which fill a vector register. What a row's sum comes to depends on K alone.
constexpr int64_t kParts = 16;

// The largest of a row; -inf for none. A NaN may get lost here, but not in the sum of exponentials.
template <typename S>
PYWM_HD S row_max(const S* __restrict x, int64_t n) {
  S parts[kParts];
  for (int64_t j = 0; j < kParts; ++j) parts[j] = -S(INFINITY);
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] = x[i + j] > parts[j] ? x[i + j] : parts[j];
  for (int64_t j = 0; i + j < n; ++j) parts[j] = x[i + j] > parts[j] ? x[i + j] : parts[j];
  for (int64_t width = kParts / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) parts[j] = parts[j + width] > parts[j] ? parts[j + width] : parts[j];
  return parts[0];
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
  for (int64_t width = kParts / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) parts[j] += parts[j + width];
  return parts[0];
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

// cdf [K] of probs [K]; returns their total.
template <typename S>
PYWM_HD S cdf_row(const S* probs, S* cdf, int64_t K) {
  S total = S(0);
  for (int64_t k = 0; k < K; ++k) cdf[k] = total += probs[k];
  return total;
}

// The class that a uniform number in [0, 1) chooses: how many k have cdf[k] <= uniform·total, at most K - 1. A class of
// probability 0 is never chosen. NaN chooses class 0.
template <typename S>
PYWM_HD int64_t inverse_cdf_row(const S* cdf, S total, S uniform, int64_t K) {
  const S threshold = uniform * total;
  int32_t below = 0;
  for (int64_t k = 0; k < K; ++k) below += cdf[k] <= threshold ? 1 : 0;
  return below < K ? below : K - 1;
}

// All of it: samples one group. `scratch` holds 2·K numbers; its first K are the softmax afterwards. Where the logits
// are NaN, so is `stoch`.
template <typename S>
PYWM_HD int64_t sample_row(const S* __restrict logits, S uniform, Unimix<S> mix, int64_t K, S* __restrict stoch,
                           S* __restrict scratch) {
  S* __restrict cdf = scratch + K;
  softmax_row(logits, scratch, K);
#pragma GCC ivdep
  for (int64_t k = 0; k < K; ++k) cdf[k] = unimix_prob(scratch[k], mix);
  const S total = cdf_row(cdf, cdf, K);
  const int64_t index = inverse_cdf_row(cdf, total, uniform, K);
  const S zero = total - total, one = S(1) + zero;
#pragma GCC ivdep
  for (int64_t k = 0; k < K; ++k) stoch[k] = zero;
  stoch[index] = one;
  return index;
}

#endif

}  // namespace pywm::math
