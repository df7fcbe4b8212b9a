// Normalisation with an activation on the CPU. See pywm/ops/norm_act.py.
//
// What: y = f(scale·x̂ + shift), x̂ the row with its root mean square, or its mean and deviation, taken out; backward,
//   the gradients of x, scale and shift.
// Layout: M rows of D, contiguous; scale, shift [turns, D], row m's at m % turns.
// Mapping: a row at a time, which stays in the first-level cache. Backward goes over blocks of rows, each with sums of
//   its own for scale and shift; dispatch.cpp cuts the blocks by M alone and adds the sums in order, so the number of
//   threads does not show.
// Cost: 6 flops an element with RMS, 8 with LayerNorm, and the activation. A row is read once from memory and once or
//   twice more from the first-level cache, backward four to six times more; y, or the gradient of x, is written once.
// Numerics: math/norm.h; partial sums in S.
// Source: Zhang and Sennrich (2019), eq. 4; Ba et al. (2016), eq. 3.

#include "../math/activations.h"
#include "kernels.h"
#include "norm_rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <bool kShifted, typename S>
inline S affine(const S* scale, const S* shift, int64_t i, S hat) {
  if constexpr (kShifted)
    return scale[i] * hat + shift[i];
  else
    return scale[i] * hat;
}

template <typename S, typename F, bool kShifted>
void forward_rows(const NormActArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t m = begin; m < end; ++m) {
    const S* x = a.x + m * D;
    const S *scale = a.scale + m % a.turns * D, *shift = kShifted ? a.shift + m % a.turns * D : nullptr;
    S* y = a.y + m * D;
    const math::NormRow<S> row = norm_row(x, D, a.layer, a.eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i) y[i] = F::value(affine<kShifted>(scale, shift, i, math::norm_hat(x[i], row)));
  }
}

template <typename S, typename F, bool kShifted>
void backward_rows(const NormActBackwardArgs<S>& a, int64_t begin, int64_t end, S* partial) {
  const int64_t D = a.D;
  NormSums<S> sums(partial, D);
  for (int64_t m = begin; m < end; ++m) {
    const S *scale = a.scale + m % a.turns * D, *shift = kShifted ? a.shift + m % a.turns * D : nullptr;
    const S *x = a.x + m * D, *grad = a.grad + m * D;
    S* q = a.grad_x ? a.grad_x + m * D : sums.row;  // the gradient of the activation's input
    const math::NormRow<S> row = norm_row(x, D, a.layer, a.eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i)
      q[i] = F::grad(grad[i], affine<kShifted>(scale, shift, i, math::norm_hat(x[i], row)));
    if (partial) sums.add(x, q, row, D);
    if (a.grad_x) norm_row_backward(x, q, scale, row, a.layer, D, q);
  }
}

// Calls run.operator()<F, kShifted>() with the activation as a type.
template <typename Run>
inline void with_activation(Activation activation, bool shifted, const Run& run) {
  const auto chosen = [&]<typename F>() {
    if (shifted)
      run.template operator()<F, true>();
    else
      run.template operator()<F, false>();
  };
  switch (activation) {
    case Activation::kNone:
      return chosen.template operator()<math::None>();
    case Activation::kTanh:
      return chosen.template operator()<math::Tanh>();
    case Activation::kSilu:
      return chosen.template operator()<math::Silu>();
    case Activation::kElu:
      return chosen.template operator()<math::Elu>();
    case Activation::kRelu:
      return chosen.template operator()<math::Relu>();
  }
}

template <typename S>
void forward(const NormActArgs<S>& a, int64_t begin, int64_t end) {
  with_activation(a.activation, a.shift,
                  [&]<typename F, bool kShifted>() { forward_rows<S, F, kShifted>(a, begin, end); });
}

template <typename S>
void backward(const NormActBackwardArgs<S>& a, int64_t begin, int64_t end, S* partial) {
  with_activation(a.activation, a.shift,
                  [&]<typename F, bool kShifted>() { backward_rows<S, F, kShifted>(a, begin, end, partial); });
}

template <typename S>
void add_blocks(const NormBlocks<S>& a, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) a.sum[i] = a.partial[i];
  for (int64_t b = 1; b < a.blocks; ++b) {
    const S* partial = a.partial + b * a.stride;
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) a.sum[i] += partial[i];
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.norm_act = forward<S>;
  table.norm_act_backward = backward<S>;
  table.norm_add_blocks = add_blocks<S>;
}

}  // namespace

void fill_norm_act(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
