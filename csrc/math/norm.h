// Normalisation of a row: x̂ = (x - μ)·ι, y = γ·x̂ + β, and its derivative; see pywm/ops/norm_act.py.
//
// RMS:   μ = 0,       ι = (mean(x²) + ε)^(-1/2)
// layer: μ = mean(x), ι = (mean((x - μ)²) + ε)^(-1/2)
// The means are the kernels' business, for how a row is added up is theirs.
#pragma once

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

template <typename S>
struct NormRow {
  S mean, inverse_std;
};

// From the mean square of what remains after the mean was taken off.
template <typename S>
PYWM_HD NormRow<S> norm_row(S mean, S mean_square, S eps) {
  return {mean, S(1) / sqrt(mean_square + eps)};
}

template <typename S>
PYWM_HD S norm_hat(S x, NormRow<S> row) {
  return (x - row.mean) * row.inverse_std;
}

// Derivative with respect to x, from d = γ·grad, where `mean_d` is its mean over the row (0 for RMS, whose μ does not
// depend on x) and `mean_d_hat` that of d·x̂.
template <typename S>
PYWM_HD S norm_grad(S d, S hat, S mean_d, S mean_d_hat, S inverse_std) {
  return inverse_std * (d - mean_d - hat * mean_d_hat);
}

}  // namespace pywm::math
