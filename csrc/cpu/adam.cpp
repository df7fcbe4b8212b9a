// The optimiser step over one flat buffer on the CPU. See pywm/ops/adam_step.py for the definition.
//
// What: the sum of squares of a piece, for norms; Adam's step for every parameter of a piece, in place.
// Layout: param, grad, exp_avg, exp_avg_sq [P] contiguous.
// Mapping: dispatch.cpp: threads share blocks of kNormBlock numbers for the norm, then pieces of the buffer.
// Cost: a parameter reads 1 number for the norm, 4 for the step, and writes 3: 32 bytes in float32, for some 15 flops,
//   a root and a division among them.
// Numerics: math/adam.h in S; squares in double, a block's in 16 partial sums, the blocks' in their order: the number
//   of threads does not show.
// Source: Kingma and Ba (2015), algorithm 1; clipping as in Pascanu et al. (2013).

#include "../math/adam.h"

#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// In double, so that no square overflows and the order of the sum hardly shows; 16 partial sums keep the adders busy.
template <typename S>
double sum_of_squares(const S* __restrict x, int64_t n) {
  constexpr int64_t kParts = 16;
  double parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= n; i += kParts)
    for (int64_t j = 0; j < kParts; ++j) parts[j] += double(x[i + j]) * double(x[i + j]);
  for (; i < n; ++i) parts[0] += double(x[i]) * double(x[i]);
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

template <typename S>
void update(const AdamArgs<S>& a, const math::AdamFactors<S>& factors, int64_t begin, int64_t end) {
  const math::AdamFactors<S> f = factors;
  S* __restrict param = a.param;
  const S* __restrict grad = a.grad;
  S* __restrict exp_avg = a.exp_avg;
  S* __restrict exp_avg_sq = a.exp_avg_sq;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const auto next = math::adam_step(param[i], grad[i], exp_avg[i], exp_avg_sq[i], f);
    param[i] = next.param;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
}

}  // namespace

void fill_adam(Kernels& table) {
  table.f32.sum_of_squares = sum_of_squares<float>;
  table.f64.sum_of_squares = sum_of_squares<double>;
  table.f32.adam_update = update<float>;
  table.f64.adam_update = update<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
