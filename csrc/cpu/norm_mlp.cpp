// Perceptrons with norms on the CPU: all layers in one call, forward and backward. See pywm/ops/norm_mlp.py.
//
// What: layers z = W·h + b, h = SiLU(scale·z / rms(z)); the last one may end with z. The first takes numbers, and
// behind
//   them one-hot vectors that come as indices. Backward, the gradients of the numbers and of all parameters.
// Layout: rows are independent. `hidden` keeps the pre-activations of the layers with a norm, [M, width] one after
//   another; the activations are computed again on the way back.
// Mapping: a team of threads packs the weights; then each takes kRows rows at a time through all layers, so that what
//   lies between stays in the cache. One-hot inputs are gathered. Backward likewise, in blocks of rows that M alone
//   cuts; then come the gradients of the weights, grad_W = grad_z^T·input, panels of columns over all rows, which
//   threads take as they are free. No sum is split over threads, so their number does not show.
// Cost: 2·M·parameters flops forward, the one-hot columns a quarter or less of that; twice that backward. Of memory:
// the
//   input once, z written; backward z, the gradients of z and h written, and read once a panel of the weights.
// Numerics: gemm.h, math/norm.h; sums over rows in S, of the norms' scales in blocks of rows.
// Source: Hafner et al. (2025), the heads of DreamerV3; the chain rule.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kRows = 48;
constexpr int64_t kFewRows = 4;   // fewer are not worth packing the weights
constexpr int64_t kGroups = 4;    // one-hot groups whose gradients are summed in one pass over the rows
constexpr int64_t kColumns = 64;  // outputs of such a pass, and of a sum over rows

inline int64_t widest(const NormMlpForm& f) {
  int64_t width = 0;
  for (int64_t l = 1; l <= f.L; ++l) width = f.sizes[l] > width ? f.sizes[l] : width;
  return width;
}

// The widths of the layers with a norm, added up.
inline int64_t normed(const NormMlpForm& f, int64_t layers) {
  int64_t width = 0;
  for (int64_t l = 0; l < layers; ++l) width += f.sizes[l + 1];
  return width;
}

template <typename S>
inline Packed<S> take_panels(Arena<S>& arena, int64_t K, int64_t N) {
  return {arena.take(panels<S>(N) * Simd<S>::kCols * K), false};
}

template <typename S>
inline NormAct<S> norm_of() {
  return norm_act<S>(Norm::kRms, Activation::kSilu);
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

template <typename S>
struct Scratch {
  Packed<S> dense[kMostNormMlpLayers], one_hot{nullptr, false};
  int64_t* next;  // see Units
  S *z, *h[2];    // of this member
  int64_t shared, each;

  Scratch(const NormMlpForm& f, S* base, int64_t member) {
    Arena<S> arena{base};
    next = reinterpret_cast<int64_t*>(arena.take(16));
    if (f.groups > 0) one_hot = take_panels(arena, f.groups * f.classes, f.sizes[1]);
    for (int64_t l = 0; l < f.L; ++l) dense[l] = take_panels(arena, l ? f.sizes[l] : f.inputs(), f.sizes[l + 1]);
    shared = arena.used;
    for (int64_t m = 0; m <= member; ++m) {
      const int64_t rows = kRows * widest(f);
      z = arena.take(rows);
      h[0] = arena.take(rows);
      h[1] = arena.take(rows);
      if (m == 0) each = arena.used - shared;
    }
  }
};

template <typename S>
int64_t workspace(const NormMlpForm& f, int64_t members) {
  const Scratch<S> s(f, nullptr, 0);
  return s.shared + members * s.each;
}

template <typename S>
void forward_rows(const NormMlpArgs<S>& a, const Scratch<S>& s, int64_t first, int64_t rows) {
  const Team alone{0, 1, nullptr};
  const NormMlpForm& f = a.form;
  const NormAct<S> act = norm_of<S>();
  const S *in = a.x + first * f.inputs(), *none = nullptr;
  S* plane = a.hidden;
  for (int64_t l = 0; l < f.L; ++l) {
    const int64_t K = l ? f.sizes[l] : f.inputs(), N = f.sizes[l + 1];
    const bool norm = l < f.norms;
    S* z = norm ? (plane ? plane + first * N : s.z) : a.y + first * N;
    const bool gathers = l == 0 && f.groups > 0;
    if (gathers) gather_rows(s.one_hot, a.index + first * f.groups, rows, f.groups, f.classes, a.biases[0], 0, N, z, N);
    product(alone, in, K, s.dense[l], gathers ? none : a.biases[l], z, N, rows, N, K, gathers);
    if (!norm) return;
    S* h = l == f.L - 1 ? a.y + first * N : s.h[l % 2];
    for (int64_t r = 0; r < rows; ++r) act.forward(z + r * N, a.scales[l], none, N, a.eps, h + r * N);
    if (plane) plane += f.M * N;
    in = h;
  }
}

// One row, from the weights as they are.
template <typename S>
void forward_row(const NormMlpArgs<S>& a, const Scratch<S>& s, int64_t m) {
  const NormMlpForm& f = a.form;
  const NormAct<S> act = norm_of<S>();
  const S* in = a.x + m * f.inputs();
  S* plane = a.hidden;
  for (int64_t l = 0; l < f.L; ++l) {
    const int64_t K = l ? f.sizes[l] : f.inputs(), N = f.sizes[l + 1], ld = f.sizes[l];
    const bool norm = l < f.norms;
    S* z = norm ? (plane ? plane + m * N : s.z) : a.y + m * N;
    for (int64_t j = 0; j < N; ++j) {
      const S* w = a.weights[l] + j * ld;
      z[j] = a.biases[l][j] + sum_over<S>(K, [&](int64_t k) { return w[k] * in[k]; });
      if (l == 0)
        for (int64_t g = 0; g < f.groups; ++g) z[j] += w[K + g * f.classes + a.index[m * f.groups + g]];
    }
    if (!norm) return;
    S* h = l == f.L - 1 ? a.y + m * N : s.h[l % 2];
    act.forward(z, a.scales[l], static_cast<const S*>(nullptr), N, a.eps, h);
    if (plane) plane += f.M * N;
    in = h;
  }
}

// Calls unit(i) for this member's share of n more units, each of which goes to who is free. They are numbered on from
// those of earlier calls, and one that was taken waits for the call that it belongs to. `next`: see Team::take.
struct Units {
  int64_t* next;
  int64_t taken, first = 0;

  template <typename Unit>
  void share(int64_t n, const Unit& unit) {
    for (; taken < first + n; taken = Team::take(next)) unit(taken - first);
    first += n;
  }
};

template <typename S>
void forward(const NormMlpArgs<S>& a, const Team& team) {
  const NormMlpForm& f = a.form;
  const Scratch<S> s(f, a.scratch, team.rank);
  if (f.M <= kFewRows) {
    for (int64_t m = team.begin(f.M); m < team.end(f.M); ++m) forward_row(a, s, m);
    return;
  }
  if (team.rank == 0) *s.next = team.size;
  if (f.groups > 0)
    pack_weight(team, a.weights[0] + f.inputs(), f.sizes[0], f.groups * f.classes, f.sizes[1], s.one_hot);
  for (int64_t l = 0; l < f.L; ++l)
    pack_weight(team, a.weights[l], f.sizes[l], l ? f.sizes[l] : f.inputs(), f.sizes[l + 1], s.dense[l]);
  team.sync();
  Units{s.next, team.rank}.share((f.M + kRows - 1) / kRows,
                                 [&](int64_t b) { forward_rows(a, s, b * kRows, min(kRows, f.M - b * kRows)); });
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

// Blocks of rows whose contributions to the norms' scales are summed apart, whatever the number of threads.
constexpr int64_t kMostBlocks = 64;
inline int64_t block_rows(int64_t M) {
  const int64_t rows = (M + kMostBlocks - 1) / kMostBlocks;
  return rows > 8 ? rows : 8;
}
inline int64_t blocks_of(int64_t M) { return (M + block_rows(M) - 1) / block_rows(M); }

template <typename S>
struct BackwardScratch {
  Packed<S> back[kMostNormMlpLayers];
  S *grad_z[kMostNormMlpLayers], *h[kMostNormMlpLayers];  // [M, width] of the layers with a norm
  S* scales;                                              // [blocks, all their widths]
  int64_t* next;                                          // see Units
  S *grad[2], *sums;                                      // of this member
  int64_t shared, each;

  BackwardScratch(const NormMlpForm& f, S* base, int64_t member) {
    Arena<S> arena{base};
    next = reinterpret_cast<int64_t*>(arena.take(16));
    for (int64_t l = 0; l < f.L; ++l) back[l] = take_panels(arena, f.sizes[l + 1], l ? f.sizes[l] : f.inputs());
    for (int64_t l = 0; l < f.norms; ++l) {
      grad_z[l] = arena.take(f.M * f.sizes[l + 1]);
      h[l] = arena.take(f.M * f.sizes[l + 1]);
    }
    scales = arena.take(blocks_of(f.M) * normed(f, f.norms));
    shared = arena.used;
    for (int64_t m = 0; m <= member; ++m) {
      const int64_t rows = kRows * widest(f);
      grad[0] = arena.take(rows);
      grad[1] = arena.take(rows);
      sums = arena.take(kGroups * f.classes * kColumns);
      if (m == 0) each = arena.used - shared;
    }
  }
};

template <typename S>
int64_t backward_workspace(const NormMlpForm& f, int64_t members) {
  const BackwardScratch<S> s(f, nullptr, 0);
  return s.shared + members * s.each;
}

template <typename S>
void backward_rows(const NormMlpBackwardArgs<S>& a, const BackwardScratch<S>& s, S* scales, int64_t first,
                   int64_t rows) {
  const Team alone{0, 1, nullptr};
  const NormMlpForm& f = a.form;
  const NormAct<S> act = norm_of<S>();
  const S *grad = a.grad_y + first * f.sizes[f.L], *none = nullptr;
  for (int64_t l = f.L - 1; l >= 0; --l) {
    const int64_t N = f.sizes[l + 1];
    if (l < f.norms) {
      const S* z = a.hidden + f.M * normed(f, l) + first * N;
      S *grad_z = s.grad_z[l] + first * N, *h = s.h[l] + first * N, *scale = scales + normed(f, l);
      for (int64_t r = 0; r < rows; ++r)
        act.backward(z + r * N, a.scales[l], none, N, a.eps, grad + r * N, h + r * N, grad_z + r * N, scale, nullptr);
      grad = grad_z;
    }
    if (l > 0) {
      product(alone, grad, N, s.back[l], none, s.grad[l % 2], f.sizes[l], rows, f.sizes[l], N);
      grad = s.grad[l % 2];
    } else if (a.grad_x) {
      product(alone, grad, N, s.back[0], none, a.grad_x + first * f.inputs(), f.inputs(), rows, f.inputs(), N);
    }
  }
}

// grad_w [N, groups·classes] of the one-hot inputs, `ld` apart: of `count` groups from `group` on.
template <typename S>
void one_hot_gradient(const NormMlpForm& f, const uint8_t* index, const S* grad, int64_t group, int64_t count, S* sums,
                      S* grad_w, int64_t ld) {
  const int64_t N = f.sizes[1], K = f.classes, G = f.groups;
  for (int64_t first = 0; first < N; first += kColumns) {
    const int64_t width = min(kColumns, N - first);
    zero_row(sums, count * K * kColumns);
    for (int64_t m = 0; m < f.M; ++m) {
      const S* from = grad + m * N + first;
      for (int64_t g = 0; g < count; ++g) {
        S* sum = sums + (g * K + index[m * G + group + g]) * kColumns;
        if (width == kColumns) {
#pragma GCC ivdep
          for (int64_t j = 0; j < kColumns; ++j) sum[j] += from[j];
        } else {
#pragma GCC ivdep
          for (int64_t j = 0; j < width; ++j) sum[j] += from[j];
        }
      }
    }
    for (int64_t j = 0; j < width; ++j)
      for (int64_t c = 0; c < count * K; ++c) grad_w[(first + j) * ld + group * K + c] = sums[c * kColumns + j];
  }
}

// out [columns] := the sums of so many columns of x [rows, ld].
template <typename S>
void sum_columns(const S* x, int64_t rows, int64_t ld, int64_t columns, S* out) {
  S sums[kColumns] = {};
  if (columns == kColumns)
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < kColumns; ++j) sums[j] += x[m * ld + j];
  else
    for (int64_t m = 0; m < rows; ++m)
      for (int64_t j = 0; j < columns; ++j) sums[j] += x[m * ld + j];
  for (int64_t j = 0; j < columns; ++j) out[j] = sums[j];
}

// Columns of a weight's gradient that are computed together, from one look at the gradients of what it gave.
template <typename S>
constexpr int64_t kTallColumns = 4 * Simd<S>::kCols;

// `columns` <= kTallColumns columns of C [O, columns] = A^T·B, for A [M, O] and B [M, ldb] of many rows. It takes
// pieces of both that stay in the first-level cache: A's rows are far apart, and a tile needs a few numbers of each.
template <typename S>
void tall_product(const S* a, int64_t O, const S* b, int64_t ldb, S* c, int64_t ldc, int64_t columns, int64_t M) {
  constexpr int64_t kCols = Simd<S>::kCols, kPieceRows = 48, kPieceColumns = 96;
  alignas(64) S packed[kPieceRows * kTallColumns<S>];
  alignas(kVectorBytes) const S zeros[kCols] = {};
  for (int64_t m = 0; m < M; m += kPieceRows) {
    const int64_t rows = min(kPieceRows, M - m);
    for (int64_t n = 0; n < columns; n += kCols)
      pack_panel(b + m * ldb + n, ldb, rows, min(kCols, columns - n), packed + n * rows);
    for (int64_t first = 0; first < O; first += kPieceColumns)
      for (int64_t n = 0; n < columns; n += kCols)
        column_of_tiles(MatrixView<S>{a + m * O + first, 1, O}, static_cast<const S*>(packed + n * rows),
                        m == 0 ? zeros : nullptr, c + first * ldc + n, ldc, min(kPieceColumns, O - first), rows,
                        min(kCols, columns - n));
  }
}

template <typename S>
void parameter_gradients(const NormMlpBackwardArgs<S>& a, const BackwardScratch<S>& s, Units& units) {
  constexpr int64_t kStep = kTallColumns<S>;
  const NormMlpForm& f = a.form;
  for (int64_t l = f.L - 1; l >= 0; --l) {
    const int64_t I = l ? f.sizes[l] : f.inputs(), ld = f.sizes[l], O = f.sizes[l + 1];
    const S *grad = l < f.norms ? s.grad_z[l] : a.grad_y, *in = l ? s.h[l - 1] : a.x;
    units.share((I + kStep - 1) / kStep, [&](int64_t i) {
      const int64_t j = i * kStep;
      tall_product(grad, O, in + j, I, a.grad_weights[l] + j, ld, min(kStep, I - j), f.M);
    });
    if (l == 0)
      units.share((f.groups + kGroups - 1) / kGroups, [&](int64_t i) {
        const int64_t group = i * kGroups;
        one_hot_gradient(f, a.index, grad, group, min(kGroups, f.groups - group), s.sums, a.grad_weights[0] + I, ld);
      });
    units.share((O + kColumns - 1) / kColumns, [&](int64_t i) {
      const int64_t j = i * kColumns;
      sum_columns(grad + j, f.M, O, min(kColumns, O - j), a.grad_biases[l] + j);
    });
    if (l < f.norms) {
      const int64_t all = normed(f, f.norms), before = normed(f, l);
      units.share((O + kColumns - 1) / kColumns, [&](int64_t i) {
        const int64_t j = i * kColumns;
        sum_columns(s.scales + before + j, blocks_of(f.M), all, min(kColumns, O - j), a.grad_scales[l] + j);
      });
    }
  }
}

template <typename S>
void backward(const NormMlpBackwardArgs<S>& a, const Team& team) {
  const NormMlpForm& f = a.form;
  const BackwardScratch<S> s(f, a.scratch, team.rank);
  if (team.rank == 0) *s.next = team.size;
  for (int64_t l = a.grad_x ? 0 : 1; l < f.L; ++l)
    pack_transposed_weight(team, a.weights[l], f.sizes[l], f.sizes[l + 1], l ? f.sizes[l] : f.inputs(), s.back[l]);
  team.sync();
  const int64_t blocks = blocks_of(f.M), size = block_rows(f.M), widths = normed(f, f.norms);
  Units units{s.next, team.rank};
  units.share(blocks, [&](int64_t b) {
    S* scales = s.scales + b * widths;
    zero_row(scales, widths);
    const int64_t end = min(f.M, (b + 1) * size);
    for (int64_t first = b * size; first < end; first += kRows)
      backward_rows(a, s, scales, first, min(kRows, end - first));
  });
  if (!a.grad_weights) return;
  team.sync();
  parameter_gradients(a, s, units);
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.norm_mlp_workspace = workspace<S>;
  table.norm_mlp = forward<S>;
  table.norm_mlp_backward_workspace = backward_workspace<S>;
  table.norm_mlp_backward = backward<S>;
}

}  // namespace

void fill_norm_mlp(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
