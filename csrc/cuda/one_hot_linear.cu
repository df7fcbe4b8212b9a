// The linear layer of one-hot vectors on CUDA. See pywm/ops/one_hot_linear.py.
//
// What:     y[m] = bias + the sum of `groups` columns of weight; backward, the gradients of weight and bias.
// Layout:   weight [U, groups·classes], whose columns are far apart in memory; index [M, groups].
// Mapping:  Tiles of kTile outputs and kTile classes of one group pass through shared memory, where a lane has the row
//           of its output to itself. Forward, a block has kTile outputs and kRows rows of y and goes over all groups;
//           backward, a block has one tile of the weight's gradient, and its warps share the rows. Predictions, not
//           measured yet.
// Cost:     weight is read once for every kRows rows; backward, grad once for every tile of classes.
// Numerics: sums in S, in a fixed order: no atomics, the same result in every run. An index that is no class counts as
//           the last one, for no error can be raised without waiting for the device.
// Source:   Its definition, a linear layer of one-hot vectors without the products with 0; from no paper.

#include "../ops.h"
#include "rows.cuh"

namespace pywm::cuda {
namespace {

constexpr int kTile = kWarp;
constexpr int kForwardWarps = 8, kRowsOfWarp = 8, kRows = kForwardWarps * kRowsOfWarp;
constexpr int kBackwardWarps = 4;

__device__ __forceinline__ int64_t class_of(const uint8_t* index, int64_t classes) {
  return *index < classes ? *index : classes - 1;
}

// Classes beyond the largest index are never chosen.
__host__ __device__ __forceinline__ int64_t used_classes(int64_t classes) { return classes < 256 ? classes : 256; }

template <typename S>
__global__ void __launch_bounds__(kForwardWarps* kWarp) one_hot_linear_kernel(OneHotLinearArgs<S> a) {
  PYWM_SHARED(S, tile, [kTile][kTile + 1]);  // [output][class]; one more, so that a column's banks differ
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t columns = a.groups * a.classes, first_u = static_cast<int64_t>(blockIdx.y) * kTile, u = first_u + lane;
  const S start = a.bias && u < a.U ? a.bias[u] : S(0);
  for (int64_t first_m = static_cast<int64_t>(blockIdx.x) * kRows; first_m < a.M;
       first_m += static_cast<int64_t>(gridDim.x) * kRows) {
    S sums[kRowsOfWarp];
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) sums[r] = start;
    for (int64_t s = 0; s < a.groups; ++s)
      for (int64_t first_k = 0; first_k < used_classes(a.classes); first_k += kTile) {
        __syncthreads();  // the last tile has been read
        for (int j = warp; j < kTile; j += kForwardWarps) {
          const bool inside = first_u + j < a.U && first_k + lane < a.classes;
          tile[j][lane] = inside ? a.weight[(first_u + j) * columns + s * a.classes + first_k + lane] : S(0);
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < kRowsOfWarp; ++r) {
          const int64_t m = first_m + warp * kRowsOfWarp + r;
          if (m >= a.M) continue;
          const int64_t k = class_of(a.index + m * a.groups + s, a.classes) - first_k;
          if (k >= 0 && k < kTile) sums[r] += tile[lane][k];
        }
      }
#pragma unroll
    for (int r = 0; r < kRowsOfWarp; ++r) {
      const int64_t m = first_m + warp * kRowsOfWarp + r;
      if (m < a.M && u < a.U) a.y[m * a.U + u] = sums[r];
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kBackwardWarps* kWarp) one_hot_linear_backward_kernel(OneHotLinearBackwardArgs<S> a) {
  PYWM_SHARED(S, tiles, [kBackwardWarps][kTile][kTile + 1]);  // [warp][output][class]
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t columns = a.groups * a.classes, first_u = static_cast<int64_t>(blockIdx.y) * kTile, u = first_u + lane;
  const int64_t tiles_of_group = ceil_div(a.classes, kTile);
  const int64_t s = blockIdx.x / tiles_of_group, first_k = blockIdx.x % tiles_of_group * kTile;
  for (int k = 0; k < kTile; ++k) tiles[warp][lane][k] = S(0);
  const int64_t rows = ceil_div(a.M, kBackwardWarps), begin = warp * rows;
  const int64_t end = begin + rows < a.M ? begin + rows : a.M;
  if (u < a.U)
    for (int64_t m = begin; m < end; ++m) {
      const int64_t k = class_of(a.index + m * a.groups + s, a.classes) - first_k;
      if (k >= 0 && k < kTile) tiles[warp][lane][k] += a.grad[m * a.U + u];
    }
  __syncthreads();
  for (int j = warp; j < kTile; j += kBackwardWarps) {
    if (first_u + j >= a.U || first_k + lane >= a.classes) continue;
    S sum = S(0);
    for (int w = 0; w < kBackwardWarps; ++w) sum += tiles[w][j][lane];
    a.grad_weight[(first_u + j) * columns + s * a.classes + first_k + lane] = sum;
  }
}

}  // namespace

template <typename S>
void one_hot_linear(const OneHotLinearArgs<S>& a, Stream stream) {
  const int64_t blocks = ceil_div(a.M, kRows);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxRowBlocks ? blocks : kMaxRowBlocks),
                  static_cast<unsigned>(ceil_div(a.U, kTile)));
  PYWM_LAUNCH((one_hot_linear_kernel<S>), grid, dim3(kForwardWarps * kWarp), 0, stream, a);
  check_launch("one_hot_linear");
}

template <typename S>
void one_hot_linear_backward(const OneHotLinearBackwardArgs<S>& a, Stream stream) {
  const char* op = "one_hot_linear_backward";
  if (a.grad_weight) {
    const dim3 grid(static_cast<unsigned>(a.groups * ceil_div(a.classes, kTile)),
                    static_cast<unsigned>(ceil_div(a.U, kTile)));
    PYWM_LAUNCH((one_hot_linear_backward_kernel<S>), grid, dim3(kBackwardWarps * kWarp), 0, stream, a);
    check_launch(op);
  }
  if (a.grad_bias) launch_column_sums(op, a.grad, a.M, a.U, a.U, a.grad_bias, stream);
}

template void one_hot_linear(const OneHotLinearArgs<float>&, Stream);
template void one_hot_linear(const OneHotLinearArgs<double>&, Stream);
template void one_hot_linear_backward(const OneHotLinearBackwardArgs<float>&, Stream);
template void one_hot_linear_backward(const OneHotLinearBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
