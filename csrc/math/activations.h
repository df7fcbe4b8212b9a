// Activation functions, and their derivatives as functions of what the forward pass keeps.
#pragma once

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

#if defined(__CUDACC__)

PYWM_HD float expm1_within(float x) { return ::expm1f(x); }
PYWM_HD float tanh(float x) { return ::tanhf(x); }
PYWM_HD float sigmoid(float x) { return 1.f / (1.f + exp(-x)); }

#else

// exp(x) - 1 for -18 <= x <= 88 (or NaN), without the cancellation at 0: within 2 ulp.
PYWM_HD float expm1_within(float x) {
  // As in exp(): x = n·log 2 + f, n rounded by adding 1.5·2^23.
  constexpr float kRound = 12582912.f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float f = x + n * -0.693359375f;
  f = f + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * f + 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * (f * f) + f;  // exp(f) - 1
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
  return p * scale + (scale - 1.f);
}
// x·P(x²)/Q(x²), a minimax fit of relative error 1e-8 on |x| <= 8.2, and a little above 1 from there to 9, which the
// end of the function takes back: ±1 is as good there. All coefficients are positive, so nothing cancels: within 6 ulp
// everywhere. It takes 0.6 of the time of the way through exp().
PYWM_HD float tanh(float x) {
  constexpr float kLimit = 9.f;
  // Not chosen from at the end: a compiler carries such choices on into what follows, at three instructions each.
  x = kLimit < x ? kLimit : x;
  x = -kLimit > x ? -kLimit : x;
  const float u = x * x;
  float p = 1.48406307e-8f;
  p = p * u + 2.16373357e-5f;
  p = p * u + 3.55669034e-3f;
  p = p * u + 0.134321264f;
  p = p * u + 1.f;
  float q = 8.37063636e-7f;
  q = q * u + 3.38644746e-4f;
  q = q * u + 2.61083141e-2f;
  q = q * u + 0.467654522f;
  q = q * u + 1.f;
  const float y = x * p / q, most = 1.f < y ? 1.f : y;
  return -1.f > most ? -1.f : most;
}
// Exactly 0 where exp(-x) overflows, a little earlier than it would: a tiny number instead would make a gate let huge
// states pass, and infinite ones stay infinite where 0·infinity is NaN.
PYWM_HD float sigmoid(float x) {
  x = 87.f < x ? 87.f : x;
  x = -89.f > x ? -89.f : x;
  return 1.f / (1.f + exp_within(-x));
}

#endif

PYWM_HD double tanh(double x) { return ::tanh(x); }

template <typename S>
PYWM_HD S tanh_grad(S grad, S y) {
  return grad * (S(1) - y * y);
}

PYWM_HD double sigmoid(double x) { return 1. / (1. + exp(-x)); }
template <typename S>
PYWM_HD S sigmoid_slope(S y) {
  return y * (S(1) - y);
}

template <typename S>
PYWM_HD S silu(S x) {
  return x * sigmoid(x);
}
// The derivative at x; y alone does not tell it.
template <typename S>
PYWM_HD S silu_slope(S x) {
  const S s = sigmoid(x);
  return s * (S(1) + x * (S(1) - s));
}

PYWM_HD float elu(float x) {
  // Below -18 the result is -1 in float.
  const float bounded = x < -18.f ? -18.f : (x > 0.f ? 0.f : x);
  return x > 0.f ? x : expm1_within(bounded);
}
PYWM_HD double elu(double x) { return x > 0 ? x : ::expm1(x); }

template <typename S>
PYWM_HD S elu_grad(S grad, S y) {
  return y > S(0) ? grad : grad * (y + S(1));
}

// NaN passes, as it does in PyTorch.
template <typename S>
PYWM_HD S relu(S x) {
  return x < S(0) ? S(0) : x;
}
template <typename S>
PYWM_HD S relu_grad(S grad, S y) {
  return y <= S(0) ? S(0) : grad;
}

// Each as a type, with the derivative from x: for kernels that compute y again instead of keeping it.
struct None {
  template <typename S>
  static PYWM_HD S value(S x) {
    return x;
  }
  template <typename S>
  static PYWM_HD S grad(S grad, S) {
    return grad;
  }
};
struct Tanh {
  template <typename S>
  static PYWM_HD S value(S x) {
    return tanh(x);
  }
  template <typename S>
  static PYWM_HD S grad(S grad, S x) {
    return tanh_grad(grad, tanh(x));
  }
};
struct Silu {
  template <typename S>
  static PYWM_HD S value(S x) {
    return silu(x);
  }
  template <typename S>
  static PYWM_HD S grad(S grad, S x) {
    return grad * silu_slope(x);
  }
};
struct Elu {
  template <typename S>
  static PYWM_HD S value(S x) {
    return elu(x);
  }
  template <typename S>
  static PYWM_HD S grad(S grad, S x) {
    return elu_grad(grad, elu(x));
  }
};
struct Relu {
  template <typename S>
  static PYWM_HD S value(S x) {
    return relu(x);
  }
  template <typename S>
  static PYWM_HD S grad(S grad, S x) {
    return relu_grad(grad, x);
  }
};

}  // namespace pywm::math
