// Discounted returns on CUDA. See pywm/ops/discounted_return.py for the definition.
//
// What:     R[t] = r[t] + d[t]·R[t+1], backwards in time, R[T] the bootstrap; its adjoint, forwards.
// Layout:   all [T, N] contiguous, time-major; bootstrap [N].
// Mapping:  scan.cuh.
// Cost:     forward: 2 arrays read, 1 written; backward: 3 read, up to 2 written.
// Numerics: math/returns.h, as on the CPU; equal to it within rounding, for the compiler may fuse multiply-adds.
// Source:   Sutton and Barto 2018, eq. 3.8.

#include "../math/returns.h"
#include "../ops.h"
#include "scan.cuh"

namespace pywm::cuda {
namespace {

template <typename S>
struct DiscountedReturnScan : NoFinish {
  using Value = S;
  static constexpr bool kReverse = true;
  struct Row {
    S reward, discount;
  };

  DiscountedReturnArgs<S> a;

  __device__ __forceinline__ Row load(int64_t, int64_t i) const { return {a.reward[i], a.discount[i]}; }
  __device__ __forceinline__ S start(int64_t n) const { return a.bootstrap[n]; }
  __device__ __forceinline__ S step(const Row& row, S next_return) const {
    return math::discounted_return_step(row.reward, row.discount, next_return);
  }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::discounted_return_grad(S(1), row.discount, S(0)).carry;
  }
  __device__ __forceinline__ bool cuts(const Row&) const { return false; }
  __device__ __forceinline__ void store(int64_t i, const Row&, S, S returns) const { a.returns[i] = returns; }
};

template <typename S>
struct DiscountedReturnBackwardScan {
  using Value = S;
  static constexpr bool kReverse = false;
  struct Row {
    S grad, discount, next_return;
  };

  DiscountedReturnBackwardArgs<S> a;

  __device__ __forceinline__ Row load(int64_t t, int64_t i) const {
    return {a.grad[i], a.discount[i], t == a.T - 1 ? a.bootstrap[i - t * a.N] : a.returns[i + a.N]};
  }
  __device__ __forceinline__ math::DiscountedReturnGrad<S> grad(const Row& row, S carry) const {
    return math::discounted_return_grad(row.grad + carry, row.discount, row.next_return);
  }
  __device__ __forceinline__ S start(int64_t) const { return S(0); }
  __device__ __forceinline__ S step(const Row& row, S carry) const { return grad(row, carry).carry; }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::discounted_return_grad(S(1), row.discount, S(0)).carry;
  }
  __device__ __forceinline__ bool cuts(const Row&) const { return false; }
  __device__ __forceinline__ void store(int64_t i, const Row& row, S carry, S) const {
    const auto g = grad(row, carry);
    if (a.grad_reward) a.grad_reward[i] = g.reward;
    if (a.grad_discount) a.grad_discount[i] = g.discount;
  }
  __device__ __forceinline__ void finish(int64_t n, S carry) const {
    if (a.grad_bootstrap) a.grad_bootstrap[n] = carry;
  }
};

}  // namespace

template <typename S>
void discounted_return(const DiscountedReturnArgs<S>& a, Stream stream) {
  launch_scan("discounted_return", DiscountedReturnScan<S>{{}, a}, a.T, a.N, stream);
}

template <typename S>
void discounted_return_backward(const DiscountedReturnBackwardArgs<S>& a, Stream stream) {
  launch_scan("discounted_return_backward", DiscountedReturnBackwardScan<S>{a}, a.T, a.N, stream);
}

template void discounted_return(const DiscountedReturnArgs<float>&, Stream);
template void discounted_return(const DiscountedReturnArgs<double>&, Stream);
template void discounted_return_backward(const DiscountedReturnBackwardArgs<float>&, Stream);
template void discounted_return_backward(const DiscountedReturnBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
