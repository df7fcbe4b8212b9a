// What the recurrent state-space model does to one row between its products: norms with activations, sampling.
// Included by kernel sources only, like rssm_cells.h.
#pragma once

#include <cstdint>

#include "../math/activations.h"
#include "../math/gru.h"
#include "../ops.h"
#include "gemm.h"

namespace pywm::cpu::PYWM_ISA {

constexpr int64_t kSums = 16;  // partial sums of a reduction, so that it fills vectors

template <typename S>
inline S total(const S (&sums)[kSums]) {
  S x = S(0);
  for (int64_t j = 0; j < kSums; ++j) x += sums[j];
  return x;
}

template <typename S, typename Term>
inline S sum_over(int64_t n, const Term& term) {
  S sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= n; i += kSums)
#pragma GCC ivdep
    for (int64_t j = 0; j < kSums; ++j) sums[j] += term(i + j);
  S x = total(sums);
  for (; i < n; ++i) x += term(i);
  return x;
}

template <typename S>
struct Moments {
  S mean, inverse;  // 1 / standard deviation, or 1 / root mean square
};

template <typename S>
inline S inverse_root(S squares, int64_t n, S eps) {
  return S(1) / S(__builtin_sqrt(double(squares / S(n) + eps)));
}

template <Norm kNorm, typename S>
inline Moments<S> moments(const S* __restrict x, int64_t n, S eps) {
  if constexpr (kNorm == Norm::kNone) return {S(0), S(1)};
  const S mean = kNorm == Norm::kLayer ? sum_over<S>(n, [&](int64_t i) { return x[i]; }) / S(n) : S(0);
  const S squares = sum_over<S>(n, [&](int64_t i) {
    const S d = x[i] - mean;
    return d * d;
  });
  return {mean, inverse_root(squares, n, eps)};
}

template <typename S>
struct NormAct {
  void (*forward)(const S* x, const S* scale, const S* shift, int64_t n, S eps, S* y);
  // Of some of a row's numbers, with the moments of all of them.
  void (*apply)(const S* x, const S* scale, const S* shift, int64_t n, Moments<S> m, S* y);
  void (*backward)(const S* x, const S* scale, const S* shift, int64_t n, S eps, const S* grad_y, S* y, S* grad_x,
                   S* grad_scale, S* grad_shift);
};

template <typename S>
NormAct<S> norm_act(Norm norm, Activation activation);

// The new deter of `n` columns of a block from `first` on; its gates lie side by side in g [3·Dg].
template <typename S>
[[gnu::noinline]] void block_gru_row(const S* __restrict g, const S* __restrict h, int64_t Dg, int64_t first, int64_t n,
                                     S* __restrict deter) {
#pragma GCC ivdep
  for (int64_t j = first; j < first + n; ++j)
    deter[j] = math::gru_step(math::GruGates<S>{g[j], g[Dg + j], g[2 * Dg + j]}, h[j]);
}

// The new deter [D] from gates p [3D] before their LayerNorm.
template <typename S>
[[gnu::noinline]] void layernorm_gru_row(const S* __restrict p, const S* __restrict scale, const S* __restrict shift,
                                         const S* __restrict h, int64_t D, S eps, S* __restrict deter) {
  const Moments<S> m = moments<Norm::kLayer>(p, 3 * D, eps);
#pragma GCC ivdep
  for (int64_t j = 0; j < D; ++j) {
    const auto q = [&](int64_t i) { return (p[i] - m.mean) * m.inverse * scale[i] + shift[i]; };
    deter[j] = math::gru_step(math::GruGates<S>{q(j), q(D + j), q(2 * D + j)}, h[j]);
  }
}

// probs [groups·classes] := softmax of each group.
template <typename S>
[[gnu::noinline]] void softmax_row(const S* __restrict logits, int64_t groups, int64_t classes, S* __restrict probs) {
  for (int64_t g = 0; g < groups; ++g) {
    const S* l = logits + g * classes;
    S largest = l[0];
    for (int64_t k = 1; k < classes; ++k) largest = l[k] > largest ? l[k] : largest;
    for (int64_t k = 0; k < classes; ++k) probs[g * classes + k] = l[k] - largest;
  }
  const int64_t n = groups * classes;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) probs[i] = math::exp(probs[i]);
  for (int64_t g = 0; g < groups; ++g) {
    S* p = probs + g * classes;
    S sum = S(0);
    for (int64_t k = 0; k < classes; ++k) sum += p[k];
    const S inverse = S(1) / sum;
    for (int64_t k = 0; k < classes; ++k) p[k] *= inverse;
  }
}

template <typename S>
inline void one_hot_row(const uint8_t* index, int64_t groups, int64_t classes, S* __restrict out) {
  for (int64_t i = 0; i < groups * classes; ++i) out[i] = S(0);
  for (int64_t g = 0; g < groups; ++g) out[g * classes + index[g]] = S(1);
}

// Classes by inverse CDF of (1 - unimix)·softmax + unimix / classes, and the one-hot `out` of them: all NaN for a group
// whose logits are. `probs` is scratch. Sums run in the order of the classes.
template <typename S>
[[gnu::noinline]] void sample_row(const S* logits, const S* uniform, int64_t groups, int64_t classes, S unimix,
                                  S* probs, uint8_t* index, S* out) {
  softmax_row(logits, groups, classes, probs);
  const S floor = unimix / S(classes), share = S(1) - unimix;
  bool missing = false;
  for (int64_t g = 0; g < groups; ++g) {
    const S* p = probs + g * classes;
    S sum = S(0);
    for (int64_t k = 0; k < classes; ++k) sum += share * p[k] + floor;
    const S threshold = uniform[g] * sum;
    S cdf = S(0);
    int64_t count = 0;
    for (int64_t k = 0; k < classes; ++k) {
      cdf += share * p[k] + floor;
      count += cdf <= threshold;
    }
    index[g] = static_cast<uint8_t>(count < classes ? count : classes - 1);
    missing |= sum != sum;
  }
  one_hot_row(index, groups, classes, out);
  if (!missing) return;
  for (int64_t g = 0; g < groups; ++g)
    if (const S* p = probs + g * classes; p[0] != p[0])
      for (int64_t k = 0; k < classes; ++k) out[g * classes + k] = p[0];
}

// Whether some group of a sample is NaN. Its class says nothing of that, so what is gathered by it must be told.
template <typename S>
inline bool is_missing(const S* sample, int64_t groups, int64_t classes) {
  bool missing = false;
  for (int64_t g = 0; g < groups; ++g) missing |= sample[g * classes] != sample[g * classes];
  return missing;
}
template <typename S>
inline void spoil_row(S* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) row[i] = S(__builtin_nan(""));
}

// Straight through: from the gradient of the one-hot to that of the logits, added to `grad`. `probs` is scratch.
template <typename S>
[[gnu::noinline]] void straight_through_row(const S* logits, const S* __restrict grad_stoch, int64_t groups,
                                            int64_t classes, S unimix, S* probs, S* __restrict grad) {
  softmax_row(logits, groups, classes, probs);
  const S share = S(1) - unimix;
  for (int64_t g = 0; g < groups; ++g) {
    const S *p = probs + g * classes, *z = grad_stoch + g * classes;
    S along = S(0);
    for (int64_t k = 0; k < classes; ++k) along += p[k] * z[k];
    for (int64_t k = 0; k < classes; ++k) grad[g * classes + k] += share * p[k] * (z[k] - along);
  }
}

// std(raw) and its derivative.
template <typename S>
inline S std_of(S raw, S min_std, bool sigmoid_std) {
  if (sigmoid_std) return S(2) * math::sigmoid(raw / S(2)) + min_std;
  const S magnitude = raw < S(0) ? -raw : raw;
  return (raw > S(0) ? raw : S(0)) + S(__builtin_log1p(double(math::exp(-magnitude)))) + min_std;
}
template <typename S>
inline S std_slope(S raw, bool sigmoid_std) {
  if (!sigmoid_std) return math::sigmoid(raw);
  const S s = math::sigmoid(raw / S(2));
  return s * (S(1) - s);
}

}  // namespace pywm::cpu::PYWM_ISA
