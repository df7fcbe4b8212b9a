// Exponential and friends. On the CPU a polynomial that compilers vectorise (libm's expf is a call per element);
// within 2 ulp of the true value, exact at 0, infinite and zero where float overflows and underflows, NaN for NaN.
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"

#if !defined(__CUDACC__)
#include <bit>
#endif

namespace pywm::math {

#if defined(__CUDACC__)

PYWM_HD float exp(float x) { return ::expf(x); }
PYWM_HD double exp(double x) { return ::exp(x); }

#else

PYWM_HD float exp(float x) {
  constexpr float kLow = -86.6f, kHigh = 88.72f;
  const float clamped = x < kLow ? kLow : (x > kHigh ? kHigh : x);
  // Adding 1.5·2^23 rounds to the nearest integer and leaves it in the low bits: no conversion, so NaN is harmless.
  constexpr float kRound = 12582912.f;
  const float shifted = clamped * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float f = clamped + n * -0.693359375f;
  f = f + n * 2.12194440e-4f;
  float p = 1.f / 5040;
  p = p * f + 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  // 2^(n-1), doubled: 2^n itself overflows for the largest n.
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  const float scale = std::bit_cast<float>(static_cast<uint32_t>(exponent + 126) << 23);
  const float y = p * scale * 2.f;
  return x < kLow ? 0.f : (x > kHigh ? INFINITY : y);
}
PYWM_HD double exp(double x) { return ::exp(x); }

#endif

PYWM_HD float log(float x) { return ::logf(x); }
PYWM_HD double log(double x) { return ::log(x); }

PYWM_HD float sqrt(float x) { return ::sqrtf(x); }
PYWM_HD double sqrt(double x) { return ::sqrt(x); }

}  // namespace pywm::math
