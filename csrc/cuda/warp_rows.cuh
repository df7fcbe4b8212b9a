// A warp a row: how rows are shared out, and their softmax. For kernels over rows of tens to hundreds of numbers.
#pragma once

#include "../math/exp.h"
#include "device.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace pywm::cuda {

constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr int64_t kMaxRowBlocks = 4096;

inline dim3 row_grid(int64_t rows) {
  const int64_t blocks = ceil_div(rows, kRowWarps);
  return dim3(static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks));
}

// The first row of this warp, and how far it is to its next.
__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kRowWarps + threadIdx.x / kWarp;
}
__device__ __forceinline__ int64_t row_stride() { return static_cast<int64_t>(gridDim.x) * kRowWarps; }

// How a row of logits normalises; softmax(k) of one of them.
template <typename S>
struct WarpSoftmax {
  S top, total, inverse;

  __device__ __forceinline__ S operator()(S logit) const { return math::exp(logit - top) * inverse; }
};

// All lanes of the warp must call.
template <typename S>
__device__ __forceinline__ WarpSoftmax<S> warp_softmax(const S* __restrict__ logits, int64_t n, int lane) {
  S top = -S(INFINITY);
  for (int64_t i = lane; i < n; i += kWarp) top = logits[i] > top ? logits[i] : top;
  top = group_max<kWarp>(top);
  S total = S(0);
  for (int64_t i = lane; i < n; i += kWarp) total += math::exp(logits[i] - top);
  total = warp_sum(total);
  return {top, total, S(1) / total};
}

}  // namespace pywm::cuda
