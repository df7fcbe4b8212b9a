// The intrinsics of AVX512-BF16 that csrc/cpu/gemm.h uses, as Intel's guide defines them, for processors without them.
#pragma once

#include <cstdint>
#include <cstring>

typedef float __m512 __attribute__((vector_size(64), may_alias));
typedef long long __m512i __attribute__((vector_size(64), may_alias));
typedef short __m512bh __attribute__((vector_size(64), may_alias));

inline float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline uint16_t narrowed(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512 _mm512_loadu_ps(const void* from) {
  __m512 x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
inline __m512i _mm512_set1_epi32(int x) {
  int lanes[16];
  for (int& lane : lanes) lane = x;
  __m512i all;
  std::memcpy(&all, lanes, sizeof all);
  return all;
}
inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b) {
  uint16_t lanes[32];
  for (int j = 0; j < 32; ++j) lanes[j] = narrowed(j < 16 ? b[j] : a[j - 16]);
  __m512bh x;
  std::memcpy(&x, lanes, sizeof x);
  return x;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  uint16_t x[32], y[32];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int j = 0; j < 16; ++j) {
    sum[j] += widened(x[2 * j + 1]) * widened(y[2 * j + 1]);
    sum[j] += widened(x[2 * j]) * widened(y[2 * j]);
  }
  return sum;
}
