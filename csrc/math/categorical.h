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
#include "row.h"

namespace pywm::math {

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

// One class of a group of KL(q || p): its share of the sum, and what its gradients are made of. Where nothing is mixed
// in, the logarithms come from log-softmaxes, for the ratio of two tiny probabilities says nothing; elsewhere `log_q`
// and `log_p` are not looked at.
template <typename S>
struct KlClass {
  S q, log_ratio;  // log(q/p)
  S slope;         // d(log p)/d(softmax of p), times that softmax
};
template <bool kMixed, typename S>
PYWM_HD KlClass<S> kl_class(S softmax_q, S softmax_p, S log_q, S log_p, Unimix<S> mix) {
  if constexpr (!kMixed) return {softmax_q, log_q - log_p, S(1)};
  const S q = unimix_prob(softmax_q, mix), p = unimix_prob(softmax_p, mix);
  return {q, log_of(q / p), mix.keep * softmax_p / p};
}

// d(KL)/d(logit) of the prior: `total` is the sum of q·slope over the group.
template <typename S>
PYWM_HD S kl_grad_prior(S softmax_p, const KlClass<S>& c, S total) {
  return softmax_p * total - c.q * c.slope;
}

// ---- rows, for the CPU: K numbers side by side, nothing allocated ---------------------------------------------------

#if !defined(__CUDACC__)

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
