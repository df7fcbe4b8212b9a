// Generalised advantage estimation on the CPU. See pywm/ops/gae.py for the definition.
//
// What: advantage[t] = δ[t] + γλ·(1 - done[t])·advantage[t+1], backwards in time; its adjoint, forwards.
// Layout: all [T, N] contiguous, time-major.
// Mapping: threads share the columns, in multiples of 16. Time is serial, columns are not. Wide arrays go in blocks of
//   kBlock columns, row by row; medium ones in strips whose carries stay in registers. Forward, narrow ones (few
//   environments, long rollouts) would leave the vector units idle: there everything that does not depend on the
//   recursion is computed for many rows at once, and only one multiply-add a row stays in the chain.
// Cost: an element reads 3 numbers and 2 masks (3 with `valid`) and writes 2, backward up to 2 and 3: 22 bytes in
//   float32 either way, for 6 flops, backward 5. Outputs of large calls bypass the caches.
// Numerics: ../math/returns.h in S; a column is one chain in the order of time, whatever the number of threads. No
//   advantage passes an end of an episode, NaN included.
// Source: Schulman et al. (2016), eq. 16; terminated and truncated as in Pardo et al. (2018).

#include "../math/returns.h"
#include "kernels.h"
#include "rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kNarrow = 8;  // fewer columns than this fill no vector
constexpr int64_t kWide = 128;  // from here on, walking whole rows serves the memory best

// One row of `n` columns, from `row` on. With a constant n the carries stay in registers.
template <typename S, bool kMasked>
inline void gae_row(const GaeArgs<S>& a, int64_t row, int64_t n, S* __restrict carry, S* __restrict advantage,
                    S* __restrict returns) {
  const S discount = a.discount, discount_lam = a.discount * a.lam;
  const S* __restrict reward = a.reward + row;
  const S* __restrict value = a.value + row;
  const S* __restrict next_value = a.next_value + row;
  const uint8_t* __restrict terminated = a.terminated + row;
  const uint8_t* __restrict truncated = a.truncated + row;
  const uint8_t* __restrict valid = kMasked ? a.valid + row : nullptr;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S delta = math::gae_delta(reward[i], value[i], next_value[i], terminated[i] != 0, discount);
    S x = math::gae_step(delta, carry[i], terminated[i] != 0, truncated[i] != 0, discount_lam);
    S y = x + value[i];
    if constexpr (kMasked) {
      x = math::select(valid[i] != 0, x, S(0));
      y = math::select(valid[i] != 0, y, value[i]);
    }
    carry[i] = x;
    advantage[i] = x;
    returns[i] = y;
  }
}

template <typename S, bool kMasked>
void wide(const GaeArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(5 * sizeof(S) + 2) > kStreamBytes;
  OutRow<S> advantage_out(a.advantage, stream), returns_out(a.returns, stream);
  alignas(64) S carry[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const int64_t row = t * a.N + first;
      S *advantage = advantage_out.row(row), *returns = returns_out.row(row);
      over_row(n, stream && t > 0, [&](int64_t i, int64_t count, bool fetches) {
        if (fetches) {
          const int64_t ahead = row - a.N + i;
          fetch(a.reward + ahead);
          fetch(a.value + ahead);
          fetch(a.next_value + ahead);
          fetch(a.terminated + ahead);
          fetch(a.truncated + ahead);
          if (kMasked) fetch(a.valid + ahead);
        }
        gae_row<S, kMasked>(a, row + i, count, carry + i, advantage + i, returns + i);
      });
      advantage_out.done(row, n);
      returns_out.done(row, n);
    }
  }
  if (stream) stream_fence();
}

// Few columns: what a row costs beside its columns would dominate, so go down the time axis in strips of fixed width.
template <typename S, bool kMasked, int kColumns>
void strips(const GaeArgs<S>& a, int64_t& first, int64_t end) {
  for (; first + kColumns <= end; first += kColumns) {
    S carry[kColumns] = {};
    for (int64_t t = a.T - 1; t >= 0; --t) {
      const int64_t row = t * a.N + first;
      gae_row<S, kMasked>(a, row, kColumns, carry, a.advantage + row, a.returns + row);
    }
  }
}

template <typename S, bool kMasked>
void medium(const GaeArgs<S>& a, int64_t begin, int64_t end) {
  strips<S, kMasked, 32>(a, begin, end);
  strips<S, kMasked, 16>(a, begin, end);
  strips<S, kMasked, 8>(a, begin, end);
  if (begin < end) wide<S, kMasked>(a, begin, end);
}

template <typename S, bool kMasked>
void narrow(const GaeArgs<S>& a) {
  constexpr int64_t kFlat = 2048;
  const S discount = a.discount, discount_lam = a.discount * a.lam;
  const int64_t N = a.N, rows = kFlat / N;
  alignas(64) S delta[kFlat], decay[kFlat];
  S carry[kNarrow] = {};
  for (int64_t end = a.T; end > 0; end -= rows) {
    const int64_t t0 = end > rows ? end - rows : 0, base = t0 * N, n = (end - t0) * N;
    const S* __restrict reward = a.reward + base;
    const S* __restrict value = a.value + base;
    const S* __restrict next_value = a.next_value + base;
    const uint8_t* __restrict terminated = a.terminated + base;
    const uint8_t* __restrict truncated = a.truncated + base;
    const uint8_t* __restrict valid = kMasked ? a.valid + base : nullptr;
    S* __restrict advantage = a.advantage + base;
    S* __restrict returns = a.returns + base;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      S x = math::gae_delta(reward[i], value[i], next_value[i], terminated[i] != 0, discount);
      S k = math::gae_decay(terminated[i] != 0, truncated[i] != 0, discount_lam);
      if constexpr (kMasked) {
        x = math::select(valid[i] != 0, x, S(0));
        k = math::select(valid[i] != 0, k, S(0));
      }
      delta[i] = x;
      decay[i] = k;
    }
    for (int64_t column = 0; column < N; ++column) {
      S x = carry[column];
      for (int64_t i = n - N + column; i >= 0; i -= N) {
        // A rare, well predicted branch: a select would lengthen the chain, and
        // 0·NaN must not leak across an end.
        if (__builtin_expect(decay[i] == S(0), 0))
          x = delta[i];
        else
          x = delta[i] + decay[i] * x;
        advantage[i] = x;
      }
      carry[column] = x;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const S y = advantage[i] + value[i];
      returns[i] = math::select(!kMasked || valid[i] != 0, y, value[i]);
    }
  }
}

// `n` columns of a row, from where the pointers point on.
template <typename S, bool kMasked>
inline void backward_row(const GaeBackwardArgs<S>& a, int64_t row, int64_t n, const S* __restrict grad_advantage,
                         const S* __restrict grad_returns, S* __restrict carry, S* __restrict grad_reward,
                         S* __restrict grad_value, S* __restrict grad_next_value) {
  const S discount = a.discount, discount_lam = a.discount * a.lam;
  const uint8_t* __restrict terminated = a.terminated + row;
  const uint8_t* __restrict truncated = a.truncated + row;
  const uint8_t* __restrict valid = kMasked ? a.valid + row : nullptr;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const auto g = math::gae_grad(grad_advantage[i], grad_returns[i], carry[i], terminated[i] != 0, truncated[i] != 0,
                                  !kMasked || valid[i] != 0, discount, discount_lam);
    carry[i] = g.carry;
    grad_reward[i] = g.reward;
    grad_value[i] = g.value;
    grad_next_value[i] = g.next_value;
  }
}

template <typename S>
struct BackwardRows {
  InRow<S> grad_advantage, grad_returns;
  OutRow<S> reward, value, next_value;

  BackwardRows(const GaeBackwardArgs<S>& a, bool stream)
      : grad_advantage(a.grad_advantage),
        grad_returns(a.grad_returns),
        reward(a.grad_reward, stream),
        value(a.grad_value, stream),
        next_value(a.grad_next_value, stream) {}
};

template <typename S, bool kMasked, int kColumns>
void backward_strips(const GaeBackwardArgs<S>& a, BackwardRows<S>& rows, int64_t& first, int64_t end) {
  for (; first + kColumns <= end; first += kColumns) {
    S carry[kColumns] = {};
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = t * a.N + first;
      backward_row<S, kMasked>(a, row, kColumns, rows.grad_advantage.row(row), rows.grad_returns.row(row), carry,
                               rows.reward.row(row), rows.value.row(row), rows.next_value.row(row));
    }
  }
}

template <typename S, bool kMasked>
void backward(const GaeBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const bool stream = a.T * a.N * int64_t(5 * sizeof(S) + 2) > kStreamBytes;
  BackwardRows<S> rows(a, stream);
  if (a.N < kWide) {
    backward_strips<S, kMasked, 32>(a, rows, begin, end);
    backward_strips<S, kMasked, 16>(a, rows, begin, end);
    backward_strips<S, kMasked, 8>(a, rows, begin, end);
  }
  alignas(64) S carry[kBlock];
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t n = end - first < kBlock ? end - first : kBlock;
    fill(carry, n, S(0));
    for (int64_t t = 0; t < a.T; ++t) {
      const int64_t row = t * a.N + first;
      const S *grad_advantage = rows.grad_advantage.row(row), *grad_returns = rows.grad_returns.row(row);
      S *grad_reward = rows.reward.row(row), *grad_value = rows.value.row(row);
      S* grad_next_value = rows.next_value.row(row);
      over_row(n, stream && t + 1 < a.T, [&](int64_t i, int64_t count, bool fetches) {
        if (fetches) {
          const int64_t ahead = row + a.N + i;
          rows.grad_advantage.fetch_ahead(ahead);
          rows.grad_returns.fetch_ahead(ahead);
          fetch(a.terminated + ahead);
          fetch(a.truncated + ahead);
          if (kMasked) fetch(a.valid + ahead);
        }
        backward_row<S, kMasked>(a, row + i, count, grad_advantage + i, grad_returns + i, carry + i, grad_reward + i,
                                 grad_value + i, grad_next_value + i);
      });
      rows.reward.done(row, n);
      rows.value.done(row, n);
      rows.next_value.done(row, n);
    }
  }
  if (stream) stream_fence();
}

template <typename S>
void gae_range(const GaeArgs<S>& a, int64_t begin, int64_t end) {
  if (a.N < kNarrow) return a.valid ? narrow<S, true>(a) : narrow<S, false>(a);
  if (a.N < kWide) return a.valid ? medium<S, true>(a, begin, end) : medium<S, false>(a, begin, end);
  a.valid ? wide<S, true>(a, begin, end) : wide<S, false>(a, begin, end);
}

template <typename S>
void gae_backward_range(const GaeBackwardArgs<S>& a, int64_t begin, int64_t end) {
  a.valid ? backward<S, true>(a, begin, end) : backward<S, false>(a, begin, end);
}

}  // namespace

void fill_gae(Kernels& table) {
  table.f32.gae = gae_range<float>;
  table.f64.gae = gae_range<double>;
  table.f32.gae_backward = gae_backward_range<float>;
  table.f64.gae_backward = gae_backward_range<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
