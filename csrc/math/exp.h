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

// exp(x) for -87 <= x <= 88, infinity for 88.4 to 89, NaN for NaN: without what the ends need, in half the
// instructions.
PYWM_HD float exp_within(float x) {
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
  p = p * f + 1.f;
  p = p * f + 1.f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  return p * std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23);
}

#endif

// exp(x) for x <= 88, as differences to a largest number are; NaN for NaN. Below -87.7, where 2^n is the exponent 0 and
// so the number 0, it is exactly that.
#if defined(__CUDACC__)
PYWM_HD float exp_below(float x) { return ::expf(x); }
#else
PYWM_HD float exp_below(float x) { return exp_within(x < -88.f ? -88.f : x); }
#endif
PYWM_HD double exp_below(double x) { return ::exp(x); }

PYWM_HD float log(float x) { return ::logf(x); }
PYWM_HD double log(double x) { return ::log(x); }

PYWM_HD float sqrt(float x) { return ::sqrtf(x); }
PYWM_HD double sqrt(double x) { return ::sqrt(x); }
// The logarithm of every element of a row: on the CPU a polynomial too, within 2 ulp (and 1e-7 near 1).
#if defined(__CUDACC__)
PYWM_HD float log_of(float x) { return ::logf(x); }
#else
PYWM_HD float log_of(float x) {
  constexpr float kSmallest = 1.17549435e-38f;
  const bool tiny = x < kSmallest;  // subnormal: scaled by 2^24, which is exact
  const float scaled = tiny ? x * 16777216.f : x;
  // Mantissa in [sqrt(1/2), sqrt(2)).
  const uint32_t bits = std::bit_cast<uint32_t>(scaled) - 0x3F3504F3u;
  const int32_t e = static_cast<int32_t>(bits) >> 23;
  const float n = static_cast<float>(e) - (tiny ? 24.f : 0.f);
  const float f = std::bit_cast<float>((bits & 0x7FFFFFu) + 0x3F3504F3u) - 1.f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  float y = f * square * p;
  y = y - 2.12194440e-4f * n;
  y = y - 0.5f * square;
  y = (f + y) + 0.693359375f * n;
  y = x > 0.f ? y : (x == 0.f ? -INFINITY : NAN);
  return x < INFINITY ? y : x;  // infinity and NaN are their own logarithms
}
#endif
PYWM_HD double log_of(double x) { return ::log(x); }

}  // namespace pywm::math
