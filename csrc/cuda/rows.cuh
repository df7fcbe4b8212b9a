// Kernels over rows: how many threads share one, the statistics of a normalised row, sums over all rows.
#pragma once

#include "../math/norm.h"
#include "device.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace pywm::cuda {

constexpr int kRowThreads = 256;
constexpr int64_t kMaxRowBlocks = 8192;
// With sums over rows, each team of threads has sums of its own: fewer teams, so that they stay a small part.
constexpr int64_t kMaxSummingBlocks = 256;
constexpr int64_t kWideRow = 256;  // from here on a block shares a row, below a warp does

// Calls launch.operator()<kTeam>() with the number of threads that share a row of D numbers.
template <typename Launch>
void with_team(int64_t D, const Launch& launch) {
  if (D < kWideRow) return launch.template operator()<kWarp>();
  launch.template operator()<kRowThreads>();
}

inline int64_t row_blocks(int64_t M, int team, int64_t most) {
  const int64_t blocks = ceil_div(M, kRowThreads / team);
  return blocks < most ? blocks : most;
}

// Teams that have sums over rows.
inline int64_t summing_teams(int64_t M, int64_t D) {
  const int team = D < kWideRow ? kWarp : kRowThreads;
  return row_blocks(M, team, kMaxSummingBlocks) * (kRowThreads / team);
}

template <int kTeam, typename S, int kCount>
__device__ __forceinline__ void team_sum(S (&values)[kCount]) {
  if constexpr (kTeam == kWarp) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
  } else {
    block_sum<kTeam>(values);
  }
}

template <int kTeam>
__device__ __forceinline__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * (kRowThreads / kTeam) + threadIdx.x / kTeam;
}
template <int kTeam>
__device__ __forceinline__ int64_t row_step() {
  return static_cast<int64_t>(gridDim.x) * (kRowThreads / kTeam);
}

// The whole team must call.
template <int kTeam, typename S>
__device__ __forceinline__ math::NormRow<S> norm_row(const S* x, int64_t D, bool layer, S eps) {
  const int lane = threadIdx.x % kTeam;
  S mean = S(0);
  if (layer) {
    S sums[1] = {S(0)};
    for (int64_t i = lane; i < D; i += kTeam) sums[0] += x[i];
    team_sum<kTeam>(sums);
    mean = sums[0] / S(D);
  }
  S squares[1] = {S(0)};
  for (int64_t i = lane; i < D; i += kTeam) squares[0] += (x[i] - mean) * (x[i] - mean);
  team_sum<kTeam>(squares);
  return math::norm_row(mean, squares[0] / S(D), eps);
}

// ---- Sums over rows
// ---------------------------------------------------------------------------------------------------

constexpr int kColumnThreads = 512;

// out [columns] := the sum of the rows of x, `stride` elements apart. A warp a slice of the rows, interleaved.
template <typename S>
__global__ void __launch_bounds__(kColumnThreads)
    column_sums_kernel(const S* __restrict__ x, int64_t rows, int64_t stride, int64_t columns, S* __restrict__ out) {
  constexpr int kSlices = kColumnThreads / kWarp;
  PYWM_SHARED(S, of_slices, [kSlices][kWarp]);
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  S sum = S(0);
  if (column < columns)
    for (int64_t r = slice; r < rows; r += kSlices) sum += x[r * stride + column];
  of_slices[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || column >= columns) return;
  sum = S(0);
  for (int s = 0; s < kSlices; ++s) sum += of_slices[s][lane];
  out[column] = sum;
}

template <typename S>
void launch_column_sums(const char* op, const S* x, int64_t rows, int64_t stride, int64_t columns, S* out,
                        Stream stream) {
  PYWM_LAUNCH((column_sums_kernel<S>), dim3(static_cast<unsigned>(ceil_div(columns, kWarp))), dim3(kColumnThreads), 0,
              stream, x, rows, stride, columns, out);
  check_launch(op);
}

}  // namespace pywm::cuda
