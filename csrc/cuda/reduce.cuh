// Sums over part of a warp and over a block, in the same order in every run: no atomics.
#pragma once

#include "device.cuh"

namespace pywm::cuda {

// Over groups of kLanes neighbouring lanes; every lane gets its group's result. All lanes of the warp must call.
template <int kLanes, typename S>
__device__ __forceinline__ S group_sum(S value) {
  static_assert(kLanes >= 1 && kLanes <= kWarp && (kLanes & (kLanes - 1)) == 0);
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

template <int kLanes, typename S>
__device__ __forceinline__ S group_max(S value) {
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    const S other = __shfl_xor_sync(kAllLanes, value, lanes);
    value = other > value ? other : value;
  }
  return value;
}

// Replaces each of the kCount values by its sum over the block's kThreads threads. All of them must call.
template <int kThreads, typename S, int kCount>
__device__ __forceinline__ void block_sum(S (&values)[kCount]) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0);
  PYWM_SHARED(S, of_warps, [kCount][kWarps]);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const S sum = warp_sum(values[i]);
    if (lane == 0) of_warps[i][warp] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (int w = 0; w < kWarps; ++w) values[i] += of_warps[i][w];
  }
  __syncthreads();  // the next call writes the same array
}

}  // namespace pywm::cuda
