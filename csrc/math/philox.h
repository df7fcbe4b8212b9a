// Philox4x32-10: random numbers by counting. An element's numbers depend on the seed and on its own counter alone, so
// they are the same on every backend, for every shape of the batch and number of threads.
//
// Counter: (row, step, stream, slot / 4); key: the two words of the seed; slot s of a row takes word s % 4.
// Source: Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

struct PhiloxBlock {
  uint32_t word[4];
};

PYWM_HD PhiloxBlock philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// In [0, 1), a multiple of 2^-24: exact in float.
template <typename S>
PYWM_HD S uniform_of(uint32_t word) {
  return S(static_cast<int32_t>(word >> 8)) * S(5.9604644775390625e-8);
}

template <typename S>
struct SinCos {
  S sin, cos;
};

// Of 2·π·u for u in [0, 1).
PYWM_HD SinCos<float> sin_cos_of_turn(float u) {
  const float quarters = 4.f * u;
  const int32_t q = static_cast<int32_t>(quarters + 0.5f);
  const float x = (quarters - static_cast<float>(q)) * 1.57079632679489662f, x2 = x * x;
  const float s = x + x * x2 * (-1.f / 6 + x2 * (1.f / 120 + x2 * (-1.f / 5040 + x2 * (1.f / 362880))));
  const float c = 1.f + x2 * (-0.5f + x2 * (1.f / 24 + x2 * (-1.f / 720 + x2 * (1.f / 40320 - x2 * (1.f / 3628800)))));
  const bool swapped = (q & 1) != 0;
  const float sine = swapped ? c : s, cosine = swapped ? s : c;
  return {(q & 2) != 0 ? -sine : sine, ((q + 1) & 2) != 0 ? -cosine : cosine};
}
PYWM_HD SinCos<double> sin_cos_of_turn(double u) {
  const double angle = 6.28318530717958648 * u;
  return {::sin(angle), ::cos(angle)};
}

PYWM_HD float square_root(float x) { return ::sqrtf(x); }
PYWM_HD double square_root(double x) { return ::sqrt(x); }

// Two independent standard normals of two words (Box and Muller). The first uniform is shifted into (0, 1], for the
// logarithm; so |z| < 5.8.
template <typename S>
struct NormalPair {
  S first, second;
};
template <typename S>
PYWM_HD NormalPair<S> normals_of(uint32_t word0, uint32_t word1) {
  const S u = uniform_of<S>(word0) + S(5.9604644775390625e-8);
  const S radius = square_root(S(-2) * log_of(u));
  const SinCos<S> angle = sin_cos_of_turn(uniform_of<S>(word1));
  return {radius * angle.cos, radius * angle.sin};
}

}  // namespace pywm::math
