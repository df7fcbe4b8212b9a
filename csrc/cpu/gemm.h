// Matrix products for small and medium sizes, in GCC's vector extensions, compiled for each instruction set.
//
// What: C [M, N] = start + A·B, with start = 0, a bias [N], or what C holds. A micro-kernel keeps a tile of kRows x kCols
//   of C in registers and walks along K: one row of a packed panel of B, times kRows broadcast elements of A.
// Layout: A is any strided view with one of its strides 1 (so A^T needs no copy); C is row-major; B is packed into
//   panels of kCols columns, each [K, kCols] and padded with zeros, by `pack_panel` (B row-major) or
//   `pack_panel_transposed` (B = W^T, the weights of a linear layer). A panel costs about as much to pack as a product
//   with 8 rows; pack once, use often. `gemm_panel` packs as it goes, for a B that is used once.
// Mapping: panels of kDepth rows of B stay in the first-level cache while all rows of A pass by. Whoever calls splits M
//   over threads: every element of C is one chain of multiply-adds in the order of K, whatever the split.
// Numerics: accumulation in S; FMA where the instruction set has it.
//
// Included by kernel sources only; everything has internal linkage (see kernels.h).
#pragma once

#include <cstdint>

namespace pywm::cpu::PYWM_ISA {
namespace {

// The tile in registers: rows, and two vectors of columns. Accumulators, the panel's row and a broadcast must fit.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 12;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 6;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8;
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
#endif

template <typename S>
struct Simd {
  static constexpr int64_t kLanes = kVectorBytes / sizeof(S);
  static constexpr int64_t kCols = 2 * kLanes;
  // Aligned as its elements are: rows of any width are loaded.
  using Vector [[gnu::vector_size(kVectorBytes), gnu::aligned(alignof(S)), gnu::may_alias]] = S;
};

constexpr int64_t kDepth = 256;  // rows of a panel at a time: 16 KB with 64-byte rows

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <typename S>
inline int64_t panels(int64_t N) {
  return (N + Simd<S>::kCols - 1) / Simd<S>::kCols;
}

// `columns` <= kCols columns of B, row-major with `ld` elements a row.
template <typename S>
inline void pack_panel(const S* __restrict b, int64_t ld, int64_t K, int64_t columns, S* __restrict panel) {
  constexpr int64_t kCols = Simd<S>::kCols;
  using Vector = typename Simd<S>::Vector;
  if (columns == kCols) {
    for (int64_t k = 0; k < K; ++k) {
      const Vector* row = reinterpret_cast<const Vector*>(b + k * ld);
      Vector* to = reinterpret_cast<Vector*>(panel + k * kCols);
      to[0] = row[0];
      to[1] = row[1];
    }
    return;
  }
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = 0; j < columns; ++j) panel[k * kCols + j] = b[k * ld + j];
    for (int64_t j = columns; j < kCols; ++j) panel[k * kCols + j] = S(0);
  }
}

// The same of B = W^T, with `columns` rows of W.
template <typename S>
inline void pack_panel_transposed(const S* __restrict w, int64_t ld, int64_t K, int64_t columns, S* __restrict panel) {
  constexpr int64_t kCols = Simd<S>::kCols, kStep = 64;  // so many rows of the panel stay in the first-level cache
  for (int64_t first = 0; first < K; first += kStep) {
    const int64_t last = min(K, first + kStep);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = first; k < last; ++k) panel[k * kCols + j] = w[j * ld + k];
    for (int64_t j = columns; j < kCols; ++j)
      for (int64_t k = first; k < last; ++k) panel[k * kCols + j] = S(0);
  }
}

// A view of A: element (m, k) is data[m * row_stride + k * column_stride].
template <typename S>
struct MatrixView {
  const S* data;
  int64_t row_stride, column_stride;
};

// What a product is added to: nothing, a row that all rows of C share, or what C holds.
enum class Start { kZero, kBias, kAccumulate };

// R rows and V vectors of columns; `columns` of them exist. kByRow: the rows of A are contiguous, else its columns.
template <typename S, int R, int V, bool kByRow>
inline void tile(const S* __restrict a, int64_t stride, const S* __restrict panel, const S* bias, S* c, int64_t ldc,
                 int64_t K, int64_t columns, Start start) {
  constexpr int64_t L = Simd<S>::kLanes, kCols = Simd<S>::kCols;
  using Vector = typename Simd<S>::Vector;
  Vector acc[R][V];
  alignas(kVectorBytes) S edge[R][V * L];
  const bool whole = columns == V * L;
  if (start == Start::kAccumulate && whole) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = *reinterpret_cast<const Vector*>(c + r * ldc + v * L);
  } else if (start == Start::kZero) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = Vector{};
  } else {
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < V * L; ++j)
        edge[r][j] = j >= columns ? S(0) : start == Start::kBias ? bias[j] : c[r * ldc + j];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = *reinterpret_cast<const Vector*>(&edge[r][v * L]);
  }
  for (int64_t k = 0; k < K; ++k) {
    Vector b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Vector*>(panel + k * kCols + v * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const S x = kByRow ? a[r * stride + k] : a[k * stride + r];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] += b[v] * x;
    }
  }
  if (whole) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(c + r * ldc + v * L) = acc[r][v];
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(&edge[r][v * L]) = acc[r][v];
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * ldc + j] = edge[r][j];
}

template <typename S, int R, bool kByRow>
inline void tile(const S* a, int64_t stride, const S* panel, const S* bias, S* c, int64_t ldc, int64_t K,
                 int64_t columns, Start start) {
  if (columns > Simd<S>::kLanes)
    tile<S, R, 2, kByRow>(a, stride, panel, bias, c, ldc, K, columns, start);
  else
    tile<S, R, 1, kByRow>(a, stride, panel, bias, c, ldc, K, columns, start);
}

// All rows of A times one panel.
template <typename S, bool kByRow>
inline void column_of_tiles(const S* a, int64_t stride, const S* panel, const S* bias, S* c, int64_t ldc, int64_t M,
                            int64_t K, int64_t columns, Start start) {
  const int64_t step = kByRow ? stride : 1;
  int64_t m = 0;
  for (; m + kTileRows <= M; m += kTileRows)
    tile<S, kTileRows, kByRow>(a + m * step, stride, panel, bias, c + m * ldc, ldc, K, columns, start);
  if constexpr (kTileRows > 8)
    for (; m + 8 <= M; m += 8)
      tile<S, 8, kByRow>(a + m * step, stride, panel, bias, c + m * ldc, ldc, K, columns, start);
  if constexpr (kTileRows > 4)
    for (; m + 4 <= M; m += 4)
      tile<S, 4, kByRow>(a + m * step, stride, panel, bias, c + m * ldc, ldc, K, columns, start);
  for (; m + 2 <= M; m += 2)
    tile<S, 2, kByRow>(a + m * step, stride, panel, bias, c + m * ldc, ldc, K, columns, start);
  if (m < M) tile<S, 1, kByRow>(a + m * step, stride, panel, bias, c + m * ldc, ldc, K, columns, start);
}

template <typename S>
inline void column_of_tiles(const MatrixView<S>& a, const S* panel, const S* bias, S* c, int64_t ldc, int64_t M,
                            int64_t K, int64_t columns, Start start) {
  if (a.column_stride == 1)
    column_of_tiles<S, true>(a.data, a.row_stride, panel, bias, c, ldc, M, K, columns, start);
  else
    column_of_tiles<S, false>(a.data, a.column_stride, panel, bias, c, ldc, M, K, columns, start);
}

// C [M, N] = start + A [M, K]·B [K, N], B packed. A few hundred rows at a time keep A in the second-level cache.
// `bias` [N] is read with Start::kBias only.
template <typename S>
inline void gemm(const MatrixView<S>& a, const S* packed, const S* bias, S* c, int64_t ldc, int64_t M, int64_t N,
                 int64_t K, Start start) {
  constexpr int64_t kCols = Simd<S>::kCols;
  for (int64_t k = 0; k < K; k += kDepth) {
    const MatrixView<S> slice{a.data + k * a.column_stride, a.row_stride, a.column_stride};
    for (int64_t n = 0; n < N; n += kCols)
      column_of_tiles(slice, packed + n * K + k * kCols, bias ? bias + n : nullptr, c + n, ldc, M, min(kDepth, K - k),
                      min(kCols, N - n), k == 0 ? start : Start::kAccumulate);
  }
}

// `columns` <= kCols columns of C = A·B, with B row-major and not packed.
template <typename S>
inline void gemm_panel(const MatrixView<S>& a, const S* b, int64_t ldb, S* c, int64_t ldc, int64_t M, int64_t columns,
                       int64_t K) {
  alignas(64) S panel[kDepth * Simd<S>::kCols];
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = min(kDepth, K - k);
    pack_panel(b + k * ldb, ldb, depth, columns, panel);
    const MatrixView<S> slice{a.data + k * a.column_stride, a.row_stride, a.column_stride};
    column_of_tiles(slice, panel, static_cast<const S*>(nullptr), c, ldc, M, depth, columns,
                    k == 0 ? Start::kZero : Start::kAccumulate);
  }
}

}  // namespace
}  // namespace pywm::cpu::PYWM_ISA
