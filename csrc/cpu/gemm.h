// Matrix products for small and medium sizes, in GCC's vector extensions, compiled for each instruction set.
//
// What: C [M, N] = start + A·B, with start = 0, a bias [N], or what C holds. A micro-kernel keeps a tile of kRows x
//   kCols of C in registers and walks along K: one row of a packed panel of B, times kRows broadcast elements of A.
// Layout: A is any strided view with one of its strides 1 (so A^T needs no copy); C is row-major; B is packed into
//   panels of kCols columns, each [K, kCols] and padded with zeros, by `pack_panel` (B row-major) or
//   `pack_panel_transposed` (B = W^T, the weights of a linear layer). A panel costs about as much to pack as a product
//   with 8 rows; pack once, use often. `gemm_panel` packs as it goes, for a B that is used once.
// Mapping: panels of kDepth rows of B stay in the first-level cache while all rows of A pass by. Whoever calls splits M
//   over threads: every element of C is one chain of multiply-adds in the order of K, whatever the split.
// Cost: 2·M·N·K flops, at 70 to 92 % of the fused multiply-add rate of two cores with AVX2 (docs/kernels.md).
// Numerics: accumulation in S; FMA where the instruction set has it. Operands may be bfloat16 numbers instead (`Pair`,
//   of two neighbours along K; `gemm_pairs` rounds A, to nearest, ties to even): sums are float all the same, of one
//   instruction a pair where there is AVX512-BF16, which takes subnormals for zeros; elsewhere of two multiply-adds.
// Source: packed panels and a micro-kernel in registers as in Goto and van de Geijn (2008).
//
// Included by kernel sources only; everything has internal linkage (see kernels.h).
#pragma once

#include <cstdint>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "../math/bfloat16.h"

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

// Two bfloat16 numbers, the upper halves of floats; the first in the low half.
using Pair = uint32_t;
constexpr Pair kUpperHalf = 0xffff0000u;

inline int64_t pairs_of(int64_t K) { return (K + 1) / 2; }

inline float rounded(float x) { return __builtin_bit_cast(float, math::bfloat16_bits(x)); }
inline Pair pair_of(float first, float second) {
  return math::bfloat16_bits(first) >> 16 | math::bfloat16_bits(second);
}

// The pairs of a row of K numbers; a missing last one is zero.
inline void round_row(const float* __restrict x, int64_t K, Pair* __restrict pairs) {
  int64_t k = 0;
#if defined(__AVX512BF16__)
  for (; k + 32 <= K; k += 32) {
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k));
    _mm512_storeu_si512(pairs + k / 2, __builtin_bit_cast(__m512i, both));
  }
#endif
  for (; k + 2 <= K; k += 2) pairs[k / 2] = pair_of(x[k], x[k + 1]);
  if (k < K) pairs[k / 2] = pair_of(x[k], 0.0f);
}

// `pack_panel` and `pack_panel_transposed` for panels of pairs, [K / 2, kCols].
inline void pack_panel(const float* __restrict b, int64_t ld, int64_t K, int64_t columns, Pair* __restrict panel) {
  constexpr int64_t kCols = Simd<float>::kCols;
  for (int64_t k = 0; k < K; k += 2) {
    const float *first = b + k * ld, *second = k + 1 < K ? first + ld : nullptr;
    Pair* row = panel + k / 2 * kCols;
    for (int64_t j = 0; j < columns; ++j) row[j] = pair_of(first[j], second ? second[j] : 0.0f);
    for (int64_t j = columns; j < kCols; ++j) row[j] = 0;
  }
}
inline void pack_panel_transposed(const float* __restrict w, int64_t ld, int64_t K, int64_t columns,
                                  Pair* __restrict panel) {
  constexpr int64_t kCols = Simd<float>::kCols, kStep = 128;  // as above
  Pair row[kStep / 2];
  for (int64_t first = 0; first < K; first += kStep) {
    const int64_t depth = min(kStep, K - first), words = pairs_of(depth);
    Pair* to = panel + first / 2 * kCols;
    for (int64_t j = 0; j < kCols; ++j) {
      if (j < columns) round_row(w + j * ld + first, depth, row);
      for (int64_t k = 0; k < words; ++k) to[k * kCols + j] = j < columns ? row[k] : 0;
    }
  }
}

// acc += b·x in every lane; of pairs, both products.
template <typename S>
inline void add_product(typename Simd<S>::Vector& acc, const typename Simd<S>::Vector& b, S x) {
  acc += b * x;
}
inline void add_product(Simd<float>::Vector& acc, const Simd<Pair>::Vector& b, Pair x) {
#if defined(__AVX512BF16__)
  const __m512i all = _mm512_set1_epi32(static_cast<int>(x));
  // Bit casts, not casts of references: a Simd vector is aligned to its elements only, these types to 64 bytes.
  const __m512 sum = _mm512_dpbf16_ps(__builtin_bit_cast(__m512, acc), __builtin_bit_cast(__m512bh, b),
                                      __builtin_bit_cast(__m512bh, all));
  acc = __builtin_bit_cast(Simd<float>::Vector, sum);
#else
  using Vector = Simd<float>::Vector;
  const Simd<Pair>::Vector first = b << 16, second = b & kUpperHalf;
  acc += reinterpret_cast<const Vector&>(first) * __builtin_bit_cast(float, x << 16);
  acc += reinterpret_cast<const Vector&>(second) * __builtin_bit_cast(float, x& kUpperHalf);
#endif
}

// A view of A: element (m, k) is data[m * row_stride + k * column_stride].
template <typename E>
struct MatrixView {
  const E* data;
  int64_t row_stride, column_stride;
};

// R rows and V vectors of columns, of which `columns` exist. Added to `start`, a row of V vectors, or to C where it is
// null. kByRow: the rows of A are contiguous, else its columns. kAhead: fetch the R rows of A behind these meanwhile,
// for an A that comes from memory and is read once. E: of the operands, S or Pair; then K counts pairs. The loops over
// rows must unroll whole, up to 12 of them: sums that are indexed by a variable live in memory, at half the rate.
template <typename S, int R, int V, bool kByRow, bool kAhead, typename E>
inline void tile(const E* __restrict a, int64_t stride, const E* __restrict panel, const S* __restrict start, S* c,
                 int64_t ldc, int64_t K, int64_t columns) {
  constexpr int64_t L = Simd<S>::kLanes, kCols = Simd<S>::kCols, kLine = 64 / sizeof(E);
  using Vector = typename Simd<S>::Vector;
  using Operands = typename Simd<E>::Vector;
  Vector acc[R][V];
  alignas(kVectorBytes) S edge[R][V * L];
  const bool whole = columns == V * L;
  const S* from = whole ? c : edge[0];
  const int64_t step = start ? 0 : whole ? ldc : V * L;
  if (start)
    from = start;
  else if (!whole)
    for (int r = 0; r < R; ++r)
      for (int64_t j = 0; j < V * L; ++j) edge[r][j] = j < columns ? c[r * ldc + j] : S(0);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = *reinterpret_cast<const Vector*>(from + r * step + v * L);
  for (int64_t k = 0; k < K; ++k) {
    if constexpr (kByRow && kAhead)
      if (k % kLine == 0)
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) __builtin_prefetch(a + (R + r) * stride + k);
    Operands b[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) b[v] = *reinterpret_cast<const Operands*>(panel + k * kCols + v * L);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const E x = kByRow ? a[r * stride + k] : a[k * stride + r];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) add_product(acc[r][v], b[v], x);
    }
  }
  S* to = whole ? c : edge[0];
  const int64_t to_step = whole ? ldc : V * L;
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) *reinterpret_cast<Vector*>(to + r * to_step + v * L) = acc[r][v];
  if (whole) return;
  for (int r = 0; r < R; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * ldc + j] = edge[r][j];
}

// Eight sums or more keep the multiply-adds busy. Rows of A may be a power of two apart, so that their lines share one
// set of the first-level cache, which has 8 or 12 ways: more than eight that come from memory (kAhead) would push each
// other out before they are used.
constexpr int tile_rows(int V, bool kAhead) {
  const int rows = V == 1 && kTileRows < 8 ? 8 : kTileRows;
  return kAhead && rows > 8 ? 8 : rows;
}

// All rows of A times one panel.
template <int V, bool kByRow, bool kAhead, typename E, typename S>
inline void column_of_tiles(const E* a, int64_t stride, const E* panel, const S* start, S* c, int64_t ldc, int64_t M,
                            int64_t K, int64_t columns) {
  constexpr int kRows = tile_rows(V, kAhead);
  const int64_t step = kByRow ? stride : 1;
  int64_t m = 0;
  const auto rows = [&]<int R>() {
    for (; m + R <= M; m += R)
      tile<S, R, V, kByRow, kAhead>(a + m * step, stride, panel, start, c + m * ldc, ldc, K, columns);
  };
  if constexpr (kRows == 6) {
    // Eight are two tiles of four: one of two rows would wait for its additions.
    if (M % kRows == 2 && M > kRows)
      for (; m + 8 < M; m += kRows)
        tile<S, kRows, V, kByRow, kAhead>(a + m * step, stride, panel, start, c + m * ldc, ldc, K, columns);
    else
      rows.template operator()<kRows>();
  } else {
    rows.template operator()<kRows>();
  }
  if constexpr (kRows > 8) rows.template operator()<8>();
  if constexpr (kRows > 4) rows.template operator()<4>();
  rows.template operator()<2>();
  rows.template operator()<1>();
}

template <typename E, typename S>
inline void column_of_tiles(const MatrixView<E>& a, const E* panel, const S* start, S* c, int64_t ldc, int64_t M,
                            int64_t K, int64_t columns) {
  const bool wide = columns > Simd<S>::kLanes, by_row = a.column_stride == 1;
  const auto run = by_row ? (wide ? column_of_tiles<2, true, false, E, S> : column_of_tiles<1, true, false, E, S>)
                          : (wide ? column_of_tiles<2, false, false, E, S> : column_of_tiles<1, false, false, E, S>);
  run(a.data, by_row ? a.row_stride : a.column_stride, panel, start, c, ldc, M, K, columns);
}

// What a product is added to: nothing, a row that all rows of C share, or what C holds.
enum class Start { kZero, kBias, kAccumulate };

// C [M, N] = start + A [M, K]·B [K, N], B packed. A few hundred rows at a time keep A in the second-level cache.
// `bias` [N] is read with Start::kBias only.
template <typename S>
inline void gemm(const MatrixView<S>& a, const S* packed, const S* bias, S* c, int64_t ldc, int64_t M, int64_t N,
                 int64_t K, Start start) {
  constexpr int64_t kCols = Simd<S>::kCols;
  alignas(kVectorBytes) S row[kCols];
  for (int64_t k = 0; k < K; k += kDepth) {
    const MatrixView<S> slice{a.data + k * a.column_stride, a.row_stride, a.column_stride};
    for (int64_t n = 0; n < N; n += kCols) {
      const int64_t columns = min(kCols, N - n);
      const bool from_row = k == 0 && start != Start::kAccumulate;
      if (from_row)
        for (int64_t j = 0; j < kCols; ++j) row[j] = start == Start::kBias && j < columns ? bias[n + j] : S(0);
      column_of_tiles(slice, packed + n * K + k * kCols, static_cast<const S*>(from_row ? row : nullptr), c + n, ldc, M,
                      min(kDepth, K - k), columns);
    }
  }
}

// The same of a float A, rounded on its way, and panels of pairs. A's rows are contiguous, `lda` apart.
inline void gemm_pairs(const float* a, int64_t lda, const Pair* packed, const float* bias, float* c, int64_t ldc,
                       int64_t M, int64_t N, int64_t K, Start start) {
  constexpr int64_t kCols = Simd<float>::kCols, kRows = 24;  // a multiple of every tile's rows: 24 KB of pairs
  alignas(kVectorBytes) Pair pairs[kRows * kDepth];
  alignas(kVectorBytes) float row[kCols];
  const int64_t words = pairs_of(K);
  for (int64_t m = 0; m < M; m += kRows) {
    const int64_t rows = min(kRows, M - m);
    for (int64_t k = 0; k < words; k += kDepth) {
      const int64_t depth = min(kDepth, words - k);
      for (int64_t r = 0; r < rows; ++r)
        round_row(a + (m + r) * lda + 2 * k, min(2 * kDepth, K - 2 * k), pairs + r * depth);
      for (int64_t n = 0; n < N; n += kCols) {
        const int64_t columns = min(kCols, N - n);
        const bool from_row = k == 0 && start != Start::kAccumulate;
        if (from_row)
          for (int64_t j = 0; j < kCols; ++j) row[j] = start == Start::kBias && j < columns ? bias[n + j] : 0.0f;
        column_of_tiles(MatrixView<Pair>{pairs, depth, 1}, packed + n * words + k * kCols,
                        static_cast<const float*>(from_row ? row : nullptr), c + m * ldc + n, ldc, rows, depth,
                        columns);
      }
    }
  }
}

// `columns` <= kCols columns of C = A·B, with B row-major and not packed.
template <typename S>
inline void gemm_panel(const MatrixView<S>& a, const S* b, int64_t ldb, S* c, int64_t ldc, int64_t M, int64_t columns,
                       int64_t K) {
  constexpr int64_t kCols = Simd<S>::kCols;
  alignas(64) S panel[kDepth * kCols];
  alignas(kVectorBytes) const S zeros[kCols] = {};
  for (int64_t k = 0; k < K; k += kDepth) {
    const int64_t depth = min(kDepth, K - k);
    pack_panel(b + k * ldb, ldb, depth, columns, panel);
    const MatrixView<S> slice{a.data + k * a.column_stride, a.row_stride, a.column_stride};
    column_of_tiles(slice, static_cast<const S*>(panel), k == 0 ? zeros : nullptr, c, ldc, M, depth, columns);
  }
}

}  // namespace
}  // namespace pywm::cpu::PYWM_ISA
