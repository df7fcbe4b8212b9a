// Gaussian latent states on CUDA: reparameterised samples and KL divergence. See pywm/ops/gaussian.py.
//
// What:     sample and std of every part, and their gradients; KL of every row, summed over its parts, and its four.
// Layout:   [P], or M rows of Z parts, contiguous.
// Mapping:  A thread a part in a grid-stride loop; for the divergence, a warp a row. Not measured yet.
// Cost:     Reads and writes every number once: bandwidth-bound for many rows.
// Numerics: Formulas of math/ in S; sums over parts in a fixed order, no atomics.
// Source:   Hafner et al. 2019; Kullback and Leibler 1951.

#include "../math/gaussian.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

template <typename S>
__global__ void __launch_bounds__(kRowThreads) gaussian_sample_kernel(GaussianSampleArgs<S> a) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < a.P;
       i += gridDim.x * int64_t{kRowThreads}) {
    const S std = math::gaussian_std(a.raw_std[i], a.sigmoid2) + a.min_std;
    a.std[i] = std;
    a.sample[i] = a.mean[i] + std * a.noise[i];
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) gaussian_sample_backward_kernel(GaussianSampleBackwardArgs<S> a) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; i < a.P;
       i += gridDim.x * int64_t{kRowThreads}) {
    const S of_sample = a.grad_sample ? a.grad_sample[i] : S(0), of_std = a.grad_std ? a.grad_std[i] : S(0);
    if (a.grad_mean) a.grad_mean[i] = of_sample;
    if (a.grad_raw_std)
      a.grad_raw_std[i] = (of_sample * a.noise[i] + of_std) * math::gaussian_std_slope(a.raw_std[i], a.sigmoid2);
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) gaussian_kl_kernel(GaussianKlArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    S sum = S(0);
    for (int64_t i = m * a.Z + lane; i < (m + 1) * a.Z; i += kWarp)
      sum += math::gaussian_kl_part(a.mean_q[i], a.std_q[i], a.mean_p[i], a.std_p[i]);
    sum = warp_sum(sum);
    if (lane == 0) a.kl[m] = sum;
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) gaussian_kl_backward_kernel(GaussianKlBackwardArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t m = first_row(); m < a.M; m += row_stride()) {
    const S grad = a.grad[m];
    for (int64_t i = m * a.Z + lane; i < (m + 1) * a.Z; i += kWarp) {
      const auto g = math::gaussian_kl_grad(grad, a.mean_q[i], a.std_q[i], a.mean_p[i], a.std_p[i]);
      if (a.grad_mean_q) a.grad_mean_q[i] = g.mean_q;
      if (a.grad_std_q) a.grad_std_q[i] = g.std_q;
      if (a.grad_mean_p) a.grad_mean_p[i] = g.mean_p;
      if (a.grad_std_p) a.grad_std_p[i] = g.std_p;
    }
  }
}

dim3 part_grid(int64_t P) { return row_grid(ceil_div(P, kWarp)); }

}  // namespace

template <typename S>
void gaussian_sample(const GaussianSampleArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((gaussian_sample_kernel<S>), part_grid(a.P), dim3(kRowThreads), 0, stream, a);
  check_launch("gaussian_sample");
}

template <typename S>
void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((gaussian_sample_backward_kernel<S>), part_grid(a.P), dim3(kRowThreads), 0, stream, a);
  check_launch("gaussian_sample_backward");
}

template <typename S>
void gaussian_kl(const GaussianKlArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((gaussian_kl_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("gaussian_kl");
}

template <typename S>
void gaussian_kl_backward(const GaussianKlBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((gaussian_kl_backward_kernel<S>), row_grid(a.M), dim3(kRowThreads), 0, stream, a);
  check_launch("gaussian_kl_backward");
}

#define PYWM_INSTANTIATE(S)                                                             \
  template void gaussian_sample(const GaussianSampleArgs<S>&, Stream);                  \
  template void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>&, Stream); \
  template void gaussian_kl(const GaussianKlArgs<S>&, Stream);                          \
  template void gaussian_kl_backward(const GaussianKlBackwardArgs<S>&, Stream);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cuda
