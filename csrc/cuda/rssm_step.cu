// Where a step of a scan made of products and row kernels begins, on CUDA. See pywm/ops/rssm_products.py.
//
// What:     h = deter and u = add + stoch_in's product with the sample before, both zeroed where an episode begins;
//           backward, the gradients of the logits and of deter from outside and from the step behind.
// Layout:   ops.h; a row a state. The gathered weight lies with a class's numbers side by side.
// Mapping:  Forward, a thread a column of h or u, a block some rows of 256 columns: gathered rows are read side by
//           side. Backward, a warp a group of classes, or 32 columns of deter. Predictions, not measured yet.
// Cost:     One launch where there would be a mask, a gather and a sum; bound by latency for few rows.
// Numerics: Formulas of math/ in S; a group's columns are added in their order, as on the CPU. No atomics.
// Source:   Hafner et al. 2023; the gradient of the samples: Bengio et al. 2013.

#include "../math/categorical.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

constexpr int64_t kMaxEnterRows = 32768;  // blocks of a grid in y

template <typename S>
__global__ void __launch_bounds__(kRowThreads) rssm_enter_kernel(RssmEnterArgs<S> a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  for (int64_t n = blockIdx.y; n < a.N; n += gridDim.y) {
    const bool reset = a.is_first[n];
    if (i < a.H) {
      S sum = a.add[n * a.add_stride + i];
      if (!reset && a.stoch_proj) sum += a.stoch_proj[n * a.H + i];
      if (!reset && !a.stoch_proj)
        for (int64_t g = 0; g < a.groups; ++g) {
          const int64_t index = a.index[n * a.groups + g];
          sum += a.packed[(g * a.classes + (index < a.classes ? index : a.classes - 1)) * a.H + i];
        }
      a.u[n * a.u_stride + i] = sum;
    } else if (i < a.H + a.D) {
      a.h[n * a.D + i - a.H] = reset ? S(0) : a.deter[n * a.D + i - a.H];
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) rssm_leave_kernel(RssmLeaveArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t K = a.classes, pieces = ceil_div(a.D, kWarp), parts = a.groups + pieces;
  const auto mix = math::unimix_of<S>(a.unimix, K);
  for (int64_t item = first_row(); item < a.N * parts; item += row_stride()) {
    const int64_t n = item / parts, part = item % parts;
    const bool cut = a.is_first_behind && a.is_first_behind[n];
    if (part >= a.groups) {
      const int64_t i = (part - a.groups) * kWarp + lane, at = n * a.D + i;
      if (i < a.D)
        a.grad_h[at] = (a.outer_deter ? a.outer_deter[at] : S(0)) + (a.carry_deter && !cut ? a.carry_deter[at] : S(0));
      continue;
    }
    const int64_t start = (n * a.groups + part) * K;
    const S* logits = a.logits + start;
    const auto grad = [&](int64_t k) {
      return (a.outer_stoch ? a.outer_stoch[start + k] : S(0)) +
             (a.carry_stoch && !cut ? a.carry_stoch[start + k] : S(0));
    };
    const auto softmax = warp_softmax(logits, K, lane);
    S mean = S(0);
    for (int64_t k = lane; k < K; k += kWarp) mean += softmax(logits[k]) * grad(k);
    mean = warp_sum(mean);
    for (int64_t k = lane; k < K; k += kWarp)
      a.grad_logits[start + k] = (a.outer_logits ? a.outer_logits[start + k] : S(0)) +
                                 math::unimix_softmax_grad(softmax(logits[k]), grad(k), mean, mix);
  }
}

}  // namespace

template <typename S>
void rssm_enter(const RssmEnterArgs<S>& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(a.H + a.D, kRowThreads)),
                  static_cast<unsigned>(a.N < kMaxEnterRows ? a.N : kMaxEnterRows));
  PYWM_LAUNCH((rssm_enter_kernel<S>), grid, dim3(kRowThreads), 0, stream, a);
  check_launch("rssm_enter");
}

template <typename S>
void rssm_leave(const RssmLeaveArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((rssm_leave_kernel<S>), row_grid(a.N * (a.groups + ceil_div(a.D, kWarp))), dim3(kRowThreads), 0, stream,
              a);
  check_launch("rssm_leave");
}

template void rssm_enter(const RssmEnterArgs<float>&, Stream);
template void rssm_enter(const RssmEnterArgs<double>&, Stream);
template void rssm_leave(const RssmLeaveArgs<float>&, Stream);
template void rssm_leave(const RssmLeaveArgs<double>&, Stream);

}  // namespace pywm::cuda
