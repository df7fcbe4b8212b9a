// Discounted returns on the CPU. See pywm/ops/discounted_return.py for the definition.
//
// What: R[t] = r[t] + d[t]·R[t+1], backwards in time, R[T] the bootstrap; its adjoint, forwards.
// Layout: all [T, N] contiguous, time-major; bootstrap [N].
// Mapping: threads share the columns, in multiples of 16. Time is serial, columns are not: a block of kBlock of them
//   goes from row to row, its carries in the first-level cache.
// Cost: an element reads 2 numbers and writes 1, backward 3 and up to 2, for one multiply-add, backward three flops:
//   bandwidth. Outputs of large calls bypass the caches.
// Numerics: ../math/returns.h in S; a column is one chain in the order of time, whatever the number of threads.
// Source: Sutton and Barto (2018), eq. 3.8.

#include "../math/returns.h"
#include "kernels.h"
#include "rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
void forward(const DiscountedReturnArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(3 * sizeof(S)) > kStreamBytes;
  OutRow<S> returns_out(a.returns, stream);
  alignas(64) S carry[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    for (int64_t i = 0; i < n; ++i) carry[i] = a.bootstrap[first + i];
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const int64_t row = t * a.N + first;
      const S* __restrict reward = a.reward + row;
      const S* __restrict discount = a.discount + row;
      S* __restrict returns = returns_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        carry[i] = math::discounted_return_step(reward[i], discount[i], carry[i]);
        returns[i] = carry[i];
      }
      returns_out.done(row, n);
    }
  }
  if (stream) stream_fence();
}

template <typename S>
void backward(const DiscountedReturnBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(5 * sizeof(S)) > kStreamBytes;
  OutRow<S> reward_out(a.grad_reward, stream), discount_out(a.grad_discount, stream);
  alignas(64) S carry[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = t * a.N + first;
      const S* __restrict grad = a.grad + row;
      const S* __restrict discount = a.discount + row;
      const S* __restrict next_return = t == a.T - 1 ? a.bootstrap + first : a.returns + row + a.N;
      S* __restrict grad_reward = reward_out.row(row);
      S* __restrict grad_discount = discount_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const S total = grad[i] + carry[i];
        carry[i] = discount[i] * total;
        grad_reward[i] = total;
        grad_discount[i] = total * next_return[i];
      }
      reward_out.done(row, n);
      discount_out.done(row, n);
    }
    if (a.grad_bootstrap)
      for (int64_t i = 0; i < n; ++i) a.grad_bootstrap[first + i] = carry[i];
  }
  if (stream) stream_fence();
}

}  // namespace

void fill_discounted_return(Kernels& table) {
  table.f32.discounted_return = forward<float>;
  table.f64.discounted_return = forward<double>;
  table.f32.discounted_return_backward = backward<float>;
  table.f64.discounted_return_backward = backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
