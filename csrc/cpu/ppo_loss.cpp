// PPO's loss, statistics and gradients on the CPU, in one pass over the rows. See pywm/ops/ppo_loss.py.
//
// A range of rows adds its share to double sums of its own; dispatch.cpp adds those up in a fixed order, so the result
// does not depend on the number of threads.

#include "../math/distributions.h"
#include "../math/ppo.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// The part of a row that no distribution enters. Returns the weight of d(log_prob) for the row, 1/count included.
template <typename S>
inline S common_row(const PpoLossCommon<S>& a, const PpoMoments& moments, int64_t m, S log_prob, PpoSums& sums) {
  const S advantage = (a.advantage[m] - S(moments.mean)) * S(moments.scale);
  const auto policy = math::ppo_policy_row(log_prob, a.old_log_prob[m], advantage, S(a.options.clip));
  const auto value = a.options.value_clip >= 0
                         ? math::ppo_value_row_clipped(a.value[m], a.returns[m], a.old_value[m], S(a.options.value_clip))
                         : math::ppo_value_row(a.value[m], a.returns[m]);
  sums.policy += policy.loss;
  sums.value += value.loss;
  sums.clipped += policy.clipped ? 1 : 0;
  sums.kl += policy.kl;
  if (a.grad_value) a.grad_value[m] = S(a.options.value_coef * moments.inverse_count) * value.grad_value;
  return policy.grad_log_prob * S(moments.inverse_count);
}

template <typename S>
void categorical(const PpoLossCategoricalArgs<S>& a, const PpoMoments& moments, int64_t begin, int64_t end,
                 PpoSums& sums) {
  const PpoLossCommon<S>& common = a.common;
  const S entropy_weight = S(-common.options.entropy_coef * moments.inverse_count);
  constexpr int64_t kClasses = 64;  // wider groups go through the gradient array or are computed twice
  for (int64_t m = begin; m < end; ++m) {
    const S* logits = a.logits + m * a.width;
    S* grad = a.grad_logits ? a.grad_logits + m * a.width : nullptr;
    if (common.valid && !common.valid[m]) {
      if (common.grad_value) common.grad_value[m] = S(0);
      if (grad)
        for (int64_t j = 0; j < a.width; ++j) grad[j] = S(0);
      continue;
    }
    S log_prob = S(0), entropy = S(0);
    int64_t offset = 0;
    // First the log-probability of the whole action, for the ratio needs it; then each group's gradient.
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t A = a.nvec[g];
      const S* l = logits + offset;
      int64_t action = a.action[m * a.G + g];
      if (action < 0 || action >= A) {
        if (sums.bad_row < 0) sums.bad_row = m;
        action = 0;
      }
      S top = l[0];
      for (int64_t j = 1; j < A; ++j) top = l[j] > top ? l[j] : top;
      S total = S(0);
      for (int64_t j = 0; j < A; ++j) total += math::exp(l[j] - top);
      const S log_total = top + math::log(total);
      S group_entropy = S(0);
      for (int64_t j = 0; j < A; ++j) {
        const S lp = l[j] - log_total;
        group_entropy -= math::plogp(math::exp(lp), lp);
      }
      log_prob += l[action] - log_total;
      entropy += group_entropy;
      offset += A;
    }
    const S weight = common_row(common, moments, m, log_prob, sums);
    sums.entropy += entropy;
    if (!grad) continue;
    offset = 0;
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t A = a.nvec[g];
      const S* l = logits + offset;
      const int64_t action = a.action[m * a.G + g];
      S top = l[0];
      for (int64_t j = 1; j < A; ++j) top = l[j] > top ? l[j] : top;
      S total = S(0);
      S few[kClasses];
      S* probs = A <= kClasses ? few : grad + offset;
      for (int64_t j = 0; j < A; ++j) total += probs[j] = math::exp(l[j] - top);
      const S log_total = top + math::log(total), inverse = S(1) / total;
      S group_entropy = S(0);
      for (int64_t j = 0; j < A; ++j) group_entropy -= math::plogp(probs[j] * inverse, l[j] - log_total);
      for (int64_t j = 0; j < A; ++j) {
        const S prob = probs[j] * inverse;
        grad[offset + j] = weight * math::categorical_grad_log_prob(prob, j == action) +
                           entropy_weight * math::categorical_grad_entropy(prob, l[j] - log_total, group_entropy);
      }
      offset += A;
    }
  }
}

template <typename S>
void gaussian(const PpoLossGaussianArgs<S>& a, const PpoMoments& moments, int64_t begin, int64_t end, PpoSums& sums,
              double* shared_grad_log_std) {
  const PpoLossCommon<S>& common = a.common;
  const bool shared = a.log_std_rows == 1;
  const S entropy_weight = S(-common.options.entropy_coef * moments.inverse_count);
  for (int64_t m = begin; m < end; ++m) {
    const S* mean = a.mean + m * a.A;
    const S* action = a.action + m * a.A;
    const S* log_std = a.log_std + (shared ? 0 : m * a.A);
    S* grad_mean = a.grad_mean ? a.grad_mean + m * a.A : nullptr;
    S* grad_log_std = a.grad_log_std && !shared ? a.grad_log_std + m * a.A : nullptr;
    if (common.valid && !common.valid[m]) {
      if (common.grad_value) common.grad_value[m] = S(0);
      for (int64_t j = 0; j < a.A; ++j) {
        if (grad_mean) grad_mean[j] = S(0);
        if (grad_log_std) grad_log_std[j] = S(0);
      }
      continue;
    }
    S log_prob = S(0), entropy = S(0);
    for (int64_t j = 0; j < a.A; ++j) {
      const auto part = math::gaussian_part(action[j], mean[j], log_std[j]);
      log_prob += part.log_prob;
      entropy += part.entropy;
    }
    const S weight = common_row(common, moments, m, log_prob, sums);
    sums.entropy += entropy;
    if (!a.grad_mean && !a.grad_log_std) continue;
    for (int64_t j = 0; j < a.A; ++j) {
      const auto part = math::gaussian_part(action[j], mean[j], log_std[j]);
      const S along = weight * part.grad_log_std + entropy_weight;
      if (grad_mean) grad_mean[j] = weight * part.grad_mean;
      if (grad_log_std) grad_log_std[j] = along;
      if (shared_grad_log_std) shared_grad_log_std[j] += along;
    }
  }
}

}  // namespace

void fill_ppo_loss(Kernels& table) {
  table.f32.ppo_loss_categorical = categorical<float>;
  table.f64.ppo_loss_categorical = categorical<double>;
  table.f32.ppo_loss_gaussian = gaussian<float>;
  table.f64.ppo_loss_gaussian = gaussian<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
