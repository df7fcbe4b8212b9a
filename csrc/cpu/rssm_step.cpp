// Where a step of a scan made of products and row kernels begins, on the CPU. See pywm/ops/rssm_products.py.
//
// What: h = deter and u = add + stoch_in's product with the sample before, both zeroed where an episode begins;
//   backward, the gradients of the logits and of deter from outside and from the step behind.
// Layout: ops.h; a row a state.
// Mapping: Rows are divided among threads.
// Cost: Bandwidth. The CPU's own scan does not come here: it is there so that the path of GPUs runs without one.
// Numerics: Formulas of math/ in S.
// Source: Hafner et al. 2023; the gradient of the samples: Bengio et al. 2013.

#include "../math/categorical.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
void enter(const RssmEnterArgs<S>& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const bool reset = a.is_first[n];
    const S *deter = a.deter + n * a.D, *add = a.add + n * a.add_stride;
    S *h = a.h + n * a.D, *u = a.u + n * a.u_stride;
    for (int64_t i = 0; i < a.D; ++i) h[i] = reset ? S(0) : deter[i];
    for (int64_t i = 0; i < a.H; ++i) u[i] = add[i];
    if (reset) continue;
    if (a.stoch_proj) {
      const S* row = a.stoch_proj + n * a.H;
      for (int64_t i = 0; i < a.H; ++i) u[i] += row[i];
      continue;
    }
    for (int64_t g = 0; g < a.groups; ++g) {
      const S* row = a.packed + (g * a.classes + a.index[n * a.groups + g]) * a.H;
      for (int64_t i = 0; i < a.H; ++i) u[i] += row[i];
    }
  }
}

template <typename S>
void leave(const RssmLeaveArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t K = a.classes;
  const auto mix = math::unimix_of<S>(a.unimix, K);
  S softmax[kMaxClasses], grad[kMaxClasses];
  for (int64_t n = begin; n < end; ++n) {
    const bool cut = a.is_first_behind && a.is_first_behind[n];
    for (int64_t g = 0; g < a.groups; ++g) {
      const int64_t at = (n * a.groups + g) * K;
      math::softmax_row(a.logits + at, softmax, K);
      S mean = S(0);
      for (int64_t k = 0; k < K; ++k) {
        grad[k] =
            (a.outer_stoch ? a.outer_stoch[at + k] : S(0)) + (a.carry_stoch && !cut ? a.carry_stoch[at + k] : S(0));
        mean += softmax[k] * grad[k];
      }
      for (int64_t k = 0; k < K; ++k)
        a.grad_logits[at + k] = (a.outer_logits ? a.outer_logits[at + k] : S(0)) +
                                math::unimix_softmax_grad(softmax[k], grad[k], mean, mix);
    }
    for (int64_t i = n * a.D; i < (n + 1) * a.D; ++i)
      a.grad_h[i] = (a.outer_deter ? a.outer_deter[i] : S(0)) + (a.carry_deter && !cut ? a.carry_deter[i] : S(0));
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.rssm_enter = enter<S>;
  table.rssm_leave = leave<S>;
}

}  // namespace

void fill_rssm_step(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
