// Stacks of frames from a storage of bytes on CUDA. See pywm/ops/stack_frames.py.
//
// What:     Each stack's frames, scaled, standardised or as they are, plus noise where there is some.
// Layout:   frames [R, C, pixels], out [B, stack, C, pixels], contiguous.
// Mapping:  A block a channel of a frame, a grid-stride loop. Not measured yet.
// Cost:     Reads 1 byte a pixel (standardised: again, from a cache) and writes a number: bandwidth-bound.
// Numerics: Sums of bytes are integers, mean and deviation float64, the rest S, as on the CPU. A row that is not there
//           counts as the nearest one. No atomics.
// Source:   Mnih et al. 2015; Kaiser et al. 2020.

#include "../math/pixels.h"
#include "../ops.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65536;

// A frame's channel: where it is read, and its place in the result.
template <typename S>
__device__ __forceinline__ const uint8_t* channel_of(const StackFramesArgs<S>& a, int64_t plane) {
  const int64_t i = plane / a.C, b = i / a.stack, back = (a.stack - 1 - i % a.stack) * a.stride;
  return a.frames + (math::stack_row(a.index[b], a.first[b], back, a.R) * a.C + plane % a.C) * a.pixels;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) stack_frames_kernel(StackFramesArgs<S> a) {
  const S scale = static_cast<S>(a.scale);
  for (int64_t plane = blockIdx.x; plane < a.B * a.stack * a.C; plane += gridDim.x) {
    const uint8_t* x = channel_of(a, plane);
    const S* noise = a.noise ? a.noise + plane * a.pixels : nullptr;
    S* y = a.out + plane * a.pixels;
    for (int64_t p = threadIdx.x; p < a.pixels; p += kThreads)
      y[p] = static_cast<S>(x[p]) * scale + (noise ? noise[p] : S(0));
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) stack_frames_standardize_kernel(StackFramesArgs<S> a) {
  for (int64_t plane = blockIdx.x; plane < a.B * a.stack * a.C; plane += gridDim.x) {
    const uint8_t* x = channel_of(a, plane);
    int64_t sums[2] = {0, 0};
    for (int64_t p = threadIdx.x; p < a.pixels; p += kThreads) {
      const int64_t v = x[p];
      sums[0] += v;
      sums[1] += v * v;
    }
    block_sum<kThreads>(sums);
    const math::Standard<S> standard(static_cast<double>(sums[0]), static_cast<double>(sums[1]),
                                     static_cast<double>(a.pixels));
    const S* noise = a.noise ? a.noise + plane * a.pixels : nullptr;
    S* y = a.out + plane * a.pixels;
    for (int64_t p = threadIdx.x; p < a.pixels; p += kThreads) y[p] = standard(x[p]) + (noise ? noise[p] : S(0));
  }
}

__global__ void __launch_bounds__(kThreads) stack_frames_copy_kernel(StackFramesArgs<uint8_t> a) {
  for (int64_t plane = blockIdx.x; plane < a.B * a.stack * a.C; plane += gridDim.x) {
    const uint8_t* x = channel_of(a, plane);
    uint8_t* y = a.out + plane * a.pixels;
    for (int64_t p = threadIdx.x; p < a.pixels; p += kThreads) y[p] = x[p];
  }
}

template <typename S>
dim3 plane_grid(const StackFramesArgs<S>& a) {
  const int64_t planes = a.B * a.stack * a.C;
  return dim3(static_cast<unsigned>(planes < kMaxBlocks ? planes : kMaxBlocks));
}

}  // namespace

template <typename S>
void stack_frames(const StackFramesArgs<S>& a, Stream stream) {
  if (a.standardize)
    PYWM_LAUNCH((stack_frames_standardize_kernel<S>), plane_grid(a), dim3(kThreads), 0, stream, a);
  else
    PYWM_LAUNCH((stack_frames_kernel<S>), plane_grid(a), dim3(kThreads), 0, stream, a);
  check_launch("stack_frames");
}

template <>
void stack_frames(const StackFramesArgs<uint8_t>& a, Stream stream) {
  PYWM_LAUNCH((stack_frames_copy_kernel), plane_grid(a), dim3(kThreads), 0, stream, a);
  check_launch("stack_frames");
}

template void stack_frames(const StackFramesArgs<float>&, Stream);
template void stack_frames(const StackFramesArgs<double>&, Stream);

}  // namespace pywm::cuda
