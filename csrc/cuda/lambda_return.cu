// λ-returns on CUDA. See pywm/ops/lambda_return.py for the definition.
//
// What:     R[t] = r[t] + d[t]·[(1-λ)·V'[t] + λ·R[t+1]], backwards in time, where R[t+1] is V'[t] in the last row and
//           before an invalid one; its adjoint, forwards.
// Layout:   all [T, N] contiguous, time-major; λ a number or [T, N].
// Mapping:  scan.cuh.
// Cost:     forward: 3 arrays read (and λ, and `valid` twice), 1 written; backward: 4 read, up to 3 written.
// Numerics: math/returns.h, as on the CPU; equal to it within rounding, for the compiler may fuse multiply-adds.
// Source:   Sutton & Barto 2018, eq. 12.18, with discounts per step.

#include "../math/returns.h"
#include "../ops.h"
#include "scan.cuh"

namespace pywm::cuda {
namespace {

__device__ __forceinline__ bool is_valid(const uint8_t* valid, int64_t i) { return valid == nullptr || valid[i] != 0; }

template <typename S>
struct LambdaReturnScan : NoFinish {
  using Value = S;
  static constexpr bool kReverse = true;
  struct Row {
    S reward, discount, next_value, lam;
    bool valid, bootstraps;
  };

  LambdaReturnArgs<S> a;

  __device__ __forceinline__ Row load(int64_t t, int64_t i) const {
    return {a.reward[i],          a.discount[i],
            a.next_value[i],      a.lam_rows ? a.lam_rows[i] : a.lam,
            is_valid(a.valid, i), t == a.T - 1 || !is_valid(a.valid, i + a.N)};
  }
  __device__ __forceinline__ S start(int64_t) const { return S(0); }  // never used: the last row bootstraps
  __device__ __forceinline__ S step(const Row& row, S next_return) const {
    const S returns = math::lambda_return_step(row.reward, row.discount, row.next_value,
                                               row.bootstraps ? row.next_value : next_return, row.lam);
    return row.valid ? returns : S(0);
  }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::lambda_return_grad(S(1), row.discount, S(0), S(0), row.lam, row.valid, row.bootstraps).carry;
  }
  __device__ __forceinline__ bool cuts(const Row& row) const { return !row.valid || row.bootstraps; }
  __device__ __forceinline__ void store(int64_t i, const Row&, S, S returns) const { a.returns[i] = returns; }
};

template <typename S>
struct LambdaReturnBackwardScan : NoFinish {
  using Value = S;
  static constexpr bool kReverse = false;
  struct Row {
    S grad, discount, next_value, next_return, lam;
    bool valid, bootstraps;
  };

  LambdaReturnBackwardArgs<S> a;

  __device__ __forceinline__ Row load(int64_t t, int64_t i) const {
    const bool bootstraps = t == a.T - 1 || !is_valid(a.valid, i + a.N);
    const S next_value = a.next_value[i];
    return {a.grad[i],
            a.discount[i],
            next_value,
            bootstraps ? next_value : a.returns[i + a.N],
            a.lam_rows ? a.lam_rows[i] : a.lam,
            is_valid(a.valid, i),
            bootstraps};
  }
  __device__ __forceinline__ math::LambdaReturnGrad<S> grad(const Row& row, S carry) const {
    return math::lambda_return_grad(row.grad + carry, row.discount, row.next_value, row.next_return, row.lam, row.valid,
                                    row.bootstraps);
  }
  __device__ __forceinline__ S start(int64_t) const { return S(0); }
  __device__ __forceinline__ S step(const Row& row, S carry) const { return grad(row, carry).carry; }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::lambda_return_grad(S(1), row.discount, S(0), S(0), row.lam, row.valid, row.bootstraps).carry;
  }
  __device__ __forceinline__ bool cuts(const Row& row) const { return !row.valid || row.bootstraps; }
  __device__ __forceinline__ void store(int64_t i, const Row& row, S carry, S) const {
    const auto g = grad(row, carry);
    if (a.grad_reward) a.grad_reward[i] = g.reward;
    if (a.grad_discount) a.grad_discount[i] = g.discount;
    if (a.grad_next_value) a.grad_next_value[i] = g.next_value;
  }
};

}  // namespace

template <typename S>
void lambda_return(const LambdaReturnArgs<S>& a, Stream stream) {
  launch_scan("lambda_return", LambdaReturnScan<S>{{}, a}, a.T, a.N, stream);
}

template <typename S>
void lambda_return_backward(const LambdaReturnBackwardArgs<S>& a, Stream stream) {
  launch_scan("lambda_return_backward", LambdaReturnBackwardScan<S>{{}, a}, a.T, a.N, stream);
}

template void lambda_return(const LambdaReturnArgs<float>&, Stream);
template void lambda_return(const LambdaReturnArgs<double>&, Stream);
template void lambda_return_backward(const LambdaReturnBackwardArgs<float>&, Stream);
template void lambda_return_backward(const LambdaReturnBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
