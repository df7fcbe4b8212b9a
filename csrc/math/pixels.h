// Formulas on pixels: their cross-entropy's cut-off, the rows of a stack of frames, standardised bytes, averages over
// areas, and a choice.
#pragma once

#include <cmath>
#include <cstdint>

#include "../macros.h"
#include "exp.h"

namespace pywm::math {

// max(0, ce - cutoff); a NaN stays one.
template <typename S>
PYWM_HD S cut_off(S ce, S cutoff) {
  const S loss = ce - cutoff;
  return loss <= S(0) ? S(0) : loss;
}

// The row that a stack shows `back` rows before its newest one, inside [0, R) in any case.
PYWM_HD int64_t stack_row(int64_t index, int64_t first, int64_t back, int64_t R) {
  int64_t row = index - back;
  row = row < first ? first : row;
  row = row < 0 ? 0 : row;
  return row < R ? row : R - 1;
}

// (x - mean) / max(std, 1 / sqrt(n)) of n bytes, from their sum and that of their squares. The mean is an integer and a
// rest below 1, so that the difference is as exact as its size, whatever the mean.
template <typename S>
struct Standard {
  S whole, rest, inverse;

  PYWM_HD Standard(double sum, double squares, double n) {
    const double mean = sum / n, variance = squares / n - mean * mean;
    const double least = 1 / n;
    const int64_t nearest = static_cast<int64_t>(mean + 0.5);
    whole = static_cast<S>(nearest);
    rest = static_cast<S>(mean - static_cast<double>(nearest));
    inverse = static_cast<S>(1 / math::sqrt(variance > least ? variance : least));
  }
  PYWM_HD S operator()(uint8_t x) const { return ((static_cast<S>(x) - whole) - rest) * inverse; }
};

// Pixels of n that pixel i of n2 covers, n2 <= n: `first` to `last`. Each is n2 wide, the larger one n.
struct Cover {
  int64_t first, last, begin, end;

  PYWM_HD Cover(int64_t i, int64_t n, int64_t n2) : begin(i * n), end((i + 1) * n) {
    first = begin / n2;
    last = (end - 1) / n2;
  }
  PYWM_HD int64_t overlap(int64_t p, int64_t n2) const {
    const int64_t low = p * n2 > begin ? p * n2 : begin, high = (p + 1) * n2 < end ? (p + 1) * n2 : end;
    return high - low;
  }
};

// sum / area rounded to the nearest integer, halves up. The quarter keeps the quotient away from the integers by more
// than a product with the rounded inverse is wrong, so that the result is exact: in float up to an area of 1000, in
// double for every other.
template <typename S>
struct Average {
  S bias, inverse;

  explicit PYWM_HD Average(int64_t area)
      : bias(static_cast<S>(0.5 * static_cast<double>(area) + 0.25)), inverse(S(1) / static_cast<S>(area)) {}
  template <typename Sum>
  PYWM_HD uint8_t operator()(Sum sum) const {
    return static_cast<uint8_t>(static_cast<int>((static_cast<S>(sum) + bias) * inverse));
  }
};
constexpr int64_t kFloatArea = 1000;

// Which of `count` places a uniform number chooses.
PYWM_HD int64_t chosen(double uniform, int64_t count) {
  const double place = uniform * static_cast<double>(count);
  if (!(place > 0)) return 0;
  return place < static_cast<double>(count) ? static_cast<int64_t>(place) : count - 1;
}

}  // namespace pywm::math
