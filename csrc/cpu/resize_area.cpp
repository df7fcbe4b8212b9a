// Averages over areas of bytes on the CPU. See pywm/ops/resize_area.py.
//
// What: pictures with fewer pixels, each the average of the area that it covers.
// Layout: frames [M, h, w], out [M, h2, w2], contiguous.
// Mapping: threads share the rows of the results. A row is the weighted sum of those it covers, then of neighbouring
//   columns, whose places and weights dispatch.cpp has laid down in a table.
// Cost: reads every row once, and those that two results share twice; a multiplication for each pixel, and one more for
//   each column's share of a result.
// Numerics: integers throughout, in the smallest units that the ratio allows; the last quotient is exact, see
//   math/pixels.h.
// Source: OpenCV's INTER_AREA.

#include "../math/pixels.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kColumns = 64;

// S: of the quotient; Sum: what holds a byte times the area.
template <typename S, typename Sum>
void columns_of(const AreaPlan& plan, const math::Average<S>& average, const int32_t* __restrict sums,
                uint8_t* __restrict y, int64_t w2) {
  alignas(64) Sum totals[kColumns];
  for (int64_t first = 0; first < w2; first += kColumns) {
    const int64_t count = w2 - first < kColumns ? w2 - first : kColumns;
    const int32_t* __restrict place = plan.place + first;
    if (plan.columns == 2 && plan.columns2 == 1) {  // without the table
      for (int64_t j = 0; j < count; ++j)
        totals[j] = static_cast<Sum>(sums[2 * (first + j)]) + sums[2 * (first + j) + 1];
    } else {
      for (int64_t j = 0; j < count; ++j) totals[j] = 0;
      for (int64_t k = 0; k < plan.taps; ++k) {
        const int32_t* __restrict weight = plan.weight + k * w2 + first;
        for (int64_t j = 0; j < count; ++j) totals[j] += static_cast<Sum>(weight[j]) * sums[place[j] + k];
      }
    }
    for (int64_t j = 0; j < count; ++j) y[first + j] = average(totals[j]);
  }
}

template <typename S, typename Sum>
void rows_of(const ResizeAreaArgs& a, const AreaPlan& plan, int64_t begin, int64_t end) {
  alignas(64) int32_t sums[2 * kMaxSide];  // a row, and zeros for the taps that reach beyond it
  for (int64_t q = a.w; q < a.w + plan.taps; ++q) sums[q] = 0;
  const math::Average<S> average(plan.rows * plan.columns);
  for (int64_t i = begin; i < end; ++i) {
    const math::Cover rows(i % a.h2, plan.rows, plan.rows2);
    for (int64_t p = rows.first; p <= rows.last; ++p) {
      const uint8_t* __restrict x = a.frames + (i / a.h2 * a.h + p) * a.w;
      const int32_t weight = static_cast<int32_t>(rows.overlap(p, plan.rows2));
      if (p == rows.first)
        for (int64_t q = 0; q < a.w; ++q) sums[q] = weight * x[q];
      else
        for (int64_t q = 0; q < a.w; ++q) sums[q] += weight * x[q];
    }
    columns_of<S, Sum>(plan, average, sums, a.out + i * a.w2, a.w2);
  }
}

void resize_area(const ResizeAreaArgs& a, const AreaPlan& plan, int64_t begin, int64_t end) {
  const int64_t area = plan.rows * plan.columns;
  if (area <= math::kFloatArea)
    rows_of<float, int32_t>(a, plan, begin, end);
  else if (area <= INT32_MAX / 255)
    rows_of<double, int32_t>(a, plan, begin, end);
  else
    rows_of<double, int64_t>(a, plan, begin, end);
}

}  // namespace

void fill_resize_area(Kernels& table) { table.resize_area = resize_area; }

}  // namespace pywm::cpu::PYWM_ISA
