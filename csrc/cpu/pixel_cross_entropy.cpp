// Cross-entropy of pixels as classes on the CPU, less a cut-off. See pywm/ops/pixel_cross_entropy.py.
//
// What: the loss of every row; backward, the gradient of the logits from the losses, the logits and the targets.
// Layout: M rows of K logits, contiguous; target, loss [M].
// Mapping: threads share the rows; a row stays in the first-level cache.
// Cost: a logit takes one exponential each way, is read once, and backward its gradient written once: bound by memory
//   with vector instructions. Backward, a row without a loss costs its zeros only.
// Numerics: math/row.h and math/exp.h in S. Backward, the probabilities are exp((l_k - l_y) - (L + C)): the logarithm
// of
//   the row's sum, from its loss, so that logits that are all large lose nothing.
// Source: Kaiser et al. (2020).

#include "../math/pixels.h"
#include "../math/row.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kMaxima = 32;  // parts of a row's maximum

template <typename S>
void forward(const PixelCrossEntropyArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const S* __restrict logits = a.logits + m * a.K;
    const S top = math::row_max<S, kMaxima>(logits, a.K);
    const S total = math::row_sum<S>(a.K, [&](int64_t k) { return math::exp_below(logits[k] - top); });
    a.loss[m] = math::cut_off((top - logits[a.target[m]]) + math::log(total), a.cutoff);
  }
}

template <typename S>
void backward(const PixelCrossEntropyBackwardArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const S* __restrict logits = a.logits + m * a.K;
    S* __restrict grad_logits = a.grad_logits + m * a.K;
    const S loss = a.loss[m], grad = a.grad[m];
    if (loss == S(0)) {
      for (int64_t k = 0; k < a.K; ++k) grad_logits[k] = S(0);
      continue;
    }
    const S ce = loss + a.cutoff, at = logits[a.target[m]];
    if (ce < S(INFINITY)) {
#pragma GCC ivdep
      for (int64_t k = 0; k < a.K; ++k) grad_logits[k] = math::exp_below((logits[k] - at) - ce) * grad;
    } else {  // a probability of 0, or NaN
      math::softmax_row(logits, grad_logits, a.K);
      for (int64_t k = 0; k < a.K; ++k) grad_logits[k] *= grad;
    }
    grad_logits[a.target[m]] -= grad;
  }
}

}  // namespace

void fill_pixel_cross_entropy(Kernels& table) {
  table.f32.pixel_cross_entropy = forward<float>;
  table.f64.pixel_cross_entropy = forward<double>;
  table.f32.pixel_cross_entropy_backward = backward<float>;
  table.f64.pixel_cross_entropy_backward = backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
