// Cross-entropy of pixels as classes on CUDA, less a cut-off. See pywm/ops/pixel_cross_entropy.py.
//
// What:     The loss of every row; backward, the gradient of the logits from the losses, the logits and the targets.
// Layout:   M rows of K logits, contiguous; target, loss [M].
// Mapping:  A warp a row, a grid-stride loop. Not measured yet.
// Cost:     Reads the logits (forward again from L1) and writes the gradient: bandwidth-bound. Backward, a row without
//           a loss is written only.
// Numerics: Formulas of math/ in S; backward as on the CPU. A target that is no class counts as the last one.
// Source:   Kaiser et al. 2020.

#include "../math/pixels.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

__device__ __forceinline__ int64_t class_of(uint8_t target, int64_t K) { return target < K ? target : K - 1; }

template <typename S>
__global__ void __launch_bounds__(kRowThreads) pixel_cross_entropy_kernel(PixelCrossEntropyArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.K;
    const auto softmax = warp_softmax(logits, a.K, lane);
    const S at = logits[class_of(a.target[m], a.K)];
    if (lane == 0) a.loss[m] = math::cut_off((softmax.top - at) + math::log(softmax.total), a.cutoff);
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) pixel_cross_entropy_backward_kernel(PixelCrossEntropyBackwardArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S* logits = a.logits + m * a.K;
    S* grad_logits = a.grad_logits + m * a.K;
    const S loss = a.loss[m], grad = a.grad[m];
    if (loss == S(0)) {
      for (int64_t k = lane; k < a.K; k += kWarp) grad_logits[k] = S(0);
      continue;
    }
    const int64_t target = class_of(a.target[m], a.K);
    const S ce = loss + a.cutoff, at = logits[target];
    if (ce < S(INFINITY)) {
      for (int64_t k = lane; k < a.K; k += kWarp)
        grad_logits[k] = math::exp_below((logits[k] - at) - ce) * grad - (k == target ? grad : S(0));
    } else {  // a probability of 0, or NaN
      const auto softmax = warp_softmax(logits, a.K, lane);
      for (int64_t k = lane; k < a.K; k += kWarp)
        grad_logits[k] = softmax(logits[k]) * grad - (k == target ? grad : S(0));
    }
  }
}

}  // namespace

template <typename S>
void pixel_cross_entropy(const PixelCrossEntropyArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((pixel_cross_entropy_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("pixel_cross_entropy");
}

template <typename S>
void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((pixel_cross_entropy_backward_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("pixel_cross_entropy_backward");
}

template void pixel_cross_entropy(const PixelCrossEntropyArgs<float>&, Stream);
template void pixel_cross_entropy(const PixelCrossEntropyArgs<double>&, Stream);
template void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<float>&, Stream);
template void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
