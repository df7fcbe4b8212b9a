// Averages over areas of bytes on the CPU. See pywm/ops/resize_area.py.
//
// What: pictures with fewer pixels, each the average of the area that it covers.
// Layout: frames [M, h, w], out [M, h2, w2], contiguous.
// Mapping: threads share the rows of the results. A row is the weighted sum of those it covers, then of neighbouring
//   columns, whose places and weights dispatch.cpp has laid down in a table.
// Cost: reads every row once, and those that two results share twice; a multiplication for each pixel, and one more for
//   each column's share of a result.
// Numerics: integers throughout; the last quotient is exact, see math/pixels.h.
// Source: OpenCV's INTER_AREA.

#include "../math/pixels.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// Sum: what holds a byte times the area.
template <typename Sum>
void columns_of(const AreaColumns& t, const math::Average& average, const int32_t* __restrict sums,
                uint8_t* __restrict y, int64_t w2) {
  constexpr int64_t kColumns = 64;
  alignas(64) Sum totals[kColumns];
  for (int64_t first = 0; first < w2; first += kColumns) {
    const int64_t count = w2 - first < kColumns ? w2 - first : kColumns;
    for (int64_t j = 0; j < count; ++j) totals[j] = 0;
    for (int64_t k = 0; k < t.taps; ++k) {
      const int32_t* __restrict weight = t.weight + k * w2 + first;
      const int32_t* __restrict place = t.place + first;
      for (int64_t j = 0; j < count; ++j) totals[j] += static_cast<Sum>(weight[j]) * sums[place[j] + k];
    }
    for (int64_t j = 0; j < count; ++j) y[first + j] = average(totals[j]);
  }
}

void resize_area(const ResizeAreaArgs& a, const AreaColumns& columns, int64_t begin, int64_t end) {
  alignas(64) int32_t sums[2 * kMaxSide];  // a row, and zeros for the taps that reach beyond it
  for (int64_t q = a.w; q < a.w + columns.taps; ++q) sums[q] = 0;
  const math::Average average(a.h * a.w);
  const bool narrow = a.h * a.w <= INT32_MAX / 255;
  for (int64_t i = begin; i < end; ++i) {
    const math::Cover rows(i % a.h2, a.h, a.h2);
    for (int64_t p = rows.first; p <= rows.last; ++p) {
      const uint8_t* __restrict x = a.frames + (i / a.h2 * a.h + p) * a.w;
      const int32_t weight = static_cast<int32_t>(rows.overlap(p, a.h2));
      if (p == rows.first)
        for (int64_t q = 0; q < a.w; ++q) sums[q] = weight * x[q];
      else
        for (int64_t q = 0; q < a.w; ++q) sums[q] += weight * x[q];
    }
    uint8_t* y = a.out + i * a.w2;
    if (narrow)
      columns_of<int32_t>(columns, average, sums, y, a.w2);
    else
      columns_of<int64_t>(columns, average, sums, y, a.w2);
  }
}

}  // namespace

void fill_resize_area(Kernels& table) { table.resize_area = resize_area; }

}  // namespace pywm::cpu::PYWM_ISA
