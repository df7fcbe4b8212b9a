// PPO's clipped objective for one row, with its derivatives; see pywm/ops/ppo_loss.py.
#pragma once

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

template <typename S>
struct PpoPolicyRow {
  S loss;           // -min(ρ·A, clip(ρ)·A)
  S grad_log_prob;  // its derivative with respect to the new log-probability
  S kl;             // (ρ - 1) - log ρ, an unbiased estimate of KL(old || new) that is never negative
  bool clipped;     // |ρ - 1| > clip
};

template <typename S>
PYWM_HD PpoPolicyRow<S> ppo_policy_row(S log_prob, S old_log_prob, S advantage, S clip) {
  const S log_ratio = log_prob - old_log_prob;
  const S ratio = exp(log_ratio);
  const S low = S(1) - clip, high = S(1) + clip;
  const S bounded = ratio < low ? low : (ratio > high ? high : ratio);
  const S plain = ratio * advantage, limited = bounded * advantage;
  const bool inside = ratio >= low && ratio <= high;
  const S distance = ratio > S(1) ? ratio - S(1) : S(1) - ratio;
  // A NaN must come out as NaN: `plain` is taken unless `limited` is smaller for certain.
  const bool limits = limited < plain;
  return {-(limits ? limited : plain), (!limits || inside) ? -plain : S(0), (ratio - S(1)) - log_ratio,
          distance > clip};
}

template <typename S>
struct PpoValueRow {
  S loss;        // ½·max((V-R)², (clipped V - R)²)
  S grad_value;  // its derivative with respect to V
};

template <typename S>
PYWM_HD PpoValueRow<S> ppo_value_row(S value, S returns) {
  const S error = value - returns;
  return {S(0.5) * error * error, error};
}

template <typename S>
PYWM_HD PpoValueRow<S> ppo_value_row_clipped(S value, S returns, S old_value, S value_clip) {
  const S error = value - returns, change = value - old_value;
  const S bounded = change < -value_clip ? -value_clip : (change > value_clip ? value_clip : change);
  const S clipped_error = old_value + bounded - returns;
  const bool inside = change >= -value_clip && change <= value_clip;
  const bool limits = clipped_error * clipped_error > error * error;
  const S used = limits ? clipped_error : error;
  return {S(0.5) * used * used, (limits && !inside) ? S(0) : used};
}

}  // namespace pywm::math
