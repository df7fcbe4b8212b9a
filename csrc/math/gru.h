// The gates of the recurrent cells, one element of the state at a time, with their derivatives; see
// pywm/ops/gru_gates.py. Everything named after a gate is its pre-activation, or the derivative with respect to it.
#pragma once

#include "../macros.h"
#include "activations.h"

namespace pywm::math {

// ---- Dreamer -------------------------------------------------------------------------------------------------------
//      h' = u·c + (1-u)·h with r = σ(reset), c = tanh(r·candidate), u = σ(update - 1)

template <typename S>
struct GruGates {
  S reset, candidate, update;
};

template <typename S>
struct GruGrad {
  GruGates<S> gates;
  S deter;
};

constexpr double kUpdateBias = -1;  // so that a new cell rather keeps its state

template <typename S>
PYWM_HD S gru_step(GruGates<S> gates, S deter) {
  const S r = sigmoid(gates.reset), u = sigmoid(gates.update + S(kUpdateBias));
  const S c = tanh(r * gates.candidate);
  return u * c + (S(1) - u) * deter;
}

template <typename S>
PYWM_HD GruGrad<S> gru_grad(S grad, GruGates<S> gates, S deter) {
  const S r = sigmoid(gates.reset), u = sigmoid(gates.update + S(kUpdateBias));
  const S c = tanh(r * gates.candidate);
  const S s = tanh_grad(grad * u, c);
  return {{s * gates.candidate * sigmoid_slope(r), s * r, grad * (c - deter) * sigmoid_slope(u)}, (S(1) - u) * grad};
}

// ---- Keras' reset_after and torch.nn.GRUCell -----------------------------------------------------------------------
//      h' = z·h + (1-z)·n with r = σ(i_r + h_r), z = σ(i_z + h_z), n = tanh(i_n + r·h_n)

template <typename S>
struct ResetAfterGates {
  S reset, keep, candidate;
};

// Reset and keep gates add both halves, whose derivatives there are the same.
template <typename S>
struct ResetAfterGrad {
  ResetAfterGates<S> input;
  S hidden_candidate, deter;
};

template <typename S>
PYWM_HD S reset_after_step(ResetAfterGates<S> input, ResetAfterGates<S> hidden, S deter) {
  const S r = sigmoid(input.reset + hidden.reset), z = sigmoid(input.keep + hidden.keep);
  const S n = tanh(input.candidate + r * hidden.candidate);
  return z * deter + (S(1) - z) * n;
}

template <typename S>
PYWM_HD ResetAfterGrad<S> reset_after_grad(S grad, ResetAfterGates<S> input, ResetAfterGates<S> hidden, S deter) {
  const S r = sigmoid(input.reset + hidden.reset), z = sigmoid(input.keep + hidden.keep);
  const S n = tanh(input.candidate + r * hidden.candidate);
  const S s = tanh_grad(grad * (S(1) - z), n);
  return {{s * hidden.candidate * sigmoid_slope(r), grad * (deter - n) * sigmoid_slope(z), s}, s * r, z * grad};
}

// ---- PlaNet's GRUBlockCell, whose reset gate stands before the matrix product --------------------------------------
//      h' = u·h + (1-u)·tanh(candidate) with u = σ(update); the candidate comes from a product with σ(reset)·h

template <typename S>
PYWM_HD S reset_before_reset(S reset, S deter) {
  return sigmoid(reset) * deter;
}

template <typename S>
struct ResetBeforeResetGrad {
  S reset, deter;
};

template <typename S>
PYWM_HD ResetBeforeResetGrad<S> reset_before_reset_grad(S grad, S reset, S deter) {
  const S r = sigmoid(reset);
  return {grad * deter * sigmoid_slope(r), grad * r};
}

template <typename S>
PYWM_HD S reset_before_update(S update, S candidate, S deter) {
  const S u = sigmoid(update);
  return u * deter + (S(1) - u) * tanh(candidate);
}

template <typename S>
struct ResetBeforeUpdateGrad {
  S update, candidate, deter;
};

template <typename S>
PYWM_HD ResetBeforeUpdateGrad<S> reset_before_update_grad(S grad, S update, S candidate, S deter) {
  const S u = sigmoid(update), c = tanh(candidate);
  return {grad * (deter - c) * sigmoid_slope(u), tanh_grad(grad * (S(1) - u), c), u * grad};
}

}  // namespace pywm::math
