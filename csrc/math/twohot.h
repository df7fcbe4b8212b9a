// Two-hot regression over bins that are evenly spaced under symlog; see pywm/ops/symexp_twohot.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"

namespace pywm::math {

constexpr double kSymexpRange = 20;  // bins from symexp(-20) to symexp(20)

// Bin i of B, B odd: symexp of the i-th of B numbers evenly spaced over [-20, 20]. Antisymmetric, the middle exactly 0.
template <typename S>
PYWM_HD S symexp_bin(int64_t i, int64_t B) {
  const int64_t middle = (B - 1) / 2, distance = i < middle ? middle - i : i - middle;
  const S size = S(::expm1(kSymexpRange * static_cast<double>(distance) / static_cast<double>(middle)));
  return i < middle ? -size : size;
}

// The two bins around a target, and its linear interpolation between them.
template <typename S>
struct TwoHot {
  int64_t low, high;
  S weight_low, weight_high;
};

// Targets beyond the bins are clipped. NaN gives NaN weights.
template <typename S>
PYWM_HD TwoHot<S> two_hot(S target, const S* bins, int64_t B) {
  const S first = bins[0], last = bins[B - 1];
  const S y = target < first ? first : (target > last ? last : target);
  // bins[low] <= y < bins[high], or the last two.
  int64_t low = 0, high = B - 1;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (bins[middle] <= y)
      low = middle;
    else
      high = middle;
  }
  const S weight = (y - bins[low]) / (bins[high] - bins[low]);
  return {low, high, S(1) - weight, weight};
}

// The cross-entropy -sum(w·log softmax), from how the logits normalise.
template <typename S>
PYWM_HD S two_hot_loss(const TwoHot<S>& w, S logit_low, S logit_high, S top, S log_sum) {
  return w.weight_low * (top - logit_low) + w.weight_high * (top - logit_high) + log_sum;
}

// The target's share of bin i, which the gradient subtracts from the softmax.
template <typename S>
PYWM_HD S two_hot_weight(const TwoHot<S>& w, int64_t i) {
  return i == w.low ? w.weight_low : (i == w.high ? w.weight_high : S(0));
}

}  // namespace pywm::math
