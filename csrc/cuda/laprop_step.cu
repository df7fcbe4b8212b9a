// LaProp with adaptive gradient clipping over one flat buffer on CUDA. See pywm/ops/laprop_step.py.
//
// What:     The norms of each tensor's gradient and values, then the step of every parameter, in place, with what
// follows
//           the last ones slowly and a bfloat16 copy.
// Layout:   param, grad, exp_avg, exp_avg_sq, rounded [P] contiguous; tensor s lies in [offsets[s], offsets[s + 1]);
// slow
//           [followed].
// Mapping:  A block takes kPiece neighbouring numbers and goes through the tensors that they belong to: sums of squares
//           into `workspace`; one block adds them up, a warp a tensor; then a block updates kPiece numbers again. Three
//           launches, however many tensors there are. Predictions, not measured yet.
// Cost:     Reads 6 numbers a parameter and writes 3; one each more where it is followed, half a one for a copy.
// Numerics: math/laprop.h in S; sums of squares in double, in a fixed order for given P and offsets: no atomics.
//           Offsets that are none give wrong results, but touch no memory beyond the buffers.
// Source:   Ziyin et al. 2020 (LaProp); Brock et al. 2021 (adaptive clipping); Dreamer V3's code.

#include <cmath>

#include "../math/laprop.h"
#include "../ops.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSumThreads = 1024;
constexpr int64_t kPiece = 4096;

// Workspace, in doubles: the sums of squares of gradient and values, two for each part of a tensor in a piece, numbered
// piece + segment (from one to the next the piece, the segment or both grow); then the factor of each tensor's
// gradient.
__host__ __device__ int64_t num_parts(int64_t P, int64_t segments) { return (P + kPiece - 1) / kPiece + segments; }

template <typename Fn>
__device__ __forceinline__ void over_parts(const int64_t* offsets, int64_t segments, int64_t P, const Fn& fn) {
  const int64_t piece = blockIdx.x, begin = piece * kPiece, end = begin + kPiece < P ? begin + kPiece : P;
  for (int64_t s = math::segment_of(offsets, segments, begin); s < segments && offsets[s] < end; ++s) {
    const int64_t from = offsets[s] > begin ? offsets[s] : begin, to = offsets[s + 1] < end ? offsets[s + 1] : end;
    fn(piece + s, s, from, to);
  }
}

template <typename S>
__global__ void __launch_bounds__(kThreads) laprop_squares_kernel(LaPropArgs<S> a) {
  over_parts(a.offsets, a.segments, a.P, [&](int64_t part, int64_t, int64_t from, int64_t to) {
    double sums[2] = {0, 0};
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
      const double g = static_cast<double>(a.grad[i]), p = static_cast<double>(a.param[i]);
      sums[0] += g * g;
      sums[1] += p * p;
    }
    block_sum<kThreads>(sums);
    if (threadIdx.x < 2) a.workspace[2 * part + threadIdx.x] = sums[threadIdx.x];
  });
}

template <typename S>
__global__ void __launch_bounds__(kSumThreads) laprop_scales_kernel(LaPropArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t pieces = (a.P + kPiece - 1) / kPiece;
  double* scales = a.workspace + 2 * num_parts(a.P, a.segments);
  double total[1] = {0};
  for (int64_t s = threadIdx.x / kWarp; s < a.segments; s += kSumThreads / kWarp) {
    double grad_sq = 0, param_sq = 0;
    const int64_t from = a.offsets[s], to = a.offsets[s + 1];
    const int64_t first = from > 0 ? from / kPiece : 0, last = to > 0 ? (to - 1) / kPiece : -1;
    for (int64_t piece = first + lane; piece <= (from < to ? last : -1) && piece < pieces; piece += kWarp) {
      grad_sq += a.workspace[2 * (piece + s)];
      param_sq += a.workspace[2 * (piece + s) + 1];
    }
    grad_sq = warp_sum(grad_sq);
    param_sq = warp_sum(param_sq);
    if (lane == 0) {
      scales[s] = math::agc_scale(grad_sq, param_sq, a.clip, a.min_norm);
      total[0] += grad_sq;
    }
  }
  block_sum<kSumThreads>(total);
  if (threadIdx.x == 0) a.norm[0] = static_cast<S>(sqrt(total[0]));
}

template <typename S>
__global__ void __launch_bounds__(kThreads) laprop_update_kernel(LaPropArgs<S> a, math::LaPropFactors<S> factors) {
  const S norm = a.norm[0];
  if (!(norm - norm == S(0))) return;  // not finite: nothing is changed
  const double* scales = a.workspace + 2 * num_parts(a.P, a.segments);
  over_parts(a.offsets, a.segments, a.P, [&](int64_t, int64_t s, int64_t from, int64_t to) {
    const S scale = static_cast<S>(scales[s]);
    for (int64_t i = from + threadIdx.x; i < to; i += kThreads) {
      const auto next = math::laprop_step(a.param[i], a.grad[i], a.exp_avg[i], a.exp_avg_sq[i], scale, factors);
      a.param[i] = next.param;
      a.exp_avg[i] = next.exp_avg;
      a.exp_avg_sq[i] = next.exp_avg_sq;
      const int64_t place = i - (a.P - a.followed);
      if (a.slow && place >= 0) a.slow[place] = math::laprop_follow(a.slow[place], next.param, factors);
      if (a.rounded) a.rounded[i] = math::laprop_round(next.param);
    }
  });
}

}  // namespace

int64_t laprop_workspace(int64_t P, int64_t segments) { return 2 * num_parts(P, segments) + segments; }

template <typename S>
void laprop_step(const LaPropArgs<S>& a, Stream stream) {
  const double bias1 = 1 - std::pow(a.beta1, double(a.step)), bias2 = 1 - std::pow(a.beta2, double(a.step));
  const math::LaPropFactors<S> factors{S(1 - a.beta1),  S(a.beta2), S(1 - a.beta2), S(1 / std::sqrt(bias2)),
                                       S(a.lr / bias1), S(a.eps),   S(a.slow_rate)};
  const dim3 pieces(static_cast<unsigned>(ceil_div(a.P, kPiece)));
  PYWM_LAUNCH((laprop_squares_kernel<S>), pieces, dim3(kThreads), 0, stream, a);
  check_launch("laprop_step");
  PYWM_LAUNCH((laprop_scales_kernel<S>), dim3(1), dim3(kSumThreads), 0, stream, a);
  check_launch("laprop_step");
  PYWM_LAUNCH((laprop_update_kernel<S>), pieces, dim3(kThreads), 0, stream, a, factors);
  check_launch("laprop_step");
}

template void laprop_step(const LaPropArgs<float>&, Stream);
template void laprop_step(const LaPropArgs<double>&, Stream);

}  // namespace pywm::cuda
