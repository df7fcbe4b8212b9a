// Diagonal Gaussians of latent states: standard deviations from raw numbers, and KL divergence. See
// pywm/ops/gaussian.py.
#pragma once

#include "../macros.h"
#include "activations.h"
#include "exp.h"

namespace pywm::math {

// log(1 + exp(x)), accurate to the last digits where it is small too.
template <typename S>
PYWM_HD S softplus(S x) {
  const S e = exp(x > S(0) ? -x : x);  // in (0, 1]
  const S u = S(1) + e;
  const S log1p = log_of(u) + (e - (u - S(1))) / u;  // what rounding u lost
  return x > S(0) ? x + log1p : log1p;
}

// A standard deviation, without the smallest one, and its slope.
template <typename S>
PYWM_HD S gaussian_std(S raw, bool sigmoid2) {
  return sigmoid2 ? S(2) * sigmoid(S(0.5) * raw) : softplus(raw);
}
template <typename S>
PYWM_HD S gaussian_std_slope(S raw, bool sigmoid2) {
  const S s = sigmoid(sigmoid2 ? S(0.5) * raw : raw);
  return sigmoid2 ? s * (S(1) - s) : s;
}

// One part of KL(q || p), and its derivatives.
template <typename S>
PYWM_HD S gaussian_kl_part(S mean_q, S std_q, S mean_p, S std_p) {
  const S inverse = S(1) / std_p;
  const S ratio = std_q * inverse, z = (mean_q - mean_p) * inverse;
  return S(0.5) * (ratio * ratio + z * z - S(1)) - log_of(ratio);
}

template <typename S>
struct GaussianKlGrad {
  S mean_q, std_q, mean_p, std_p;
};
template <typename S>
PYWM_HD GaussianKlGrad<S> gaussian_kl_grad(S grad, S mean_q, S std_q, S mean_p, S std_p) {
  const S inverse = S(1) / std_p;
  const S ratio = std_q * inverse, z = (mean_q - mean_p) * inverse;
  const S mean = grad * z * inverse;
  return {mean, grad * (ratio * inverse - S(1) / std_q), -mean, grad * inverse * (S(1) - ratio * ratio - z * z)};
}

}  // namespace pywm::math
