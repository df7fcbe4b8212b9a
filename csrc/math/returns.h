// Scalar formulas of the return estimators, shared by the CPU and CUDA backends.
//
// Rules of csrc/math/: no memory access, no loops over tensors, no includes but macros.h, <cmath> and <cstdint>.
// If a backend writes one of these formulas out by hand, that is a bug: the backends would be free to disagree.
// Masks select and never multiply, so that NaN behind a mask stays there.
#pragma once

#include "../macros.h"
#include "select.h"

namespace pywm::math {

// ---- GAE: advantage = δ + γλ·(1-done)·next_advantage, δ = r + γ·(1-terminated)·V' - V; see pywm/ops/gae.py -------

template <typename S>
PYWM_HD S gae_delta(S reward, S value, S next_value, bool terminated, S discount) {
  return reward + select(terminated, S(0), discount * next_value) - value;
}

// What the next row's advantage is multiplied with, for compositions of rows; gae_step selects instead.
template <typename S>
PYWM_HD S gae_decay(bool terminated, bool truncated, S discount_lam) {
  return select(terminated | truncated, S(0), discount_lam);
}

template <typename S>
PYWM_HD S gae_step(S delta, S next_advantage, bool terminated, bool truncated, S discount_lam) {
  return delta + select(terminated | truncated, S(0), discount_lam * next_advantage);
}

template <typename S>
struct GaeGrad {
  S reward, value, next_value;
  S carry;  // what the row after this one receives
};

// Gradients of one row. `carry` comes from the row before it, for the adjoint of a reverse scan runs forward in time.
template <typename S>
PYWM_HD GaeGrad<S> gae_grad(S grad_advantage, S grad_returns, S carry, bool terminated, bool truncated, bool valid,
                            S discount, S discount_lam) {
  const S total = select(valid, grad_advantage + grad_returns + carry, S(0));
  return {
      total,
      select(valid, grad_returns - total, S(0)),
      select(terminated, S(0), discount * total),
      select(terminated | truncated, S(0), discount_lam * total),
  };
}

// ---- λ-return: R = r + d·[(1-λ)·V' + λ·R'], R' := V' after the last row and before an invalid one ----------------

template <typename S>
PYWM_HD S lambda_return_step(S reward, S discount, S next_value, S next_return, S lam) {
  return reward + discount * ((S(1) - lam) * next_value + lam * next_return);
}

template <typename S>
struct LambdaReturnGrad {
  S reward, discount, next_value;
  S carry;  // gradient of next_return
};

// `bootstraps`: next_return was next_value itself, so its gradient goes there and nothing is carried on.
template <typename S>
PYWM_HD LambdaReturnGrad<S> lambda_return_grad(S grad, S discount, S next_value, S next_return, S lam, bool valid,
                                               bool bootstraps) {
  const S total = select(valid, grad, S(0));
  const S through = total * discount * lam;
  return {
      total,
      select(valid, total * ((S(1) - lam) * next_value + lam * next_return), S(0)),
      select(valid, total * discount * (S(1) - lam) + select(bootstraps, through, S(0)), S(0)),
      select(valid & !bootstraps, through, S(0)),
  };
}

// ---- Discounted return: R = r + d·R' ------------------------------------------------------------------------------

template <typename S>
PYWM_HD S discounted_return_step(S reward, S discount, S next_return) {
  return reward + discount * next_return;
}

template <typename S>
struct DiscountedReturnGrad {
  S reward, discount;
  S carry;  // gradient of next_return
};

// `grad` is the whole gradient of R in this row: its own plus what the row before carried over.
template <typename S>
PYWM_HD DiscountedReturnGrad<S> discounted_return_grad(S grad, S discount, S next_return) {
  return {grad, grad * next_return, grad * discount};
}

// ---- V-trace: y = ρ·(r + d·V' - V) + d·c·(1-truncated)·y', see pywm/ops/vtrace.py ---------------------------------

template <typename S>
PYWM_HD S vtrace_correction(S rho, S c, S reward, S discount, S value, S next_value, bool truncated, S next_y) {
  return rho * (reward + discount * next_value - value) + select(truncated, S(0), discount * c * next_y);
}

template <typename S>
PYWM_HD S vtrace_advantage(S rho, S reward, S discount, S value, S next_value, bool truncated, S next_y) {
  return rho * (reward + discount * (next_value + select(truncated, S(0), next_y)) - value);
}

template <typename S>
struct VtraceGrad {
  S reward, discount, value, next_value;
  S carry;  // gradient of next_y
};

// grad_y is the whole gradient of y in this row: that of the target plus what the row before carried over.
template <typename S>
PYWM_HD VtraceGrad<S> vtrace_grad(S grad_target, S grad_advantage, S grad_y, S rho, S c, S discount, S next_value,
                                  bool truncated, S next_y) {
  const S both = rho * (grad_y + grad_advantage);
  const S along = select(truncated, S(0), c * grad_y + rho * grad_advantage);
  return {
      both,
      both * next_value + select(truncated, S(0), along * next_y),
      grad_target - both,
      both * discount,
      discount * along,
  };
}

}  // namespace pywm::math
