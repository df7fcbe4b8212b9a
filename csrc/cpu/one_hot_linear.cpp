// The linear layer of one-hot vectors on the CPU. See pywm/ops/one_hot_linear.py.
//
// What: y[m] = bias + the sum of `groups` columns of weight; backward, the gradients of weight and bias.
// Layout: weight [U, groups·classes], whose columns are far apart in memory; index [M, groups].
// Mapping: forward, panels of kPanel rows of weight are transposed, so that a column is contiguous; threads share the
//   panels, then the rows of y. A few rows read the columns where they are. Backward, a unit of work is a panel of one
//   group: its columns' gradients add up in the first-level cache and are then transposed. One more unit a panel sums
//   the bias. No sum is split, so the number of threads does not show.
// Cost: M·U·groups additions each way, no multiplication. Packing reads and writes the weight once; backward zeroes and
//   writes its gradient once, whatever M is.
// Numerics: sums in S, in the order of the groups, and of the rows.
// Source: its definition, a linear layer of one-hot vectors without the products with 0; from no paper.

#include "gemm.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kPanel = kOneHotPanel;

template <typename S>
void pack(const OneHotLinearArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kStep = 64;  // so many columns of the panel stay in the first-level cache
  const int64_t columns = a.groups * a.classes;
  for (int64_t p = begin; p < end; ++p) {
    const int64_t width = min(kPanel, a.U - p * kPanel);
    S* packed = a.packed + p * kPanel * columns;
    const S* weight = a.weight + p * kPanel * columns;
    for (int64_t first = 0; first < columns; first += kStep) {
      const int64_t last = min(columns, first + kStep);
      for (int64_t j = 0; j < width; ++j)
        for (int64_t c = first; c < last; ++c) packed[c * kPanel + j] = weight[j * columns + c];
      for (int64_t j = width; j < kPanel; ++j)
        for (int64_t c = first; c < last; ++c) packed[c * kPanel + j] = S(0);
    }
  }
}

template <typename S>
void forward(const OneHotLinearArgs<S>& a, int64_t begin, int64_t end) {
  using Vector = typename Simd<S>::Vector;
  constexpr int64_t kLanes = Simd<S>::kLanes, kVectors = kPanel / kLanes;
  const int64_t columns = a.groups * a.classes, panels = (a.U + kPanel - 1) / kPanel;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t width = min(kPanel, a.U - p * kPanel);
    const S* packed = a.packed + p * kPanel * columns;
    alignas(64) S start[kPanel] = {}, result[kPanel];
    for (int64_t j = 0; j < (a.bias ? width : 0); ++j) start[j] = a.bias[p * kPanel + j];
    for (int64_t m = begin; m < end; ++m) {
      const uint8_t* index = a.index + m * a.groups;
      Vector sum[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) sum[v] = reinterpret_cast<const Vector*>(start)[v];
      for (int64_t s = 0; s < a.groups; ++s) {
        const Vector* column = reinterpret_cast<const Vector*>(packed + (s * a.classes + index[s]) * kPanel);
        for (int64_t v = 0; v < kVectors; ++v) sum[v] += column[v];
      }
      S* y = a.y + m * a.U + p * kPanel;
      Vector* to = reinterpret_cast<Vector*>(width == kPanel ? y : result);
      for (int64_t v = 0; v < kVectors; ++v) to[v] = sum[v];
      if (width < kPanel)
        for (int64_t j = 0; j < width; ++j) y[j] = result[j];
    }
  }
}

// So many rows at a time, whose sums do not wait for each other.
constexpr int64_t kFewRows = 8;

template <typename S>
void forward_few(const OneHotLinearArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t columns = a.groups * a.classes;
  for (int64_t u = begin; u < end; ++u) {
    const S* weight = a.weight + u * columns;
    const S start = a.bias ? a.bias[u] : S(0);
    int64_t m = 0;
    for (; m + kFewRows <= a.M; m += kFewRows) {
      const uint8_t* index = a.index + m * a.groups;
      S sums[kFewRows];
      for (int64_t r = 0; r < kFewRows; ++r) sums[r] = start;
      for (int64_t s = 0; s < a.groups; ++s)
        for (int64_t r = 0; r < kFewRows; ++r) sums[r] += weight[s * a.classes + index[r * a.groups + s]];
      for (int64_t r = 0; r < kFewRows; ++r) a.y[(m + r) * a.U + u] = sums[r];
    }
    for (; m < a.M; ++m) {
      const uint8_t* index = a.index + m * a.groups;
      S sum = start;
      for (int64_t s = 0; s < a.groups; ++s) sum += weight[s * a.classes + index[s]];
      a.y[m * a.U + u] = sum;
    }
  }
}

template <typename S>
void backward(const OneHotLinearBackwardArgs<S>& a, int64_t begin, int64_t end) {
  const int64_t columns = a.groups * a.classes, units = a.groups + 1;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t p = unit / units, s = unit % units, width = min(kPanel, a.U - p * kPanel);
    const S* grad = a.grad + p * kPanel;
    if (s == a.groups) {
      if (!a.grad_bias) continue;
      S sum[kPanel] = {};
      for (int64_t m = 0; m < a.M; ++m)
        for (int64_t j = 0; j < width; ++j) sum[j] += grad[m * a.U + j];
      for (int64_t j = 0; j < width; ++j) a.grad_bias[p * kPanel + j] = sum[j];
      continue;
    }
    if (!a.grad_weight) continue;
    S* sums = a.packed + (p * columns + s * a.classes) * kPanel;  // [classes, kPanel]
    for (int64_t i = 0; i < a.classes * kPanel; ++i) sums[i] = S(0);
    for (int64_t m = 0; m < a.M; ++m) {
      S* sum = sums + a.index[m * a.groups + s] * kPanel;
      const S* row = grad + m * a.U;
      if (width == kPanel) {
#pragma GCC ivdep
        for (int64_t j = 0; j < kPanel; ++j) sum[j] += row[j];
      } else {
        for (int64_t j = 0; j < width; ++j) sum[j] += row[j];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      S* out = a.grad_weight + (p * kPanel + j) * columns + s * a.classes;
      for (int64_t k = 0; k < a.classes; ++k) out[k] = sums[k * kPanel + j];
    }
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.one_hot_linear_pack = pack<S>;
  table.one_hot_linear = forward<S>;
  table.one_hot_linear_few = forward_few<S>;
  table.one_hot_linear_backward = backward<S>;
}

}  // namespace

void fill_one_hot_linear(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
