// λ-returns on the CPU. See pywm/ops/lambda_return.py for the definition.
//
// What: R[t] = r[t] + d[t]·[(1-λ)·V'[t] + λ·R[t+1]], backwards in time, where R[t+1] is V'[t] in the last row and
//   before an invalid one; its adjoint, forwards.
// Layout: all [T, N] contiguous, time-major; λ a number or [T, N].
// Mapping: threads share the columns, in multiples of 16. Time is serial, columns are not: a block of kBlock of them
//   goes from row to row, its carries in the first-level cache.
// Cost: an element reads 3 numbers (and λ, and `valid` of two rows) and writes 1, backward 4 and up to 3: bandwidth.
//   Outputs of large calls bypass the caches.
// Numerics: ../math/returns.h in S; a column is one chain in the order of time, whatever the number of threads. Masks
//   select, so NaN behind one stays there.
// Source: Sutton and Barto (2018), eq. 12.18; Hafner et al. (2020), eq. 6.

#include "../math/returns.h"
#include "kernels.h"
#include "rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// kRows: λ comes as an array. kMasked: some rows are not valid; the row before such a row bootstraps.
template <typename S, bool kRows, bool kMasked>
void forward(const LambdaReturnArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(4 * sizeof(S)) > kStreamBytes;
  OutRow<S> returns_out(a.returns, stream);
  alignas(64) S carry[kBlock];
  const S lam = a.lam;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    for (int64_t i = 0; i < n; ++i) carry[i] = a.next_value[(a.T - 1) * a.N + first + i];
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const int64_t row = t * a.N + first;
      const bool last = t == a.T - 1;
      const S* __restrict reward = a.reward + row;
      const S* __restrict discount = a.discount + row;
      const S* __restrict next_value = a.next_value + row;
      const S* __restrict lams = kRows ? a.lam_rows + row : nullptr;
      const uint8_t* __restrict valid = kMasked ? a.valid + row : nullptr;
      // The mask of the row after; the last row bootstraps anyway, so its own mask is as good as any.
      const uint8_t* __restrict next_valid = kMasked ? valid + (last ? 0 : a.N) : nullptr;
      S* __restrict returns = returns_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        S next_return = carry[i];
        if constexpr (kMasked) next_return = math::select(last | !next_valid[i], next_value[i], next_return);
        S x = math::lambda_return_step(reward[i], discount[i], next_value[i], next_return, kRows ? lams[i] : lam);
        if constexpr (kMasked) x = math::select(valid[i] != 0, x, S(0));
        carry[i] = x;
        returns[i] = x;
      }
      returns_out.done(row, n);
    }
  }
  if (stream) stream_fence();
}

template <typename S, bool kRows, bool kMasked>
void backward(const LambdaReturnBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(7 * sizeof(S)) > kStreamBytes;
  OutRow<S> reward_out(a.grad_reward, stream), discount_out(a.grad_discount, stream),
      next_out(a.grad_next_value, stream);
  alignas(64) S carry[kBlock];
  const S lam = a.lam;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = t * a.N + first;
      const bool last = t == a.T - 1;
      const S* __restrict grad = a.grad + row;
      const S* __restrict discount = a.discount + row;
      const S* __restrict next_value = a.next_value + row;
      const S* __restrict next_return = last ? next_value : a.returns + row + a.N;
      const S* __restrict lams = kRows ? a.lam_rows + row : nullptr;
      const uint8_t* __restrict valid = kMasked ? a.valid + row : nullptr;
      const uint8_t* __restrict next_valid = kMasked ? valid + (last ? 0 : a.N) : nullptr;
      S* __restrict grad_reward = reward_out.row(row);
      S* __restrict grad_discount = discount_out.row(row);
      S* __restrict grad_next_value = next_out.row(row);
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const bool bootstraps = last | (kMasked && !next_valid[i]);
        const auto g = math::lambda_return_grad(grad[i] + carry[i], discount[i], next_value[i],
                                                math::select(bootstraps, next_value[i], next_return[i]),
                                                kRows ? lams[i] : lam, !kMasked || valid[i] != 0, bootstraps);
        carry[i] = g.carry;
        grad_reward[i] = g.reward;
        grad_discount[i] = g.discount;
        grad_next_value[i] = g.next_value;
      }
      reward_out.done(row, n);
      discount_out.done(row, n);
      next_out.done(row, n);
    }
  }
  if (stream) stream_fence();
}

template <typename S>
void lambda_return_range(const LambdaReturnArgs<S>& a, int64_t begin, int64_t end) {
  const int variant = (a.lam_rows ? 2 : 0) + (a.valid ? 1 : 0);
  if (variant == 0) forward<S, false, false>(a, begin, end);
  if (variant == 1) forward<S, false, true>(a, begin, end);
  if (variant == 2) forward<S, true, false>(a, begin, end);
  if (variant == 3) forward<S, true, true>(a, begin, end);
}

template <typename S>
void lambda_return_backward_range(const LambdaReturnBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int variant = (a.lam_rows ? 2 : 0) + (a.valid ? 1 : 0);
  if (variant == 0) backward<S, false, false>(a, begin, end);
  if (variant == 1) backward<S, false, true>(a, begin, end);
  if (variant == 2) backward<S, true, false>(a, begin, end);
  if (variant == 3) backward<S, true, true>(a, begin, end);
}

}  // namespace

void fill_lambda_return(Kernels& table) {
  table.f32.lambda_return = lambda_return_range<float>;
  table.f64.lambda_return = lambda_return_range<double>;
  table.f32.lambda_return_backward = lambda_return_backward_range<float>;
  table.f64.lambda_return_backward = lambda_return_backward_range<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
