// Sampling of one-hot groups on CUDA, and its straight-through gradient. See pywm/ops/categorical_sample.py.
//
// What:     Softmax with a share of uniform probability, inverse CDF with one uniform number, one-hot and index.
// Layout:   M groups of K classes, contiguous.
// Mapping:  A warp a group, a lane a class and those 32 further; a grid-stride loop. Not measured yet.
// Cost:     Reads the logits (again from L1) and writes the one-hot: bandwidth-bound for many groups.
// Numerics: Formulas of math/ in S. The CDF is summed one class after the other, by every lane alike, as on the CPU:
//           the same probabilities give the same sample. No atomics.
// Source:   Hafner et al. 2023; the gradient: Bengio et al. 2013.

#include "../math/categorical.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(kRowThreads) categorical_sample_kernel(CategoricalSampleArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  const int K = static_cast<int>(a.K);
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * K;
    const auto softmax = warp_softmax(logits, K, lane);
    // Twice over the classes in order, for the threshold is a share of their total.
    S total = S(0);
    for (int first = 0; first < K; first += kWarp) {
      const S prob = first + lane < K ? math::unimix_prob(softmax(logits[first + lane]), mix) : S(0);
      for (int i = 0; i < kWarp && first + i < K; ++i) total += __shfl_sync(kAllLanes, prob, i);
    }
    const S threshold = a.uniform[m] * total;
    S cdf = S(0);
    int index = 0;
    for (int first = 0; first < K; first += kWarp) {
      const S prob = first + lane < K ? math::unimix_prob(softmax(logits[first + lane]), mix) : S(0);
      for (int i = 0; i < kWarp && first + i < K; ++i) {
        cdf += __shfl_sync(kAllLanes, prob, i);
        index += cdf <= threshold ? 1 : 0;
      }
    }
    index = index < K ? index : K - 1;
    const S zero = total - total;  // NaN where the logits are
    for (int k = lane; k < K; k += kWarp) a.stoch[m * K + k] = (k == index ? S(1) : S(0)) + zero;
    if (lane == 0) a.index[m] = static_cast<uint8_t>(index);
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) categorical_sample_backward_kernel(CategoricalSampleBackwardArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.K;
    const S* grad = a.grad + m * a.K;
    const auto softmax = warp_softmax(logits, a.K, lane);
    S mean = S(0);
    for (int64_t k = lane; k < a.K; k += kWarp) mean += softmax(logits[k]) * grad[k];
    mean = warp_sum(mean);
    for (int64_t k = lane; k < a.K; k += kWarp)
      a.grad_logits[m * a.K + k] = math::unimix_softmax_grad(softmax(logits[k]), grad[k], mean, mix);
  }
}

}  // namespace

template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((categorical_sample_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("categorical_sample");
}

template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((categorical_sample_backward_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("categorical_sample_backward");
}

template void categorical_sample(const CategoricalSampleArgs<float>&, Stream);
template void categorical_sample(const CategoricalSampleArgs<double>&, Stream);
template void categorical_sample_backward(const CategoricalSampleBackwardArgs<float>&, Stream);
template void categorical_sample_backward(const CategoricalSampleBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
