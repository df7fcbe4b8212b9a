// The part of cuda_bf16.h that pywm's kernels use.
#pragma once

#include <cstdint>

#include "emulator.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
};

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

// Rounds to nearest even, as the device does.
inline __nv_bfloat16 __float2bfloat16(float x) {
  if (std::isnan(x)) return {0x7fff};
  const unsigned bits = __float_as_uint(x);
  const unsigned lowest_kept_bit = (bits >> 16) & 1u;
  return {static_cast<uint16_t>((bits + 0x7fffu + lowest_kept_bit) >> 16)};
}

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16(low), __float2bfloat16(high)};
}
