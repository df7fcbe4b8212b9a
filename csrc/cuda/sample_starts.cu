// Where imagined rollouts start in stored ones, on CUDA. See pywm/ops/sample_starts.py.
//
// What:     One place for every uniform number, among those where a start may be.
// Layout:   masks [T, N], bytes; uniform and the results [B].
// Mapping:  A block a draw. Each thread counts the places in its part of [T, N]; the one whose part holds the chosen
//           place looks it up. No counts are kept from block to block: B is small. Not measured yet.
// Cost:     Every block reads all masks, from L2 but for the first.
// Numerics: Integers, and one product in float64: the same places as on the CPU. No atomics.
// Source:   Kaiser et al. 2020.

#include "../math/pixels.h"
#include "../ops.h"
#include "device.cuh"
#include "launch.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;

// Whether row cell / N of environment cell % N may be drawn: a row that begins an episode, or the newest of a stack
// inside one.
__device__ __forceinline__ bool is_start(const StartMasks& a, bool beginning, int64_t cell) {
  if (a.valid && !a.valid[cell]) return false;
  if (a.is_last && a.is_last[cell]) return false;
  if (beginning) return a.is_first[cell];
  if (cell < (a.stack - 1) * a.N) return false;
  for (int64_t j = 0; j < a.stack - 1; ++j) {
    if (a.is_first[cell - j * a.N]) return false;
    if (a.valid && !a.valid[cell - (j + 1) * a.N]) return false;
  }
  return true;
}

template <typename S>
__global__ void __launch_bounds__(kThreads) sample_starts_kernel(SampleStartsArgs<S> a) {
  PYWM_SHARED(int64_t, counts, [kThreads]);
  const int64_t b = blockIdx.x, cells = a.masks.T * a.masks.N, part = ceil_div(cells, kThreads);
  const int64_t begin = threadIdx.x * part, end = begin + part < cells ? begin + part : cells;
  const bool beginning = a.beginning && b == 0;
  int64_t count = 0;
  for (int64_t cell = begin; cell < end; ++cell) count += is_start(a.masks, beginning, cell) ? 1 : 0;
  counts[threadIdx.x] = count;
  __syncthreads();
  int64_t total = 0, before = 0;
  for (int i = 0; i < kThreads; ++i) {
    before += i < static_cast<int>(threadIdx.x) ? counts[i] : 0;
    total += counts[i];
  }
  if (total == 0) {
    if (threadIdx.x == 0) a.row[b] = a.env[b] = a.first[b] = -1;
    return;
  }
  int64_t left = math::chosen(a.uniform[b], total) - before;
  if (left < 0 || left >= count) return;
  int64_t cell = begin - 1;
  for (++left; left > 0;) left -= is_start(a.masks, beginning, ++cell) ? 1 : 0;
  a.row[b] = cell / a.masks.N;
  a.env[b] = cell % a.masks.N;
  a.first[b] = cell / a.masks.N - (beginning ? 0 : a.masks.stack - 1);
}

}  // namespace

template <typename S>
void sample_starts(const SampleStartsArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((sample_starts_kernel<S>), dim3(static_cast<unsigned>(a.B)), dim3(kThreads), 0, stream, a);
  check_launch("sample_starts");
}

template void sample_starts(const SampleStartsArgs<float>&, Stream);
template void sample_starts(const SampleStartsArgs<double>&, Stream);

}  // namespace pywm::cuda
