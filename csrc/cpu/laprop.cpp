// LaProp over a piece of one tensor on the CPU. See pywm/ops/laprop_step.py for the definition.
//
// What: the step of every parameter of a piece, in place, with its tensor's factor of clipping; then what follows the
//   last parameters slowly, and a bfloat16 copy, while the piece is near the core.
// Layout: param, grad, exp_avg, exp_avg_sq, rounded [P] contiguous, tensors one after another; slow [followed].
// Mapping: dispatch.cpp: threads share blocks of kNormBlock numbers, cut where a tensor begins, first for the norms,
//   whose sums are adam.cpp's, then for the step.
// Cost: a parameter reads 2 numbers for the norms (1 without clipping), 4 for the step, and writes 3: 36 bytes in
//   float32, for some 15 flops, a root and a division among them; 8 more where it is followed, 2 more for a copy.
// Numerics: math/laprop.h in S; norms in double, summed in an order that P and the tensors' sizes fix: the number of
//   threads does not show.
// Source: Ziyin et al. (2020), LaProp; Brock et al. (2021), section 4; Hafner et al. (2025), Dreamer V3, and its code.

#include "../math/laprop.h"

#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
void update(const LaPropArgs<S>& a, const math::LaPropFactors<S>& factors, double grad_scale, int64_t begin,
            int64_t end) {
  const math::LaPropFactors<S> f = factors;
  const S scale = S(grad_scale);
  S* __restrict param = a.param;
  const S* __restrict grad = a.grad;
  S* __restrict exp_avg = a.exp_avg;
  S* __restrict exp_avg_sq = a.exp_avg_sq;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const auto next = math::laprop_step(param[i], grad[i], exp_avg[i], exp_avg_sq[i], scale, f);
    param[i] = next.param;
    exp_avg[i] = next.exp_avg;
    exp_avg_sq[i] = next.exp_avg_sq;
  }
  if (S* __restrict slow = a.slow) {
    const int64_t skipped = a.P - a.followed;
#pragma GCC ivdep
    for (int64_t i = begin > skipped ? begin : skipped; i < end; ++i)
      slow[i - skipped] = math::laprop_follow(slow[i - skipped], param[i], f);
  }
  if (uint16_t* __restrict rounded = a.rounded) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) rounded[i] = math::laprop_round(param[i]);
  }
}

}  // namespace

void fill_laprop(Kernels& table) {
  table.f32.laprop_update = update<float>;
  table.f64.laprop_update = update<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
