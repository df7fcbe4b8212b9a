// Two-hot regression on CUDA: the loss and the mean of a row of bins. See pywm/ops/symexp_twohot.py.
//
// What:     Loss and mean of every row, and their gradients from the logits again.
// Layout:   M rows of B logits, contiguous; target, other, loss, mean [M].
// Mapping:  A warp a row; every block makes a table of the bins first, in shared memory. Not measured yet.
// Cost:     Reads the logits twice, the second time from L1, and writes the gradient: bandwidth-bound for many rows.
// Numerics: Formulas of math/ in S. The mean adds bins of opposite sign first: equal logits give exactly 0. No atomics.
// Source:   Hafner et al. 2023, eq. 8 to 10.

#include "../math/twohot.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

// All threads of the block must call.
template <typename S>
__device__ __forceinline__ void fill_bins(S* bins, int64_t B) {
  for (int64_t i = threadIdx.x; i < B; i += kRowThreads) bins[i] = math::symexp_bin<S>(i, B);
  __syncthreads();
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) symexp_twohot_loss_kernel(SymexpTwohotLossArgs<S> a) {
  PYWM_SHARED(S, bins, [kMaxBins]);
  fill_bins(bins, a.B);
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.B;
    const auto softmax = warp_softmax(logits, a.B, lane);
    const auto w = math::two_hot(a.target[m], bins, a.B);
    const S log_sum = math::log(softmax.total);
    S loss = math::two_hot_loss(w, logits[w.low], logits[w.high], softmax.top, log_sum);
    if (a.other) {
      const auto v = math::two_hot(a.other[m], bins, a.B);
      loss += a.other_scale * math::two_hot_loss(v, logits[v.low], logits[v.high], softmax.top, log_sum);
    }
    if (lane == 0) a.loss[m] = loss;
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) symexp_twohot_loss_backward_kernel(SymexpTwohotLossBackwardArgs<S> a) {
  PYWM_SHARED(S, bins, [kMaxBins]);
  fill_bins(bins, a.B);
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.B;
    const auto softmax = warp_softmax(logits, a.B, lane);
    const auto w = math::two_hot(a.target[m], bins, a.B);
    const auto v = a.other ? math::two_hot(a.other[m], bins, a.B) : w;
    const S scale = a.other ? a.other_scale : S(0), total = S(1) + scale, grad = a.grad[m];
    for (int64_t i = lane; i < a.B; i += kWarp) {
      const S targets = math::two_hot_weight(w, i) + (a.other ? scale * math::two_hot_weight(v, i) : S(0));
      a.grad_logits[m * a.B + i] = grad * (total * softmax(logits[i]) - targets);
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) symexp_twohot_mean_kernel(SymexpTwohotMeanArgs<S> a) {
  PYWM_SHARED(S, bins, [kMaxBins]);
  fill_bins(bins, a.B);
  const int lane = threadIdx.x % kWarp;
  const int64_t middle = (a.B - 1) / 2;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.B;
    const auto softmax = warp_softmax(logits, a.B, lane);
    S sum = S(0);
    for (int64_t i = 1 + lane; i <= middle; i += kWarp)
      sum += bins[middle + i] * (softmax(logits[middle + i]) - softmax(logits[middle - i]));
    sum = warp_sum(sum);
    if (lane == 0) a.mean[m] = sum;
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) symexp_twohot_mean_backward_kernel(SymexpTwohotMeanBackwardArgs<S> a) {
  PYWM_SHARED(S, bins, [kMaxBins]);
  fill_bins(bins, a.B);
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.B;
    const auto softmax = warp_softmax(logits, a.B, lane);
    const S grad = a.grad[m], mean = a.mean[m];
    for (int64_t i = lane; i < a.B; i += kWarp)
      a.grad_logits[m * a.B + i] = softmax(logits[i]) * ((bins[i] - mean) * grad);
  }
}

}  // namespace

template <typename S>
void symexp_twohot_loss(const SymexpTwohotLossArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((symexp_twohot_loss_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("symexp_twohot_loss");
}

template <typename S>
void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((symexp_twohot_loss_backward_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("symexp_twohot_loss_backward");
}

template <typename S>
void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((symexp_twohot_mean_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("symexp_twohot_mean");
}

template <typename S>
void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((symexp_twohot_mean_backward_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("symexp_twohot_mean_backward");
}

#define PYWM_INSTANTIATE(S)                                                                  \
  template void symexp_twohot_loss(const SymexpTwohotLossArgs<S>&, Stream);                  \
  template void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>&, Stream); \
  template void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>&, Stream);                  \
  template void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>&, Stream);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cuda
