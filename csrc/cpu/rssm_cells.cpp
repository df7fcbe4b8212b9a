// What observation and imagination share: norms with activations, products, the cells. Compiled once for each
// instruction set; see rssm_cells.h.

#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

template <Activation kActivation, typename S>
inline S activated(S x) {
  if constexpr (kActivation == Activation::kSilu) return math::silu(x);
  if constexpr (kActivation == Activation::kElu) return math::elu(x);
  if constexpr (kActivation == Activation::kRelu) return math::relu(x);
  return x;
}

template <Norm kNorm, Activation kActivation, typename S>
inline void norm_act_part(const S* __restrict x, const S* __restrict scale, const S* __restrict shift, int64_t n,
                          Moments<S> m, S* __restrict y) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    S z = x[i];
    if constexpr (kNorm == Norm::kRms) z = z * m.inverse * scale[i];
    if constexpr (kNorm == Norm::kLayer) z = (z - m.mean) * m.inverse * scale[i] + shift[i];
    y[i] = activated<kActivation>(z);
  }
}

// y := activation(norm(x)).
template <Norm kNorm, Activation kActivation, typename S>
inline void norm_act_row(const S* __restrict x, const S* __restrict scale, const S* __restrict shift, int64_t n, S eps,
                         S* __restrict y) {
  norm_act_part<kNorm, kActivation>(x, scale, shift, n, moments<kNorm>(x, n, eps), y);
}

// From the gradient of y to that of x. Writes y too, and adds to the gradients of scale and shift.
template <Norm kNorm, Activation kActivation, typename S>
inline void norm_act_row_backward(const S* __restrict x, const S* __restrict scale, const S* __restrict shift,
                                  int64_t n, S eps, const S* __restrict grad_y, S* __restrict y, S* __restrict grad_x,
                                  S* __restrict grad_scale, S* __restrict grad_shift) {
  const Moments<S> m = moments<kNorm>(x, n, eps);
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const S hat = (x[i] - m.mean) * m.inverse;
    S z = hat;
    if constexpr (kNorm == Norm::kRms) z = hat * scale[i];
    if constexpr (kNorm == Norm::kLayer) z = hat * scale[i] + shift[i];
    S slope = S(1);
    const S out = activated<kActivation>(z);
    if constexpr (kActivation == Activation::kSilu) slope = math::silu_slope(z);
    if constexpr (kActivation == Activation::kElu) slope = math::elu_grad(S(1), out);
    if constexpr (kActivation == Activation::kRelu) slope = math::relu_grad(S(1), out);
    y[i] = out;
    const S grad_z = grad_y[i] * slope;
    if constexpr (kNorm == Norm::kNone) {
      grad_x[i] = grad_z;
    } else {
      grad_scale[i] += grad_z * hat;
      if constexpr (kNorm == Norm::kLayer) grad_shift[i] += grad_z;
      grad_x[i] = grad_z * scale[i];
    }
  }
  if constexpr (kNorm != Norm::kNone) {
    const S along = sum_over<S>(n, [&](int64_t i) { return grad_x[i] * (x[i] - m.mean); }) * m.inverse / S(n);
    const S mean = kNorm == Norm::kLayer ? sum_over<S>(n, [&](int64_t i) { return grad_x[i]; }) / S(n) : S(0);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const S hat = (x[i] - m.mean) * m.inverse;
      grad_x[i] = m.inverse * (grad_x[i] - mean - hat * along);
    }
  }
}

template <typename S, Norm kNorm>
NormAct<S> norm_act_of(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return {norm_act_row<kNorm, Activation::kSilu, S>, norm_act_part<kNorm, Activation::kSilu, S>,
              norm_act_row_backward<kNorm, Activation::kSilu, S>};
    case Activation::kElu:
      return {norm_act_row<kNorm, Activation::kElu, S>, norm_act_part<kNorm, Activation::kElu, S>,
              norm_act_row_backward<kNorm, Activation::kElu, S>};
    case Activation::kRelu:
      return {norm_act_row<kNorm, Activation::kRelu, S>, norm_act_part<kNorm, Activation::kRelu, S>,
              norm_act_row_backward<kNorm, Activation::kRelu, S>};
    default:
      return {norm_act_row<kNorm, Activation::kNone, S>, norm_act_part<kNorm, Activation::kNone, S>,
              norm_act_row_backward<kNorm, Activation::kNone, S>};
  }
}

}  // namespace

template <typename S>
NormAct<S> norm_act(Norm norm, Activation activation) {
  if (norm == Norm::kRms) return norm_act_of<S, Norm::kRms>(activation);
  if (norm == Norm::kLayer) return norm_act_of<S, Norm::kLayer>(activation);
  return norm_act_of<S, Norm::kNone>(activation);
}

template <typename S>
void multiply(const S* a, int64_t lda, const S* packed, const S* bias, S* c, int64_t ldc, int64_t rows, int64_t N,
              int64_t K, bool accumulate) {
  gemm(MatrixView<S>{a, lda, 1}, packed, bias, c, ldc, rows, N, K,
       accumulate ? Start::kAccumulate : (bias ? Start::kBias : Start::kZero));
}

template <typename S>
void cell_forward(const Team& team, const RssmForm& f, const RssmWeights<S>& w, const StepWeights<S>& packed,
                  const StepRows<S>& s) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G, X = StepWeights<S>::x_width(f), rows = s.rows;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S eps = S(f.eps);
  const int64_t begin = team.begin(rows), end = team.end(rows);
  if (f.cell == RssmCell::kBlockGru) {
    for (int64_t r = begin; r < end; ++r) {
      act.forward(s.u + r * X, w.deter_in.scale, w.deter_in.shift, H, eps, s.x + r * X);
      act.forward(s.u + r * X + H, w.stoch_in.scale, w.stoch_in.shift, H, eps, s.x + r * X + H);
    }
    team.sync();
    const int64_t count = panels<S>(Dg), all = G * count, first_panel = team.begin(all), last_panel = team.end(all);
    for (int64_t i = first_panel; i < last_panel; ++i) {
      const int64_t g = i / count, p = i % count, column = g * Dg + p * kCols, n = min(kCols, Dg - p * kCols);
      S* v = s.cell1 + column;
      for (int64_t r = 0; r < rows; ++r)
        copy_row(s.action_proj + (s.action_class ? s.action_class[r] : r) * D + column, v + r * D, n);
      multiply(s.h + g * Dg, D, packed.hidden_deter + g * packed_size<S>(Dg, Dg) + p * kCols * Dg,
               static_cast<const S*>(nullptr), v, D, rows, n, Dg, true);
      multiply(s.x, X, packed.hidden_x + g * packed_size<S>(X, Dg) + p * kCols * X, static_cast<const S*>(nullptr), v,
               D, rows, n, X, true);
    }
    // Who has whole blocks needs of the others' columns only their squares.
    const int64_t own = D / team.size, left = team.rank * own;
    if (f.norm == Norm::kRms && s.squares && G % team.size == 0 && team.size <= kMostSquares) {
      for (int64_t r = 0; r < rows; ++r) {
        const S* x = s.cell1 + r * D + left;
        s.squares[r * kMostSquares + team.rank] = sum_over<S>(own, [&](int64_t i) { return x[i] * x[i]; });
      }
      team.sync();
      for (int64_t r = 0; r < rows; ++r) {
        S sum = S(0);
        for (int64_t m = 0; m < team.size; ++m) sum += s.squares[r * kMostSquares + m];
        act.apply(s.cell1 + r * D + left, w.hidden.scale + left, static_cast<const S*>(nullptr), own,
                  {S(0), inverse_root(sum, D, eps)}, s.y + r * D + left);
      }
    } else {
      team.sync();
      for (int64_t r = begin; r < end; ++r)
        act.forward(s.cell1 + r * D, w.hidden.scale, w.hidden.shift, D, eps, s.y + r * D);
      team.sync();
    }
    for (int64_t i = first_panel; i < last_panel; ++i) {
      const int64_t g = i / count, first = i % count * kCols, n = min(kCols, Dg - first);
      for (int64_t part = 0; part < 3; ++part) {
        const int64_t column = (3 * g + part) * Dg + first;
        multiply(s.y + g * Dg, D, packed.gates + (3 * g + part) * packed_size<S>(Dg, Dg) + first * Dg,
                 w.gates.bias + column, s.cell2 + column, 3 * D, rows, n, Dg, false);
      }
      if (i + 1 < last_panel && (i + 1) / count == g) continue;
      // All of this block's columns that are this member's, in one go: the loop over them is dear to begin.
      const int64_t from = first_panel > g * count ? (first_panel - g * count) * kCols : 0;
      for (int64_t r = 0; r < rows; ++r)
        block_gru_row(s.cell2 + r * 3 * D + 3 * g * Dg, s.h + r * D + g * Dg, Dg, from, first + n - from,
                      s.deter + r * D + g * Dg);
    }
    team.sync();
    return;
  }
  for (int64_t r = begin; r < end; ++r)
    act.forward(s.u + r * X, w.stoch_in.scale, w.stoch_in.shift, H, eps, s.x + r * X);
  team.sync();
  if (f.cell == RssmCell::kLayerNormGru) {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 3 * D, rows, 3 * D, H);
    product(team, s.h, D, packed.gates_deter, static_cast<const S*>(nullptr), s.cell1, 3 * D, rows, 3 * D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r)
      layernorm_gru_row(s.cell1 + r * 3 * D, w.gates.scale, w.gates.shift, s.h + r * D, D, S(f.cell_eps),
                        s.deter + r * D);
  } else if (f.cell == RssmCell::kGru) {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 3 * D, rows, 3 * D, H);
    product(team, s.h, D, packed.candidate_deter, w.candidate.bias, s.cell2, 3 * D, rows, 3 * D, D);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const S *gx = s.cell1 + r * 3 * D, *gh = s.cell2 + r * 3 * D, *h = s.h + r * D;
      S* deter = s.deter + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        deter[j] = math::reset_after_step(math::ResetAfterGates<S>{gx[j], gx[D + j], gx[2 * D + j]},
                                          math::ResetAfterGates<S>{gh[j], gh[D + j], gh[2 * D + j]}, h[j]);
      }
    }
  } else {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 2 * D, rows, 2 * D, H);
    product(team, s.h, D, packed.gates_deter, static_cast<const S*>(nullptr), s.cell1, 2 * D, rows, 2 * D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r)
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) s.y[r * D + j] = math::reset_before_reset(s.cell1[r * 2 * D + j], s.h[r * D + j]);
    team.sync();
    product(team, s.x, X, packed.candidate, w.candidate.bias, s.cell2, D, rows, D, H);
    product(team, s.y, D, packed.candidate_deter, static_cast<const S*>(nullptr), s.cell2, D, rows, D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      S* deter = s.deter + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j)
        deter[j] = math::reset_before_update(s.cell1[r * 2 * D + D + j], s.cell2[r * D + j], s.h[r * D + j]);
    }
  }
  team.sync();
}

#define PYWM_INSTANTIATE(S)                                                                                    \
  template NormAct<S> norm_act<S>(Norm, Activation);                                                           \
  template void multiply(const S*, int64_t, const S*, const S*, S*, int64_t, int64_t, int64_t, int64_t, bool); \
  template void cell_forward(const Team&, const RssmForm&, const RssmWeights<S>&, const StepWeights<S>&,       \
                             const StepRows<S>&);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cpu::PYWM_ISA
