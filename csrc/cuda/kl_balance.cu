// KL divergence of groups of categoricals on CUDA, forward and backward. See pywm/ops/kl_balance.py.
//
// What:     Forward: the divergence of every row, summed over its groups, and free nats. Backward: both gradients, from
//           the logits again, zero in rows whose nats are free.
// Layout:   M rows of G groups of K classes, contiguous.
// Mapping:  Forward: a block a row, a warp a group. Backward: a warp a group. Not measured yet.
// Cost:     Reads the logits twice, the second time from L1, and writes the gradients: bandwidth-bound for many rows.
// Numerics: Formulas of math/ in S; the sum over groups in double, in a fixed order. No atomics.
// Source:   Hafner et al. 2021 and 2023.

#include "../math/categorical.h"
#include "../ops.h"
#include "warp_rows.cuh"

namespace pywm::cuda {
namespace {

// Posterior and prior of one group, as all lanes of a warp see them.
template <typename S>
struct Group {
  const S *posterior, *prior;
  WarpSoftmax<S> softmax_q, softmax_p;
  S log_total_q, log_total_p;

  __device__ __forceinline__ Group(const S* posterior, const S* prior, int64_t K, int lane)
      : posterior(posterior),
        prior(prior),
        softmax_q(warp_softmax(posterior, K, lane)),
        softmax_p(warp_softmax(prior, K, lane)),
        log_total_q(math::log(softmax_q.total)),
        log_total_p(math::log(softmax_p.total)) {}

  __device__ __forceinline__ math::KlClass<S> of_class(int64_t k, math::Unimix<S> mix) const {
    const S log_q = (posterior[k] - softmax_q.top) - log_total_q, log_p = (prior[k] - softmax_p.top) - log_total_p;
    const S prob_q = softmax_q(posterior[k]), prob_p = softmax_p(prior[k]);
    return mix.floor > S(0) ? math::kl_class<true>(prob_q, prob_p, log_q, log_p, mix)
                            : math::kl_class<false>(prob_q, prob_p, log_q, log_p, mix);
  }
};

template <typename S>
__global__ void __launch_bounds__(kRowThreads) kl_balance_kernel(KlBalanceArgs<S> a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  const S free_nats = S(a.free_nats);
  for (int64_t m = blockIdx.x; m < a.M; m += gridDim.x) {
    double sums[1] = {0};
    for (int64_t g = warp; g < a.G; g += kRowWarps) {
      const int64_t offset = (m * a.G + g) * a.K;
      const Group<S> group(a.posterior + offset, a.prior + offset, a.K, lane);
      for (int64_t k = lane; k < a.K; k += kWarp) {
        const auto c = group.of_class(k, mix);
        sums[0] += static_cast<double>(c.q * c.log_ratio);
      }
    }
    block_sum<kRowThreads>(sums);
    if (threadIdx.x == 0) {
      const S kl = S(sums[0]);
      a.kl[m] = kl;
      a.dynamics[m] = a.representation[m] = kl <= free_nats ? free_nats : kl;
    }
  }
}

template <typename S>
__global__ void __launch_bounds__(kRowThreads) kl_balance_backward_kernel(KlBalanceBackwardArgs<S> a) {
  const int lane = threadIdx.x % kWarp;
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  const S free_nats = S(a.free_nats);
  for (int64_t row = first_row(); row < a.M * a.G; row += row_stride()) {
    const int64_t m = row / a.G, offset = row * a.K;
    if (a.kl[m] <= free_nats) {
      for (int64_t k = lane; k < a.K; k += kWarp) {
        if (a.grad_posterior) a.grad_posterior[offset + k] = S(0);
        if (a.grad_prior) a.grad_prior[offset + k] = S(0);
      }
      continue;
    }
    const S dynamics = a.grad_dynamics ? a.grad_dynamics[m] : S(0);
    const S representation = a.grad_representation ? a.grad_representation[m] : S(0);
    const Group<S> group(a.posterior + offset, a.prior + offset, a.K, lane);
    S mean = S(0), total = S(0);
    for (int64_t k = lane; k < a.K; k += kWarp) {
      const auto c = group.of_class(k, mix);
      mean += group.softmax_q(group.posterior[k]) * c.log_ratio;
      total += c.q * c.slope;
    }
    mean = warp_sum(mean);
    total = warp_sum(total);
    for (int64_t k = lane; k < a.K; k += kWarp) {
      const auto c = group.of_class(k, mix);
      const S softmax_q = group.softmax_q(group.posterior[k]), softmax_p = group.softmax_p(group.prior[k]);
      if (a.grad_posterior)
        a.grad_posterior[offset + k] = representation * math::unimix_softmax_grad(softmax_q, c.log_ratio, mean, mix);
      if (a.grad_prior) a.grad_prior[offset + k] = dynamics * math::kl_grad_prior(softmax_p, c, total);
    }
  }
}

}  // namespace

template <typename S>
void kl_balance(const KlBalanceArgs<S>& a, Stream stream) {
  const dim3 grid(static_cast<unsigned>(a.M < kMaxRowBlocks ? a.M : kMaxRowBlocks));
  PYWM_LAUNCH((kl_balance_kernel<S>), grid, dim3(kRowThreads), 0, stream, a);
  check_launch("kl_balance");
}

template <typename S>
void kl_balance_backward(const KlBalanceBackwardArgs<S>& a, Stream stream) {
  PYWM_LAUNCH((kl_balance_backward_kernel<S>), row_grid(a.M * a.G), dim3(kRowThreads), 0, stream, a);
  check_launch("kl_balance_backward");
}

template void kl_balance(const KlBalanceArgs<float>&, Stream);
template void kl_balance(const KlBalanceArgs<double>&, Stream);
template void kl_balance_backward(const KlBalanceBackwardArgs<float>&, Stream);
template void kl_balance_backward(const KlBalanceBackwardArgs<double>&, Stream);

}  // namespace pywm::cuda
