// LaProp's step for one parameter, adaptive gradient clipping for one tensor; see pywm/ops/laprop_step.py.
#pragma once

#include "../macros.h"
#include "bfloat16.h"
#include "exp.h"

namespace pywm::math {

// What a step's numbers come to, the same for all parameters.
template <typename S>
struct LaPropFactors {
  S rate1, beta2, rate2;  // 1 - β₁, β₂, 1 - β₂
  S inverse_sqrt_bias2;   // 1/√(1 - β₂ᵏ)
  S step_size, eps;       // lr/(1 - β₁ᵏ)
  S slow_rate;
};

template <typename S>
struct LaPropState {
  S param, exp_avg, exp_avg_sq;
};

// The factor of a tensor's gradient, 1/max(1, ‖g‖/(clip·max(min_norm, ‖θ‖))), from the squares of the norms. clip < 0
// does not clip; where the limit is zero, no gradient comes through.
PYWM_HD double agc_scale(double grad_sq, double param_sq, double clip, double min_norm) {
  if (clip < 0) return 1;
  const double norm = sqrt(param_sq), limit = clip * (norm > min_norm ? norm : min_norm), size = sqrt(grad_sq);
  return size > limit ? limit / size : 1;
}

template <typename S>
PYWM_HD LaPropState<S> laprop_step(S param, S grad, S exp_avg, S exp_avg_sq, S grad_scale, const LaPropFactors<S>& f) {
  const S g = grad * grad_scale;
  const S v = f.beta2 * exp_avg_sq + f.rate2 * g * g;
  const S normalised = g / (sqrt(v) * f.inverse_sqrt_bias2 + f.eps);
  const S m = exp_avg + f.rate1 * (normalised - exp_avg);
  return {param - f.step_size * m, m, v};
}

// What follows `param` slowly.
template <typename S>
PYWM_HD S laprop_follow(S slow, S param, const LaPropFactors<S>& f) {
  return slow + f.slow_rate * (param - slow);
}

// `param` as a bfloat16 number.
template <typename S>
PYWM_HD uint16_t laprop_round(S param) {
  return static_cast<uint16_t>(bfloat16_bits(static_cast<float>(param)) >> 16);
}

// The segment that element i lies in: the first that ends behind it. Whatever the offsets are, one in [0, segments).
PYWM_HD int64_t segment_of(const int64_t* offsets, int64_t segments, int64_t i) {
  int64_t low = 0, high = segments - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (offsets[middle + 1] > i)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

}  // namespace pywm::math
