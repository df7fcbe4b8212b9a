// Averages over areas of bytes on CUDA. See pywm/ops/resize_area.py.
//
// What:     Pictures with fewer pixels, each the average of the area that it covers.
// Layout:   frames [M, h, w], out [M, h2, w2], contiguous.
// Mapping:  A thread a pixel of the result, a grid-stride loop. Not measured yet.
// Cost:     Reads the pixels that a result covers, neighbours' shares from a cache; a multiply-add each.
// Numerics: Integers throughout; the last quotient is exact: the same bytes as on the CPU.
// Source:   OpenCV's INTER_AREA.

#include "../math/pixels.h"
#include "../ops.h"
#include "launch.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

__global__ void __launch_bounds__(kThreads) resize_area_kernel(ResizeAreaArgs a) {
  const math::Average<double> average(a.h * a.w);
  const int64_t total = a.M * a.h2 * a.w2;
  for (int64_t o = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; o < total;
       o += gridDim.x * int64_t{kThreads}) {
    const int64_t i = o / a.w2 % a.h2;
    const uint8_t* frame = a.frames + o / (a.h2 * a.w2) * a.h * a.w;
    const math::Cover rows(i, a.h, a.h2), columns(o % a.w2, a.w, a.w2);
    int64_t sum = 0;
    for (int64_t p = rows.first; p <= rows.last; ++p) {
      int64_t of_row = 0;
      for (int64_t q = columns.first; q <= columns.last; ++q) of_row += columns.overlap(q, a.w2) * frame[p * a.w + q];
      sum += rows.overlap(p, a.h2) * of_row;
    }
    a.out[o] = average(sum);
  }
}

}  // namespace

void resize_area(const ResizeAreaArgs& a, Stream stream) {
  const int64_t blocks = ceil_div(a.M * a.h2 * a.w2, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  PYWM_LAUNCH((resize_area_kernel), grid, dim3(kThreads), 0, stream, a);
  check_launch("resize_area");
}

}  // namespace pywm::cuda
