// Sampling of one-hot groups on the CPU, and its straight-through gradient. See pywm/ops/categorical_sample.py.
//
// What: softmax with a share of uniform probability, inverse CDF with one uniform number, one-hot and index; backward,
//   the gradient of the logits, from the softmax again.
// Layout: M groups of K classes, contiguous.
// Mapping: threads share the groups; a group stays in the first-level cache.
// Cost: a class takes one exponential and some ten flops each way, reads 1 number (backward 2) and writes 1.
// Numerics: math/categorical.h in S. The CDF is summed one class after the other, as on CUDA: the same probabilities
//   give the same sample. Other sums run in 16 parts.
// Source: Hafner et al. (2023); the gradient: Bengio et al. (2013).

#include "../math/categorical.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
void forward(const CategoricalSampleArgs<S>& a, int64_t begin, int64_t end) {
  alignas(64) S scratch[2 * kMaxClasses];
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  for (int64_t m = begin; m < end; ++m) {
    const int64_t offset = m * a.K;
    const int64_t index = math::sample_row(a.logits + offset, a.uniform[m], mix, a.K, a.stoch + offset, scratch);
    a.index[m] = static_cast<uint8_t>(index);
  }
}

template <typename S>
void backward(const CategoricalSampleBackwardArgs<S>& a, int64_t begin, int64_t end) {
  alignas(64) S softmax[kMaxClasses];
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  for (int64_t m = begin; m < end; ++m) {
    const S* __restrict grad = a.grad + m * a.K;
    S* __restrict grad_logits = a.grad_logits + m * a.K;
    math::softmax_row(a.logits + m * a.K, softmax, a.K);
    const S mean = math::row_sum<S>(a.K, [&](int64_t k) { return softmax[k] * grad[k]; });
#pragma GCC ivdep
    for (int64_t k = 0; k < a.K; ++k) grad_logits[k] = math::unimix_softmax_grad(softmax[k], grad[k], mean, mix);
  }
}

}  // namespace

void fill_categorical_sample(Kernels& table) {
  table.f32.categorical_sample = forward<float>;
  table.f64.categorical_sample = forward<double>;
  table.f32.categorical_sample_backward = backward<float>;
  table.f64.categorical_sample_backward = backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
