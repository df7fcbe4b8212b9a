// Generalised advantage estimation on CUDA. See pywm/ops/gae.py for the definition.
//
// What:     advantage[t] = δ[t] + γλ·(1 - done[t])·advantage[t+1], backwards in time; its adjoint, forwards.
// Layout:   all [T, N] contiguous, time-major.
// Mapping:  scan.cuh.
// Cost:     forward: 3 arrays and 2 masks (3 with `valid`) read, 2 arrays written; backward: up to 2 read, 3 written.
// Numerics: math/returns.h, as on the CPU; equal to it within rounding, for the compiler may fuse multiply-adds.
// Source:   Schulman et al. 2016, eq. 16; terminated and truncated as in Pardo et al. 2018.

#include "../math/returns.h"
#include "../ops.h"
#include "scan.cuh"

namespace pywm::cuda {
namespace {

template <typename S>
struct GaeScan : NoFinish {
  using Value = S;
  static constexpr bool kReverse = true;
  struct Row {
    S reward, value, next_value;
    bool terminated, truncated, valid;
  };

  GaeArgs<S> a;

  __device__ __forceinline__ Row load(int64_t, int64_t i) const {
    return {a.reward[i],          a.value[i],          a.next_value[i],
            a.terminated[i] != 0, a.truncated[i] != 0, a.valid == nullptr || a.valid[i] != 0};
  }
  __device__ __forceinline__ S start(int64_t) const { return S(0); }
  __device__ __forceinline__ S step(const Row& row, S next_advantage) const {
    const S delta = math::gae_delta(row.reward, row.value, row.next_value, row.terminated, a.discount);
    const S advantage = math::gae_step(delta, next_advantage, row.terminated, row.truncated, a.discount * a.lam);
    return row.valid ? advantage : S(0);
  }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::gae_decay(row.terminated, row.truncated, a.discount * a.lam);
  }
  __device__ __forceinline__ bool cuts(const Row& row) const { return !row.valid || row.terminated || row.truncated; }
  __device__ __forceinline__ void store(int64_t i, const Row& row, S, S advantage) const {
    a.advantage[i] = advantage;
    a.returns[i] = row.valid ? advantage + row.value : row.value;
  }
};

template <typename S>
struct GaeBackwardScan : NoFinish {
  using Value = S;
  static constexpr bool kReverse = false;
  struct Row {
    S grad_advantage, grad_returns;
    bool terminated, truncated, valid;
  };

  GaeBackwardArgs<S> a;

  __device__ __forceinline__ Row load(int64_t, int64_t i) const {
    return {a.grad_advantage ? a.grad_advantage[i] : S(0), a.grad_returns ? a.grad_returns[i] : S(0),
            a.terminated[i] != 0, a.truncated[i] != 0, a.valid == nullptr || a.valid[i] != 0};
  }
  __device__ __forceinline__ math::GaeGrad<S> grad(const Row& row, S carry) const {
    return math::gae_grad(row.grad_advantage, row.grad_returns, carry, row.terminated, row.truncated, row.valid,
                          a.discount, a.discount * a.lam);
  }
  __device__ __forceinline__ S start(int64_t) const { return S(0); }
  __device__ __forceinline__ S step(const Row& row, S carry) const { return grad(row, carry).carry; }
  __device__ __forceinline__ S decay(const Row& row) const {
    return math::gae_decay(row.terminated, row.truncated, a.discount * a.lam);
  }
  __device__ __forceinline__ bool cuts(const Row& row) const { return !row.valid || row.terminated || row.truncated; }
  __device__ __forceinline__ void store(int64_t i, const Row& row, S carry, S) const {
    const auto g = grad(row, carry);
    if (a.grad_reward) a.grad_reward[i] = g.reward;
    if (a.grad_value) a.grad_value[i] = g.value;
    if (a.grad_next_value) a.grad_next_value[i] = g.next_value;
  }
};

}  // namespace

template <typename S>
void gae(const GaeArgs<S>& a, Stream stream) {
  launch_scan("gae", GaeScan<S>{{}, a}, a.T, a.N, stream);
}

template <typename S>
void gae_backward(const GaeBackwardArgs<S>& a, Stream stream) {
  launch_scan("gae_backward", GaeBackwardScan<S>{{}, a}, a.T, a.N, stream);
}

template void gae(const GaeArgs<float>&, Stream);
template void gae(const GaeArgs<double>&, Stream);
template void gae_backward(const GaeBackwardArgs<float>&, Stream);
template void gae_backward(const GaeBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
