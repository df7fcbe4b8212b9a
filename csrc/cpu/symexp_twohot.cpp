// Two-hot regression on the CPU: the loss and the mean of a row of bins. See pywm/ops/symexp_twohot.py.
//
// What: loss and mean of every row, and their gradients from the logits again.
// Layout: M rows of B logits, contiguous, B odd; target, other, loss, mean [M].
// Mapping: threads share the rows; each makes a table of the bins first, (B + 1) / 2 exponentials in double.
// Cost: a bin reads 1 logit (backward it writes 1, too) and takes one exponential and 3 to 7 flops; a loss searches its
//   bins in log2(B) steps.
// Numerics: math/twohot.h and math/row.h in S, sums in 16 parts. The mean adds bins of opposite sign first: equal
//   logits give exactly 0.
// Source: Hafner et al. (2023), eq. 8 to 10.

#include "../math/row.h"
#include "../math/twohot.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
struct Bins {
  alignas(64) S bin[kMaxBins + 1];

  explicit Bins(int64_t B) {
    for (int64_t i = (B - 1) / 2; i < B; ++i) {
      bin[i] = math::symexp_bin<S>(i, B);
      bin[B - 1 - i] = -bin[i];
    }
    bin[(B - 1) / 2] = S(0);
  }
};

template <typename S>
void loss(const SymexpTwohotLossArgs<S>& a, int64_t begin, int64_t end) {
  const Bins<S> bins(a.B);
  alignas(64) S exps[kMaxBins + 1];
  for (int64_t m = begin; m < end; ++m) {
    const S* __restrict logits = a.logits + m * a.B;
    const S top = math::row_max(logits, a.B);
#pragma GCC ivdep
    for (int64_t i = 0; i < a.B; ++i) exps[i] = math::exp(logits[i] - top);
    const S total = math::row_sum<S>(a.B, [&](int64_t i) { return exps[i]; });
    const auto w = math::two_hot(a.target[m], bins.bin, a.B);
    const S log_sum = math::log(total);
    S loss = math::two_hot_loss(w, logits[w.low], logits[w.high], top, log_sum);
    if (a.other) {
      const auto v = math::two_hot(a.other[m], bins.bin, a.B);
      loss += a.other_scale * math::two_hot_loss(v, logits[v.low], logits[v.high], top, log_sum);
    }
    a.loss[m] = loss;
  }
}

template <typename S>
void loss_backward(const SymexpTwohotLossBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const Bins<S> bins(a.B);
  for (int64_t m = begin; m < end; ++m) {
    S* __restrict grad_logits = a.grad_logits + m * a.B;
    math::softmax_row(a.logits + m * a.B, grad_logits, a.B);
    const auto w = math::two_hot(a.target[m], bins.bin, a.B);
    // Both losses at once: the softmax minus the mean of the two-hots, times the sum of the factors.
    const S total = a.other ? S(1) + a.other_scale : S(1), share = S(1) / total;
    grad_logits[w.low] -= share * w.weight_low;
    grad_logits[w.high] -= share * w.weight_high;
    if (a.other) {
      const auto v = math::two_hot(a.other[m], bins.bin, a.B);
      grad_logits[v.low] -= share * a.other_scale * v.weight_low;
      grad_logits[v.high] -= share * a.other_scale * v.weight_high;
    }
    const S grad = a.grad[m] * total;
#pragma GCC ivdep
    for (int64_t i = 0; i < a.B; ++i) grad_logits[i] *= grad;
  }
}

// Bins of opposite sign are added first: equal probabilities cancel exactly.
template <typename S>
void mean(const SymexpTwohotMeanArgs<S>& a, int64_t begin, int64_t end) {
  const Bins<S> bins(a.B);
  alignas(64) S softmax[kMaxBins + 1], mirrored[kMaxBins + 1];
  const int64_t middle = (a.B - 1) / 2;
  for (int64_t m = begin; m < end; ++m) {
    math::softmax_row(a.logits + m * a.B, softmax, a.B);
#pragma GCC ivdep
    for (int64_t i = 1; i <= middle; ++i) mirrored[i] = softmax[middle - i];
    const S sum = math::row_sum<S>(
        middle, [&](int64_t i) { return bins.bin[middle + 1 + i] * (softmax[middle + 1 + i] - mirrored[1 + i]); });
    a.mean[m] = sum;
  }
}

template <typename S>
void mean_backward(const SymexpTwohotMeanBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const Bins<S> bins(a.B);
  for (int64_t m = begin; m < end; ++m) {
    S* __restrict grad_logits = a.grad_logits + m * a.B;
    math::softmax_row(a.logits + m * a.B, grad_logits, a.B);
    const S grad = a.grad[m], mean = a.mean[m];
#pragma GCC ivdep
    for (int64_t i = 0; i < a.B; ++i) grad_logits[i] *= (bins.bin[i] - mean) * grad;
  }
}

}  // namespace

void fill_symexp_twohot(Kernels& table) {
  table.f32.symexp_twohot_loss = loss<float>;
  table.f64.symexp_twohot_loss = loss<double>;
  table.f32.symexp_twohot_loss_backward = loss_backward<float>;
  table.f64.symexp_twohot_loss_backward = loss_backward<double>;
  table.f32.symexp_twohot_mean = mean<float>;
  table.f64.symexp_twohot_mean = mean<double>;
  table.f32.symexp_twohot_mean_backward = mean_backward<float>;
  table.f64.symexp_twohot_mean_backward = mean_backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
