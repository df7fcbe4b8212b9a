// What observation and imagination share: norms with activations, products, the cells. See rssm_cells.h.
//
// What: a cell's step from its input's pre-activations and the state to the new deter, and the reverse, to the
//   gradients of all pre-activations, of x and of the state; block_gru, layernorm_gru, gru, gru_block.
// Layout: rows contiguous; the gates of a row, or of a block of it, side by side; weights in packed panels.
// Mapping: phases with a barrier behind each, three to five a step. In a product a member of the team has its panels of
//   columns, between products its rows; a team of one goes through the same phases without waiting.
// Cost: 2·rows·weights flops each way: D·(4·D/G + 2·H) weights for block_gru with G blocks, 3·D·(D + H) for the others.
// Numerics: everything in S, sums over a row in 16 parts; operands of products as in gemm.h. Where members exchange
//   squares, the RMS of block_gru adds up the members' shares, in an order that the size of the team fixes.
// Source: Cho et al. (2014), in the variant of cuDNN; Hafner et al. (2021, 2025); TensorFlow's GRUBlockCell for Hafner
//   et al. (2019).

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
void multiply(const S* a, int64_t lda, Packed<S> packed, const S* bias, S* c, int64_t ldc, int64_t rows, int64_t N,
              int64_t K, bool accumulate) {
  const Start start = accumulate ? Start::kAccumulate : (bias ? Start::kBias : Start::kZero);
  if constexpr (sizeof(S) == sizeof(Pair)) {
    if (packed.pairs) return gemm_pairs(a, lda, packed.words(), bias, c, ldc, rows, N, K, start);
  }
  gemm(MatrixView<S>{a, lda, 1}, static_cast<const S*>(packed.data), bias, c, ldc, rows, N, K, start);
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
      multiply(s.h + g * Dg, D, packed.hidden_deter.block(g, Dg, Dg).from(p * kCols, Dg),
               static_cast<const S*>(nullptr), v, D, rows, n, Dg, true);
      multiply(s.x, X, packed.hidden_x.block(g, X, Dg).from(p * kCols, X), static_cast<const S*>(nullptr), v, D, rows,
               n, X, true);
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
        multiply(s.y + g * Dg, D, packed.gates.block(3 * g + part, Dg, Dg).from(first, Dg), w.gates.bias + column,
                 s.cell2 + column, 3 * D, rows, n, Dg, false);
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

template <typename S>
void cell_backward(const Team& team, const RssmForm& f, const RssmWeights<S>& w, const BackwardWeights<S>& packed,
                   const StepRowsBackward<S>& s, const NormGradients<S>& norms) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G, X = Widths(f).u, rows = s.rows;
  const S *cell1 = s.cell1, *cell2 = s.cell2, *h = s.h, *grad = s.grad;
  S *grad1 = s.grad_cell1, *grad2 = s.grad_cell2, *carry = s.grad_h, *grad_x = s.grad_x, *grad_y = s.grad_y, *y = s.y;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S* none = nullptr;
  const int64_t begin = team.begin(rows), end = team.end(rows);
  if (f.cell == RssmCell::kBlockGru) {
    // Each row's gates; blocks are contiguous.
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < G; ++g) {
        const S *pre = cell2 + r * 3 * D + 3 * g * Dg, *gd = grad + r * D + g * Dg, *hb = h + r * D + g * Dg;
        S *out = grad2 + r * 3 * D + 3 * g * Dg, *cb = carry + r * D + g * Dg;
#pragma GCC ivdep
        for (int64_t j = 0; j < Dg; ++j) {
          const auto back = math::gru_grad(gd[j], math::GruGates<S>{pre[j], pre[Dg + j], pre[2 * Dg + j]}, hb[j]);
          out[j] = back.gates.reset;
          out[Dg + j] = back.gates.candidate;
          out[2 * Dg + j] = back.gates.update;
          cb[j] = back.deter;
        }
      }
    team.sync();
    const int64_t count = panels<S>(Dg), all = G * count;
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, column = i % count * kCols;
      multiply(grad2 + 3 * g * Dg, 3 * D, packed.gates.block(g, 3 * Dg, Dg).from(column, 3 * Dg), none,
               grad_y + g * Dg + column, D, rows, min(kCols, Dg - column), 3 * Dg, false);
    }
    team.sync();
    for (int64_t r = begin; r < end; ++r)
      act.backward(cell1 + r * D, w.hidden.scale, w.hidden.shift, D, S(f.eps), grad_y + r * D, y + r * D, grad1 + r * D,
                   norms.cell, norms.cell_shift);
    team.sync();
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, column = i % count * kCols;
      multiply(grad1 + g * Dg, D, packed.hidden_deter.block(g, Dg, Dg).from(column, Dg), none, carry + g * Dg + column,
               D, rows, min(kCols, Dg - column), Dg, true);
    }
    product(team, grad1, D, packed.hidden_x, none, grad_x, X, rows, X, D);
    team.sync();
    return;
  }
  if (f.cell == RssmCell::kLayerNormGru) {
    for (int64_t r = begin; r < end; ++r) {
      const S *p = cell1 + r * 3 * D, *hr = h + r * D, *g = grad + r * D;
      const S *scale = w.gates.scale, *shift = w.gates.shift;
      S *out = grad1 + r * 3 * D, *c = carry + r * D;
      const Moments<S> m = moments<Norm::kLayer>(p, 3 * D, S(f.cell_eps));
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto q = [&](int64_t i) { return (p[i] - m.mean) * m.inverse * scale[i] + shift[i]; };
        const auto back = math::gru_grad(g[j], math::GruGates<S>{q(j), q(D + j), q(2 * D + j)}, hr[j]);
        out[j] = back.gates.reset;
        out[D + j] = back.gates.candidate;
        out[2 * D + j] = back.gates.update;
        c[j] = back.deter;
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < 3 * D; ++i) {
        const S hat = (p[i] - m.mean) * m.inverse;
        norms.cell[i] += out[i] * hat;
        norms.cell_shift[i] += out[i];
        out[i] *= scale[i];
      }
      const S along = sum_over<S>(3 * D, [&](int64_t i) { return out[i] * (p[i] - m.mean); }) * m.inverse / S(3 * D);
      const S mean = sum_over<S>(3 * D, [&](int64_t i) { return out[i]; }) / S(3 * D);
#pragma GCC ivdep
      for (int64_t i = 0; i < 3 * D; ++i) out[i] = m.inverse * (out[i] - mean - (p[i] - m.mean) * m.inverse * along);
    }
    team.sync();
    product(team, grad1, 3 * D, packed.gates, none, grad_x, X, rows, H, 3 * D);
    product(team, grad1, 3 * D, packed.gates_deter, none, carry, D, rows, D, 3 * D, true);
  } else if (f.cell == RssmCell::kGru) {
    for (int64_t r = begin; r < end; ++r) {
      const S *gx = cell1 + r * 3 * D, *gh = cell2 + r * 3 * D, *hr = h + r * D, *g = grad + r * D;
      S *ox = grad1 + r * 3 * D, *oh = grad2 + r * 3 * D, *c = carry + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_after_grad(g[j], math::ResetAfterGates<S>{gx[j], gx[D + j], gx[2 * D + j]},
                                                 math::ResetAfterGates<S>{gh[j], gh[D + j], gh[2 * D + j]}, hr[j]);
        ox[j] = oh[j] = back.input.reset;
        ox[D + j] = oh[D + j] = back.input.keep;
        ox[2 * D + j] = back.input.candidate;
        oh[2 * D + j] = back.hidden_candidate;
        c[j] = back.deter;
      }
    }
    team.sync();
    product(team, grad1, 3 * D, packed.gates, none, grad_x, X, rows, H, 3 * D);
    product(team, grad2, 3 * D, packed.candidate_deter, none, carry, D, rows, D, 3 * D, true);
  } else {
    for (int64_t r = begin; r < end; ++r) {
      const S *ru = cell1 + r * 2 * D, *c = cell2 + r * D, *hr = h + r * D, *g = grad + r * D;
      S *out_gates = grad1 + r * 2 * D, *out_candidate = grad2 + r * D, *cr = carry + r * D, *yr = y + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_before_update_grad(g[j], ru[D + j], c[j], hr[j]);
        out_candidate[j] = back.candidate;
        out_gates[D + j] = back.update;
        cr[j] = back.deter;
        yr[j] = math::reset_before_reset(ru[j], hr[j]);
      }
    }
    team.sync();
    product(team, grad2, D, packed.candidate_deter, none, grad_y, D, rows, D, D);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const S *ru = cell1 + r * 2 * D, *hr = h + r * D, *gy = grad_y + r * D;
      S *out_gates = grad1 + r * 2 * D, *cr = carry + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_before_reset_grad(gy[j], ru[j], hr[j]);
        out_gates[j] = back.reset;
        cr[j] += back.deter;
      }
    }
    team.sync();
    product(team, grad2, D, packed.candidate, none, grad_x, X, rows, H, D);
    product(team, grad1, 2 * D, packed.gates, none, grad_x, X, rows, H, 2 * D, true);
    product(team, grad1, 2 * D, packed.gates_deter, none, carry, D, rows, D, 2 * D, true);
  }
  team.sync();
}

#define PYWM_INSTANTIATE(S)                                                                                     \
  template NormAct<S> norm_act<S>(Norm, Activation);                                                            \
  template void multiply(const S*, int64_t, Packed<S>, const S*, S*, int64_t, int64_t, int64_t, int64_t, bool); \
  template void cell_forward(const Team&, const RssmForm&, const RssmWeights<S>&, const StepWeights<S>&,        \
                             const StepRows<S>&);                                                               \
  template void cell_backward(const Team&, const RssmForm&, const RssmWeights<S>&, const BackwardWeights<S>&,   \
                              const StepRowsBackward<S>&, const NormGradients<S>&);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cpu::PYWM_ISA
