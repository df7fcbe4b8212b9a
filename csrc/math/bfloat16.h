// Rounding to bfloat16: the upper half of a float.
#pragma once

#include <cstdint>

#include "../macros.h"

namespace pywm::math {

// `x` rounded to the nearest bfloat16, ties to even, as the upper half of the result; NaN stays NaN.
PYWM_HD uint32_t bfloat16_bits(float x) {
#if defined(__CUDA_ARCH__)
  const uint32_t bits = __float_as_uint(x);
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
#endif
  const uint32_t magnitude = bits & 0x7fffffffu;
  return (magnitude > 0x7f800000u ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
}

}  // namespace pywm::math
