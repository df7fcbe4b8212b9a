// Log-probability, entropy and their derivatives, for one class of a categorical or one part of a diagonal Gaussian.
#pragma once

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

// How the logits of a group normalise: their largest, and the logarithm of the sum of exp(logit - top). Kept apart, for
// their sum would swallow the logarithm where logits are large.
template <typename S>
struct LogTotal {
  S top, log_sum;
};

template <typename S>
PYWM_HD S categorical_log_prob(S logit, LogTotal<S> total) {
  return (logit - total.top) - total.log_sum;
}

// p·log p, 0 for a class that cannot occur (log p = -inf).
template <typename S>
PYWM_HD S plogp(S prob, S log_prob) {
  return prob > S(0) ? prob * log_prob : (prob == S(0) ? S(0) : prob);
}

// d(log p[action])/d(logit j) and d(entropy)/d(logit j).
template <typename S>
PYWM_HD S categorical_grad_log_prob(S prob, bool chosen) {
  return (chosen ? S(1) : S(0)) - prob;
}
template <typename S>
PYWM_HD S categorical_grad_entropy(S prob, S log_prob, S entropy) {
  return -(plogp(prob, log_prob) + prob * entropy);
}

constexpr double kHalfLog2Pi = 0.918938533204672742;

template <typename S>
struct GaussianPart {
  S log_prob, entropy;
  S grad_mean, grad_log_std;  // of log_prob; the entropy's derivative with respect to log_std is 1
};

template <typename S>
PYWM_HD GaussianPart<S> gaussian_part(S action, S mean, S log_std) {
  const S inverse_std = exp(-log_std);
  const S z = (action - mean) * inverse_std;
  return {S(-0.5) * z * z - log_std - S(kHalfLog2Pi), log_std + S(0.5) + S(kHalfLog2Pi), z * inverse_std, z * z - S(1)};
}

}  // namespace pywm::math
