// Gaussian latent states on the CPU: reparameterised samples and KL divergence. See pywm/ops/gaussian.py.
//
// What: sample and std of every part, and their gradients; KL of every row, summed over its parts, and its four.
// Layout: [P], or M rows of Z parts, contiguous.
// Mapping: threads share the parts, or the rows; a row's divergence goes in chunks of parts that stay in the cache.
// Cost: a part of a sample reads 3 numbers and writes 2, with an exponential, a logarithm and a division (softplus) or
//   an exponential and a division (sigmoid2); of the divergence it reads 4, with a division and a logarithm; backward
//   it reads 4 and writes up to 4, with two divisions.
// Numerics: math/gaussian.h in S, softplus accurate where it is small; sums over parts in 16 parts a chunk, then the
//   chunks in their order.
// Source: Hafner et al. (2019) for softplus, the code of Hafner et al. (2021) for sigmoid2; Kullback and Leibler
//   (1951).

#include "../math/gaussian.h"

#include "../math/row.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <bool kSigmoid2, typename S>
void sample_of(const GaussianSampleArgs<S>& a, int64_t begin, int64_t end) {
  const S* __restrict mean = a.mean;
  const S* __restrict raw = a.raw_std;
  const S* __restrict noise = a.noise;
  S* __restrict sample = a.sample;
  S* __restrict std = a.std;
  const S min_std = a.min_std;
#pragma GCC ivdep
  for (int64_t i = begin; i < end; ++i) {
    const S s = math::gaussian_std(raw[i], kSigmoid2) + min_std;
    std[i] = s;
    sample[i] = mean[i] + s * noise[i];
  }
}
template <typename S>
void sample(const GaussianSampleArgs<S>& a, int64_t begin, int64_t end) {
  a.sigmoid2 ? sample_of<true>(a, begin, end) : sample_of<false>(a, begin, end);
}

template <bool kSigmoid2, typename S>
void raw_grad_of(const GaussianSampleBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const S* __restrict raw = a.raw_std;
  const S* __restrict noise = a.noise;
  const S* __restrict of_sample = a.grad_sample;
  const S* __restrict of_std = a.grad_std;
  S* __restrict grad = a.grad_raw_std;
  if (of_sample && of_std) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i)
      grad[i] = (of_sample[i] * noise[i] + of_std[i]) * math::gaussian_std_slope(raw[i], kSigmoid2);
  } else if (of_sample) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i)
      grad[i] = of_sample[i] * noise[i] * math::gaussian_std_slope(raw[i], kSigmoid2);
  } else {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i)
      grad[i] = (of_std ? of_std[i] : S(0)) * math::gaussian_std_slope(raw[i], kSigmoid2);
  }
}
template <typename S>
void sample_backward(const GaussianSampleBackwardArgs<S>& a, int64_t begin, int64_t end) {
  if (a.grad_mean)
    for (int64_t i = begin; i < end; ++i) a.grad_mean[i] = a.grad_sample ? a.grad_sample[i] : S(0);
  if (a.grad_raw_std) a.sigmoid2 ? raw_grad_of<true>(a, begin, end) : raw_grad_of<false>(a, begin, end);
}

template <typename S>
void kl(const GaussianKlArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 256;
  alignas(64) S terms[kChunk];
  for (int64_t m = begin; m < end; ++m) {
    S sum = S(0);
    for (int64_t first = 0; first < a.Z; first += kChunk) {
      const int64_t count = a.Z - first < kChunk ? a.Z - first : kChunk, offset = m * a.Z + first;
      const S* __restrict mean_q = a.mean_q + offset;
      const S* __restrict std_q = a.std_q + offset;
      const S* __restrict mean_p = a.mean_p + offset;
      const S* __restrict std_p = a.std_p + offset;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) terms[i] = math::gaussian_kl_part(mean_q[i], std_q[i], mean_p[i], std_p[i]);
      sum += math::row_sum<S>(count, [&](int64_t i) { return terms[i]; });
    }
    a.kl[m] = sum;
  }
}

template <typename S>
void kl_backward(const GaussianKlBackwardArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 64;
  alignas(64) S grads[4][kChunk];
  S* outputs[4] = {a.grad_mean_q, a.grad_std_q, a.grad_mean_p, a.grad_std_p};
  for (int64_t m = begin; m < end; ++m) {
    const S grad = a.grad[m];
    for (int64_t first = 0; first < a.Z; first += kChunk) {
      const int64_t count = a.Z - first < kChunk ? a.Z - first : kChunk, offset = m * a.Z + first;
      const S* __restrict mean_q = a.mean_q + offset;
      const S* __restrict std_q = a.std_q + offset;
      const S* __restrict mean_p = a.mean_p + offset;
      const S* __restrict std_p = a.std_p + offset;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        const auto g = math::gaussian_kl_grad(grad, mean_q[i], std_q[i], mean_p[i], std_p[i]);
        grads[0][i] = g.mean_q;
        grads[1][i] = g.std_q;
        grads[2][i] = g.mean_p;
        grads[3][i] = g.std_p;
      }
      for (int which = 0; which < 4; ++which)
        for (int64_t i = 0; outputs[which] && i < count; ++i) outputs[which][offset + i] = grads[which][i];
    }
  }
}

}  // namespace

void fill_gaussian(Kernels& table) {
  table.f32.gaussian_sample = sample<float>;
  table.f64.gaussian_sample = sample<double>;
  table.f32.gaussian_sample_backward = sample_backward<float>;
  table.f64.gaussian_sample_backward = sample_backward<double>;
  table.f32.gaussian_kl = kl<float>;
  table.f64.gaussian_kl = kl<double>;
  table.f32.gaussian_kl_backward = kl_backward<float>;
  table.f64.gaussian_kl_backward = kl_backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
