// Normalisation with an activation on CUDA. See pywm/ops/norm_act.py.
//
// What:     y = f(scale·x̂ + shift); backward, the gradients of x, scale and shift.
// Layout:   M rows of D, contiguous; scale, shift [turns, D], row m's at m % turns.
// Mapping:  A warp a row below kWideRow numbers, a block from there on. Backward, every such team of threads adds up
//           the gradients of scale and shift over its rows, in its part of `partial`, a thread its own columns; a
//           second kernel adds the teams. Predictions, not measured yet.
// Cost:     A row is read two or three times forward, four backward, all but the first from the caches.
// Numerics: math/norm.h in S; sums in a fixed order for given M and D: no atomics, the same result in every run.
// Source:   Zhang and Sennrich 2019; Ba et al. 2016.

#include "../math/activations.h"
#include "../ops.h"
#include "rows.cuh"

namespace pywm::cuda {
namespace {

template <typename S>
__device__ __forceinline__ S activate(Activation f, S x) {
  switch (f) {
    case Activation::kTanh:
      return math::Tanh::value(x);
    case Activation::kSilu:
      return math::Silu::value(x);
    case Activation::kElu:
      return math::Elu::value(x);
    case Activation::kRelu:
      return math::Relu::value(x);
    default:
      return x;
  }
}

template <typename S>
__device__ __forceinline__ S activate_grad(Activation f, S grad, S x) {
  switch (f) {
    case Activation::kTanh:
      return math::Tanh::grad(grad, x);
    case Activation::kSilu:
      return math::Silu::grad(grad, x);
    case Activation::kElu:
      return math::Elu::grad(grad, x);
    case Activation::kRelu:
      return math::Relu::grad(grad, x);
    default:
      return grad;
  }
}

template <typename S>
__device__ __forceinline__ S affine(const S* scale, const S* shift, int64_t i, S hat) {
  return shift ? scale[i] * hat + shift[i] : scale[i] * hat;
}

template <typename S, int kTeam>
__global__ void __launch_bounds__(kRowThreads, 4) norm_act_kernel(NormActArgs<S> a) {
  const int lane = threadIdx.x % kTeam;
  for (int64_t m = first_row<kTeam>(); m < a.M; m += row_step<kTeam>()) {
    const S* x = a.x + m * a.D;
    S* y = a.y + m * a.D;
    const int64_t turn = m % a.turns * a.D;
    const math::NormRow<S> row = norm_row<kTeam>(x, a.D, a.layer, a.eps);
    for (int64_t i = lane; i < a.D; i += kTeam)
      y[i] = activate(a.activation, affine(a.scale, a.shift, turn + i, math::norm_hat(x[i], row)));
  }
}

template <typename S, int kTeam>
__global__ void __launch_bounds__(kRowThreads, 4) norm_act_backward_kernel(NormActBackwardArgs<S> a) {
  const int lane = threadIdx.x % kTeam;
  const int64_t D = a.D;
  S* sums = a.partial ? a.partial + first_row<kTeam>() * 2 * D : nullptr;
  for (int64_t i = lane; i < (sums ? D : 0); i += kTeam) sums[i] = sums[D + i] = S(0);
  for (int64_t m = first_row<kTeam>(); m < a.M; m += row_step<kTeam>()) {
    const S *x = a.x + m * D, *grad = a.grad + m * D;
    const int64_t turn = m % a.turns * D;
    const math::NormRow<S> row = norm_row<kTeam>(x, D, a.layer, a.eps);
    const auto grad_affine = [&](int64_t i, S hat) {
      return activate_grad(a.activation, grad[i], affine(a.scale, a.shift, turn + i, hat));
    };
    S means[2] = {S(0), S(0)};
    for (int64_t i = lane; i < D; i += kTeam) {
      const S hat = math::norm_hat(x[i], row), q = grad_affine(i, hat), d = a.scale[turn + i] * q;
      means[0] += d;
      means[1] += d * hat;
      if (sums) {
        sums[i] += q * hat;
        sums[D + i] += q;
      }
    }
    if (!a.grad_x) continue;
    team_sum<kTeam>(means);
    const S mean_d = a.layer ? means[0] / S(D) : S(0), mean_d_hat = means[1] / S(D);
    for (int64_t i = lane; i < D; i += kTeam) {
      const S hat = math::norm_hat(x[i], row);
      a.grad_x[m * D + i] =
          math::norm_grad(a.scale[turn + i] * grad_affine(i, hat), hat, mean_d, mean_d_hat, row.inverse_std);
    }
  }
}

}  // namespace

int64_t norm_act_workspace(int64_t M, int64_t D) { return summing_teams(M, D) * 2 * D; }

template <typename S>
void norm_act(const NormActArgs<S>& a, Stream stream) {
  with_team(a.D, [&]<int kTeam>() {
    const dim3 grid(static_cast<unsigned>(row_blocks(a.M, kTeam, kMaxRowBlocks)));
    PYWM_LAUNCH((norm_act_kernel<S, kTeam>), grid, dim3(kRowThreads), 0, stream, a);
    check_launch("norm_act");
  });
}

template <typename S>
void norm_act_backward(const NormActBackwardArgs<S>& a, Stream stream) {
  with_team(a.D, [&]<int kTeam>() {
    const int64_t most = a.partial ? kMaxSummingBlocks : kMaxRowBlocks;
    const dim3 grid(static_cast<unsigned>(row_blocks(a.M, kTeam, most)));
    PYWM_LAUNCH((norm_act_backward_kernel<S, kTeam>), grid, dim3(kRowThreads), 0, stream, a);
    check_launch("norm_act_backward");
  });
  const int64_t teams = summing_teams(a.M, a.D);
  const char* op = "norm_act_backward";
  if (a.grad_scale) launch_column_sums(op, a.partial, teams, 2 * a.D, a.D, a.grad_scale, stream);
  if (a.grad_shift) launch_column_sums(op, a.partial + a.D, teams, 2 * a.D, a.D, a.grad_shift, stream);
}

template void norm_act(const NormActArgs<float>&, Stream);
template void norm_act(const NormActArgs<double>&, Stream);
template void norm_act_backward(const NormActBackwardArgs<float>&, Stream);
template void norm_act_backward(const NormActBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
