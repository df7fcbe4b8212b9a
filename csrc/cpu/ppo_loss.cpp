// PPO's loss, statistics and gradients on the CPU, in one pass over the rows. See pywm/ops/ppo_loss.py.
//
// What: the loss of every row, its gradients, and what the row adds to the statistics. The moments of the advantage
//   come from dispatch.cpp.
// Layout: M rows, contiguous: logits [M, width] in G groups, or mean and action [M, A] and log_std [M, A] or [A].
// Mapping: threads share blocks of kRowBlock rows, whose sums dispatch.cpp adds up. Of a row, first the log-probability
//   of the whole action, then each group's gradient, over the probabilities that stand in its place.
// Cost: every input is read once from memory, the advantage up to three times, and every gradient written once; a class
//   takes one exponential (two without gradient, in groups of more than 1024 classes), a group one logarithm; a
//   Gaussian part is computed again for its gradient.
// Numerics: math/distributions.h and math/ppo.h in S; sums over rows in double, in an order that M alone fixes: the
//   number of threads does not show.
// Source: Schulman et al. (2017), eq. 7 and 9; details as in Huang et al. (2022).

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
  const auto value = a.options.value_clip >= 0 ? math::ppo_value_row_clipped(a.value[m], a.returns[m], a.old_value[m],
                                                                             S(a.options.value_clip))
                                               : math::ppo_value_row(a.value[m], a.returns[m]);
  sums.policy += policy.loss;
  sums.value += value.loss;
  sums.clipped += policy.clipped ? 1 : 0;
  sums.kl += policy.kl;
  if (a.grad_value) a.grad_value[m] = S(a.options.value_coef * moments.inverse_count) * value.grad_value;
  return policy.grad_log_prob * S(moments.inverse_count);
}

// Probabilities of one group into `probs`; returns how they normalise, and the entropy.
template <typename S>
inline math::LogTotal<S> softmax(const S* __restrict logits, int64_t A, S* __restrict probs, S& entropy) {
  S top = logits[0];
  for (int64_t j = 1; j < A; ++j) top = logits[j] > top ? logits[j] : top;
  S total = S(0);
  for (int64_t j = 0; j < A; ++j) {
    probs[j] = math::exp(logits[j] - top);
    total += probs[j];
  }
  const math::LogTotal<S> log_total{top, math::log(total)};
  const S inverse = S(1) / total;
  entropy = S(0);
  for (int64_t j = 0; j < A; ++j) {
    probs[j] *= inverse;
    entropy -= math::plogp(probs[j], math::categorical_log_prob(logits[j], log_total));
  }
  return log_total;
}

// The same without keeping the probabilities: twice the exponentials, no memory.
template <typename S>
inline math::LogTotal<S> log_sum_exp(const S* logits, int64_t A, S& entropy) {
  S top = logits[0];
  for (int64_t j = 1; j < A; ++j) top = logits[j] > top ? logits[j] : top;
  S total = S(0);
  for (int64_t j = 0; j < A; ++j) total += math::exp(logits[j] - top);
  const math::LogTotal<S> log_total{top, math::log(total)};
  entropy = S(0);
  for (int64_t j = 0; j < A; ++j) {
    const S log_prob = math::categorical_log_prob(logits[j], log_total);
    entropy -= math::plogp(math::exp(log_prob), log_prob);
  }
  return log_total;
}

template <typename S>
void categorical(const PpoLossCategoricalArgs<S>& a, const PpoMoments& moments, int64_t begin, int64_t end,
                 PpoSums& sums) {
  const PpoLossCommon<S>& common = a.common;
  const S entropy_weight = S(-common.options.entropy_coef * moments.inverse_count);
  constexpr int64_t kClasses = 1024;  // probabilities of a group when no gradient row is there to hold them
  S unwanted[kClasses];
  for (int64_t m = begin; m < end; ++m) {
    const S* logits = a.logits + m * a.width;
    S* grad = a.grad_logits ? a.grad_logits + m * a.width : nullptr;
    if (common.valid && !common.valid[m]) {
      if (common.grad_value) common.grad_value[m] = S(0);
      if (grad)
        for (int64_t j = 0; j < a.width; ++j) grad[j] = S(0);
      continue;
    }
    // First the log-probability of the whole action, for the ratio needs it; then each group's gradient, over the
    // probabilities that the first pass left in its place.
    S log_prob = S(0), entropy = S(0), entropies[kMaxGroups];
    math::LogTotal<S> log_totals[kMaxGroups];
    int64_t actions[kMaxGroups], offset = 0;
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t A = a.nvec[g];
      actions[g] = a.action[m * a.G + g];
      if (actions[g] < 0 || actions[g] >= A) {
        if (sums.bad_row < 0) {
          sums.bad_row = m;
          sums.bad_action = actions[g];
          sums.bad_classes = A;
        }
        actions[g] = 0;
      }
      if (grad || A <= kClasses) {
        log_totals[g] = softmax(logits + offset, A, grad ? grad + offset : unwanted, entropies[g]);
      } else {
        log_totals[g] = log_sum_exp(logits + offset, A, entropies[g]);
      }
      log_prob += math::categorical_log_prob(logits[offset + actions[g]], log_totals[g]);
      entropy += entropies[g];
      offset += A;
    }
    const S weight = common_row(common, moments, m, log_prob, sums);
    sums.entropy += entropy;
    if (!grad) continue;
    offset = 0;
    for (int64_t g = 0; g < a.G; ++g) {
      for (int64_t j = 0; j < a.nvec[g]; ++j) {
        const S prob = grad[offset + j], class_log_prob = math::categorical_log_prob(logits[offset + j], log_totals[g]);
        grad[offset + j] = weight * math::categorical_grad_log_prob(prob, j == actions[g]) +
                           entropy_weight * math::categorical_grad_entropy(prob, class_log_prob, entropies[g]);
      }
      offset += a.nvec[g];
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
