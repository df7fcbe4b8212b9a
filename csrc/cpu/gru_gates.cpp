// Gates of recurrent cells on the CPU. See pywm/ops/gru_gates.py.
//
// What: the next state from the gates' pre-activations and the state; backward, the gradients of all of them.
// Layout: M rows; the gates of a row lie side by side, D each.
// Mapping: rows are shared by the threads, in pieces of kPiece elements: a gradient that nobody wants goes to a buffer
//   of that size. The LayerNorm in front of the gates works as in norm_act.cpp.
// Cost: a sigmoid or tanh a gate. An element of the state reads 4 numbers and writes 1 (torch's GRU 7 and 1, the two
//   halves of PlaNet's cell 2 or 3 and 1); backward it reads the gradient, too, and writes one number for each that the
//   cell read. With LayerNorm a row is read again from the caches.
// Numerics: math/gru.h and math/norm.h in S; partial sums in S.
// Source: Hafner et al. (2021, 2025); Cho et al. (2014), in the variant of cuDNN; TensorFlow's GRUBlockCell.

#include "../math/gru.h"
#include "kernels.h"
#include "norm_rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kPiece = 512;

// An output that may be unwanted (null).
template <typename S>
struct Piece {
  S* out;
  alignas(64) S unwanted[kPiece];

  explicit Piece(S* out) : out(out) {}
  S* at(int64_t offset) { return out ? out + offset : unwanted; }
};

// piece(m, first, n) over all rows m in [begin, end) and their elements [first, first + n).
template <typename Fn>
inline void over_pieces(int64_t begin, int64_t end, int64_t D, const Fn& piece) {
  for (int64_t m = begin; m < end; ++m)
    for (int64_t first = 0; first < D; first += kPiece) piece(m, first, D - first < kPiece ? D - first : kPiece);
}

// ---- Dreamer's ------------------------------------------------------------------------------------------------------

template <typename S>
void block_forward(const BlockGruGatesArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t m = begin; m < end; ++m) {
    const S *gates = a.gates + m * 3 * D, *deter = a.deter + m * D;
    S* y = a.y + m * D;
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i)
      y[i] = math::gru_step(math::GruGates<S>{gates[i], gates[D + i], gates[2 * D + i]}, deter[i]);
  }
}

template <typename S>
void block_backward(const BlockGruGatesBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Piece<S> out_reset(a.grad_gates), out_candidate(a.grad_gates), out_update(a.grad_gates), out_deter(a.grad_deter);
  over_pieces(begin, end, D, [&](int64_t m, int64_t first, int64_t n) {
    const int64_t at = m * D + first, wide = m * 3 * D + first;
    const S *grad = a.grad + at, *gates = a.gates + wide, *deter = a.deter + at;
    S *grad_reset = out_reset.at(wide), *grad_candidate = out_candidate.at(wide + D),
      *grad_update = out_update.at(wide + 2 * D), *grad_deter = out_deter.at(at);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const auto g = math::gru_grad(grad[i], math::GruGates<S>{gates[i], gates[D + i], gates[2 * D + i]}, deter[i]);
      grad_reset[i] = g.gates.reset;
      grad_candidate[i] = g.gates.candidate;
      grad_update[i] = g.gates.update;
      grad_deter[i] = g.deter;
    }
  });
}

// The gates of element i after the normalisation.
template <typename S>
inline math::GruGates<S> normalised(const S* pre, const S* scale, const S* shift, math::NormRow<S> row, int64_t D,
                                    int64_t i) {
  const int64_t j = D + i, k = 2 * D + i;
  return {scale[i] * math::norm_hat(pre[i], row) + shift[i], scale[j] * math::norm_hat(pre[j], row) + shift[j],
          scale[k] * math::norm_hat(pre[k], row) + shift[k]};
}

template <typename S>
void layernorm_forward(const LayernormGruGatesArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  const S *scale = a.scale, *shift = a.shift;
  for (int64_t m = begin; m < end; ++m) {
    const S *pre = a.pre + m * 3 * D, *deter = a.deter + m * D;
    S* y = a.y + m * D;
    const math::NormRow<S> row = norm_row(pre, 3 * D, true, a.eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i) y[i] = math::gru_step(normalised(pre, scale, shift, row, D, i), deter[i]);
  }
}

template <typename S>
void layernorm_backward(const LayernormGruGatesBackwardArgs<S>& a, int64_t begin, int64_t end, S* partial) {
  const int64_t D = a.D;
  const S *scale = a.scale, *shift = a.shift;
  NormSums<S> sums(partial, 3 * D);
  Piece<S> out_deter(a.grad_deter);
  for (int64_t m = begin; m < end; ++m) {
    const S* pre = a.pre + m * 3 * D;
    const math::NormRow<S> row = norm_row(pre, 3 * D, true, a.eps);
    S* q = a.grad_pre ? a.grad_pre + m * 3 * D : sums.row;
    over_pieces(m, m + 1, D, [&](int64_t, int64_t first, int64_t n) {
      const S *grad = a.grad + m * D, *deter = a.deter + m * D;
      S* grad_deter = out_deter.at(m * D + first);
      if (!q) {  // only the state's gradient is wanted
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i)
          grad_deter[i] =
              math::gru_grad(grad[first + i], normalised(pre, scale, shift, row, D, first + i), deter[first + i]).deter;
        return;
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) {
        const int64_t j = first + i;
        const auto g = math::gru_grad(grad[j], normalised(pre, scale, shift, row, D, j), deter[j]);
        q[j] = g.gates.reset;
        q[D + j] = g.gates.candidate;
        q[2 * D + j] = g.gates.update;
        grad_deter[i] = g.deter;
      }
    });
    if (partial) sums.add(pre, q, row, 3 * D);
    if (a.grad_pre) norm_row_backward(pre, q, scale, row, true, 3 * D, q);
  }
}

// ---- Keras' reset_after ---------------------------------------------------------------------------------------------

template <typename S>
void reset_after_forward(const GruGatesArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t m = begin; m < end; ++m) {
    const S *x = a.input + m * 3 * D, *h = a.hidden + m * 3 * D, *deter = a.deter + m * D;
    S* y = a.y + m * D;
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i)
      y[i] = math::reset_after_step(math::ResetAfterGates<S>{x[i], x[D + i], x[2 * D + i]},
                                    math::ResetAfterGates<S>{h[i], h[D + i], h[2 * D + i]}, deter[i]);
  }
}

template <typename S>
void reset_after_backward(const GruGatesBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Piece<S> of_input[3] = {Piece<S>(a.grad_input), Piece<S>(a.grad_input), Piece<S>(a.grad_input)};
  Piece<S> of_hidden[3] = {Piece<S>(a.grad_hidden), Piece<S>(a.grad_hidden), Piece<S>(a.grad_hidden)};
  Piece<S> of_deter(a.grad_deter);
  over_pieces(begin, end, D, [&](int64_t m, int64_t first, int64_t n) {
    const int64_t at = m * D + first, wide = m * 3 * D + first;
    const S *grad = a.grad + at, *x = a.input + wide, *h = a.hidden + wide, *deter = a.deter + at;
    S *input_reset = of_input[0].at(wide), *input_keep = of_input[1].at(wide + D),
      *input_candidate = of_input[2].at(wide + 2 * D), *hidden_reset = of_hidden[0].at(wide),
      *hidden_keep = of_hidden[1].at(wide + D), *hidden_candidate = of_hidden[2].at(wide + 2 * D),
      *grad_deter = of_deter.at(at);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const auto g = math::reset_after_grad(grad[i], math::ResetAfterGates<S>{x[i], x[D + i], x[2 * D + i]},
                                            math::ResetAfterGates<S>{h[i], h[D + i], h[2 * D + i]}, deter[i]);
      input_reset[i] = g.input.reset;
      input_keep[i] = g.input.keep;
      input_candidate[i] = g.input.candidate;
      hidden_reset[i] = g.input.reset;
      hidden_keep[i] = g.input.keep;
      hidden_candidate[i] = g.hidden_candidate;
      grad_deter[i] = g.deter;
    }
  });
}

// ---- PlaNet's -------------------------------------------------------------------------------------------------------

template <typename S>
void reset_forward(const GruBlockResetArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t m = begin; m < end; ++m) {
    const S *gates = a.gates + m * 2 * D, *deter = a.deter + m * D;
    S* y = a.y + m * D;
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i) y[i] = math::reset_before_reset(gates[i], deter[i]);
  }
}

template <typename S>
void reset_backward(const GruBlockResetBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Piece<S> out_reset(a.grad_gates), out_update(a.grad_gates), out_deter(a.grad_deter);
  over_pieces(begin, end, D, [&](int64_t m, int64_t first, int64_t n) {
    const int64_t at = m * D + first, wide = m * 2 * D + first;
    const S *grad = a.grad + at, *gates = a.gates + wide, *deter = a.deter + at;
    S *grad_reset = out_reset.at(wide), *grad_update = out_update.at(wide + D), *grad_deter = out_deter.at(at);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const auto g = math::reset_before_reset_grad(grad[i], gates[i], deter[i]);
      grad_reset[i] = g.reset;
      grad_update[i] = S(0);
      grad_deter[i] = g.deter;
    }
  });
}

template <typename S>
void update_forward(const GruBlockUpdateArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  for (int64_t m = begin; m < end; ++m) {
    const S *gates = a.gates + m * 2 * D, *candidate = a.candidate + m * D, *deter = a.deter + m * D;
    S* y = a.y + m * D;
#pragma GCC ivdep
    for (int64_t i = 0; i < D; ++i) y[i] = math::reset_before_update(gates[D + i], candidate[i], deter[i]);
  }
}

template <typename S>
void update_backward(const GruBlockUpdateBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t D = a.D;
  Piece<S> out_reset(a.grad_gates), out_update(a.grad_gates), out_candidate(a.grad_candidate), out_deter(a.grad_deter);
  over_pieces(begin, end, D, [&](int64_t m, int64_t first, int64_t n) {
    const int64_t at = m * D + first, wide = m * 2 * D + first;
    const S *grad = a.grad + at, *gates = a.gates + wide, *candidate = a.candidate + at, *deter = a.deter + at;
    S *grad_reset = out_reset.at(wide), *grad_update = out_update.at(wide + D), *grad_candidate = out_candidate.at(at),
      *grad_deter = out_deter.at(at);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const auto g = math::reset_before_update_grad(grad[i], gates[D + i], candidate[i], deter[i]);
      grad_reset[i] = S(0);
      grad_update[i] = g.update;
      grad_candidate[i] = g.candidate;
      grad_deter[i] = g.deter;
    }
  });
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.block_gru_gates = block_forward<S>;
  table.block_gru_gates_backward = block_backward<S>;
  table.layernorm_gru_gates = layernorm_forward<S>;
  table.layernorm_gru_gates_backward = layernorm_backward<S>;
  table.gru_gates = reset_after_forward<S>;
  table.gru_gates_backward = reset_after_backward<S>;
  table.gru_block_reset = reset_forward<S>;
  table.gru_block_reset_backward = reset_backward<S>;
  table.gru_block_update = update_forward<S>;
  table.gru_block_update_backward = update_backward<S>;
}

}  // namespace

void fill_gru_gates(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
