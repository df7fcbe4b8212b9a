// V-trace on the CPU. See pywm/ops/vtrace.py for the definition.
//
// What: targets and advantages from clipped importance weights, backwards in time; their adjoint, forwards.
// Layout: all [T, N] contiguous, time-major.
// Mapping: threads share the columns, in multiples of 16. Time is serial, columns are not: a block of kBlock of them
//   goes from row to row, its carries in the first-level cache. The weights of a row of a block come first, in a loop
//   of their own.
// Cost: an element reads 5 numbers and a mask and writes 2 (3 where a gradient is wanted later), backward up to 6 and
//   4; one exponential each way.
// Numerics: ../math/returns.h in S; a column is one chain in the order of time, whatever the number of threads.
// Source: Espeholt et al. (2018), eq. 1 and remark 1; λ as in their section 4.1's generalisation; truncation is ours.

#include "../math/exp.h"
#include "../math/returns.h"
#include "kernels.h"
#include "rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// Clipped importance weights of one row.
template <typename S>
void weights(const S* log_ratio, int64_t n, S lam, S rho_clip, S c_clip, S* rho, S* c) {
  for (int64_t i = 0; i < n; ++i) {
    const S ratio = math::exp(log_ratio[i]);
    rho[i] = ratio > rho_clip ? rho_clip : ratio;
    c[i] = lam * (ratio > c_clip ? c_clip : ratio);
  }
}

template <typename S>
void forward(const VtraceArgs<S>& a, int64_t begin, int64_t end) {
  OutRow<S> y_out(a.y, false);
  alignas(64) S carry[kBlock], rho[kBlock], c[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const int64_t row = t * a.N + first;
      weights(a.log_ratio + row, n, a.lam, a.rho_clip, a.c_clip, rho, c);
      const S* __restrict reward = a.reward + row;
      const S* __restrict discount = a.discount + row;
      const S* __restrict value = a.value + row;
      const S* __restrict next_value = a.next_value + row;
      const uint8_t* __restrict truncated = a.truncated + row;
      S* __restrict advantage = a.advantage + row;
      S* __restrict target = a.target + row;
      S* __restrict ys = y_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const bool cut = truncated[i] != 0;
        const S next_y = carry[i];
        advantage[i] = math::vtrace_advantage(rho[i], reward[i], discount[i], value[i], next_value[i], cut, next_y);
        const S y = math::vtrace_correction(rho[i], c[i], reward[i], discount[i], value[i], next_value[i], cut, next_y);
        carry[i] = y;
        ys[i] = y;
        target[i] = value[i] + y;
      }
    }
  }
}

template <typename S>
void backward(const VtraceBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const InRow<S> grad_target_in(a.grad_target), grad_advantage_in(a.grad_advantage);
  OutRow<S> reward_out(a.grad_reward, false), discount_out(a.grad_discount, false), value_out(a.grad_value, false),
      next_out(a.grad_next_value, false);
  alignas(64) S carry[kBlock], rho[kBlock], c[kBlock], zeros[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    fill(zeros, n, S(0));
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = t * a.N + first;
      weights(a.log_ratio + row, n, a.lam, a.rho_clip, a.c_clip, rho, c);
      const S* __restrict grad_target = grad_target_in.row(row);
      const S* __restrict grad_advantage = grad_advantage_in.row(row);
      const S* __restrict next_y = t == a.T - 1 ? zeros : a.y + row + a.N;
      S* __restrict grad_reward = reward_out.row(row);
      S* __restrict grad_discount = discount_out.row(row);
      S* __restrict grad_value = value_out.row(row);
      S* __restrict grad_next_value = next_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const auto g =
            math::vtrace_grad(grad_target[i], grad_advantage[i], grad_target[i] + carry[i], rho[i], c[i],
                              a.discount[row + i], a.next_value[row + i], a.truncated[row + i] != 0, next_y[i]);
        carry[i] = g.carry;
        grad_reward[i] = g.reward;
        grad_discount[i] = g.discount;
        grad_value[i] = g.value;
        grad_next_value[i] = g.next_value;
      }
    }
  }
}

}  // namespace

void fill_vtrace(Kernels& table) {
  table.f32.vtrace = forward<float>;
  table.f64.vtrace = forward<double>;
  table.f32.vtrace_backward = backward<float>;
  table.f64.vtrace_backward = backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
