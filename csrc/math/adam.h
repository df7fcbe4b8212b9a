// Adam's step for one parameter; see pywm/ops/adam_step.py.
#pragma once

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

// What a step's numbers come to, the same for all parameters.
template <typename S>
struct AdamFactors {
  S grad_scale;           // min(1, max_grad_norm/(norm + 1e-6))
  S rate1, beta2, rate2;  // 1 - β₁, β₂, 1 - β₂
  S inverse_sqrt_bias2;   // 1/√(1 - β₂ᵏ)
  S step_size, eps;       // lr/(1 - β₁ᵏ)
};

template <typename S>
struct AdamState {
  S param, exp_avg, exp_avg_sq;
};

template <typename S>
PYWM_HD AdamState<S> adam_step(S param, S grad, S exp_avg, S exp_avg_sq, const AdamFactors<S>& f) {
  const S g = grad * f.grad_scale;
  const S m = exp_avg + f.rate1 * (g - exp_avg);
  const S v = f.beta2 * exp_avg_sq + f.rate2 * g * g;
  const S denominator = sqrt(v) * f.inverse_sqrt_bias2 + f.eps;
  return {param - f.step_size * m / denominator, m, v};
}

}  // namespace pywm::math
