// KL divergence of groups of categoricals on the CPU, forward and backward. See pywm/ops/kl_balance.py.
//
// What: forward, the divergence of every row, summed over its groups, and free nats; backward, both gradients, zero in
//   rows whose nats are free. The probabilities are computed again: nothing of the size of the logits is kept.
// Layout: M rows of G groups of K classes, contiguous.
// Mapping: threads share the rows; a group's probabilities stay in the first-level cache.
// Cost: a class reads 2 logits, takes two exponentials, and with a share of uniform probability a division and a
//   logarithm; backward as much again, one number written for each gradient.
// Numerics: math/categorical.h in S; without a share of uniform probability the logarithms are log-softmaxes. A group's
//   sums run in 16 parts, the groups' in their order.
// Source: Hafner et al. (2023), eq. 5; Hafner et al. (2021) for the balance.

#include "../math/categorical.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <typename S>
struct Group {
  alignas(64) S q[kMaxClasses], p[kMaxClasses];  // softmaxes
  alignas(64) S term[kMaxClasses], slope[kMaxClasses];
  S log_total_q, log_total_p, top_q, top_p;
  const S *posterior, *prior;

  template <bool kMixed>
  void read(const S* posterior_, const S* prior_, int64_t K) {
    posterior = posterior_;
    prior = prior_;
    const auto of_q = math::softmax_row(posterior, q, K), of_p = math::softmax_row(prior, p, K);
    top_q = of_q.top;
    top_p = of_p.top;
    log_total_q = kMixed ? S(0) : math::log(of_q.total);  // not looked at where probabilities are mixed
    log_total_p = kMixed ? S(0) : math::log(of_p.total);
  }
  template <bool kMixed>
  math::KlClass<S> of_class(int64_t k, math::Unimix<S> mix) const {
    return math::kl_class<kMixed>(q[k], p[k], (posterior[k] - top_q) - log_total_q, (prior[k] - top_p) - log_total_p,
                                  mix);
  }
};

template <bool kMixed, typename S>
void forward_of(const KlBalanceArgs<S>& a, math::Unimix<S> mix, int64_t begin, int64_t end) {
  Group<S> group;
  const S free_nats = S(a.free_nats);
  for (int64_t m = begin; m < end; ++m) {
    S kl = S(0);
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t offset = (m * a.G + g) * a.K;
      group.template read<kMixed>(a.posterior + offset, a.prior + offset, a.K);
#pragma GCC ivdep
      for (int64_t k = 0; k < a.K; ++k) {
        const auto c = group.template of_class<kMixed>(k, mix);
        group.term[k] = c.q * c.log_ratio;
      }
      kl += math::row_sum<S>(a.K, [&](int64_t k) { return group.term[k]; });
    }
    a.kl[m] = kl;
    a.dynamics[m] = a.representation[m] = kl <= free_nats ? free_nats : kl;
  }
}

template <typename S>
void forward(const KlBalanceArgs<S>& a, int64_t begin, int64_t end) {
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  mix.floor > S(0) ? forward_of<true>(a, mix, begin, end) : forward_of<false>(a, mix, begin, end);
}

template <bool kMixed, typename S>
void backward_of(const KlBalanceBackwardArgs<S>& a, math::Unimix<S> mix, int64_t begin, int64_t end) {
  Group<S> group;
  const S free_nats = S(a.free_nats);
  for (int64_t m = begin; m < end; ++m) {
    const bool is_free = a.kl[m] <= free_nats;
    const S dynamics = is_free || !a.grad_dynamics ? S(0) : a.grad_dynamics[m];
    const S representation = is_free || !a.grad_representation ? S(0) : a.grad_representation[m];
    for (int64_t g = 0; g < a.G; ++g) {
      const int64_t offset = (m * a.G + g) * a.K;
      S* __restrict grad_q = a.grad_posterior ? a.grad_posterior + offset : nullptr;
      S* __restrict grad_p = a.grad_prior ? a.grad_prior + offset : nullptr;
      if (is_free) {
        for (int64_t k = 0; grad_q && k < a.K; ++k) grad_q[k] = S(0);
        for (int64_t k = 0; grad_p && k < a.K; ++k) grad_p[k] = S(0);
        continue;
      }
      group.template read<kMixed>(a.posterior + offset, a.prior + offset, a.K);
      if (grad_q) {
#pragma GCC ivdep
        for (int64_t k = 0; k < a.K; ++k) group.term[k] = group.template of_class<kMixed>(k, mix).log_ratio;
        const S mean = math::row_sum<S>(a.K, [&](int64_t k) { return group.q[k] * group.term[k]; });
#pragma GCC ivdep
        for (int64_t k = 0; k < a.K; ++k)
          grad_q[k] = representation * math::unimix_softmax_grad(group.q[k], group.term[k], mean, mix);
      }
      if (grad_p) {
#pragma GCC ivdep
        for (int64_t k = 0; k < a.K; ++k) {
          const auto c = group.template of_class<kMixed>(k, mix);
          group.term[k] = c.q;
          group.slope[k] = c.slope;
        }
        const S total = math::row_sum<S>(a.K, [&](int64_t k) { return group.term[k] * group.slope[k]; });
#pragma GCC ivdep
        for (int64_t k = 0; k < a.K; ++k) {
          const math::KlClass<S> c{group.term[k], S(0), group.slope[k]};
          grad_p[k] = dynamics * math::kl_grad_prior(group.p[k], c, total);
        }
      }
    }
  }
}

template <typename S>
void backward(const KlBalanceBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const auto mix = math::unimix_of<S>(a.unimix, a.K);
  mix.floor > S(0) ? backward_of<true>(a, mix, begin, end) : backward_of<false>(a, mix, begin, end);
}

}  // namespace

void fill_kl_balance(Kernels& table) {
  table.f32.kl_balance = forward<float>;
  table.f64.kl_balance = forward<double>;
  table.f32.kl_balance_backward = backward<float>;
  table.f64.kl_balance_backward = backward<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
