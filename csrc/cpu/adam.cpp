// The optimiser step over one flat buffer on the CPU. See pywm/ops/adam_step.py for the definition.

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
