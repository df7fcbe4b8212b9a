// Random numbers by counting on CUDA. See pywm/ops/philox.py for the definition.
//
// What:     Fills [T, N, slots] with uniform or normal numbers.
// Layout:   Contiguous, a row (t, n) after the other.
// Mapping:  A thread a counter, that is four neighbouring slots of a row; a grid-stride loop. Not measured yet.
// Cost:     Writes every number once: bandwidth, or 10 rounds of two 32-bit multiplications for four numbers.
// Numerics: The same words as on the CPU; uniforms equal to the bit, normals to rounding.
// Source:   Salmon et al. 2011.

#include "../math/philox.h"
#include "../ops.h"
#include "launch.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;

template <typename S>
__global__ void __launch_bounds__(kThreads) philox_kernel(PhiloxArgs<S> a) {
  const int64_t per_row = (a.slots + 3) / 4, total = a.T * a.N * per_row;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += gridDim.x * int64_t{kThreads}) {
    const int64_t row = i / per_row, part = i % per_row, t = row / a.N, n = row % a.N;
    const math::PhiloxBlock made = math::philox(static_cast<uint32_t>(n), static_cast<uint32_t>(a.offset + t),
                                                static_cast<uint32_t>(a.stream), static_cast<uint32_t>(part), a.seed);
    S numbers[4];
    if (a.normal) {
      const auto first = math::normals_of<S>(made.word[0], made.word[1]);
      const auto second = math::normals_of<S>(made.word[2], made.word[3]);
      numbers[0] = first.first;
      numbers[1] = first.second;
      numbers[2] = second.first;
      numbers[3] = second.second;
    } else {
      for (int w = 0; w < 4; ++w) numbers[w] = math::uniform_of<S>(made.word[w]);
    }
    S* out = a.out + row * a.slots;
    for (int w = 0; w < 4; ++w)
      if (4 * part + w < a.slots) out[4 * part + w] = numbers[w];
  }
}

}  // namespace

template <typename S>
void philox(const PhiloxArgs<S>& a, Stream stream) {
  const int64_t blocks = ceil_div(a.T * a.N * ceil_div(a.slots, 4), kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  PYWM_LAUNCH((philox_kernel<S>), grid, dim3(kThreads), 0, stream, a);
  check_launch("philox");
}

template void philox(const PhiloxArgs<float>&, Stream);
template void philox(const PhiloxArgs<double>&, Stream);

}  // namespace pywm::cuda
