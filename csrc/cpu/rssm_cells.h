// The recurrent cells as phases that a team of threads goes through together: products by panels of columns, then rows.
// Included by kernel sources only; everything has internal linkage (see kernels.h).
#pragma once

#include <cstdint>

#include "parallel.h"
#include "rssm_rows.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out consecutive pieces of one block of scratch; without a block it only counts.
template <typename S>
struct Arena {
  S* base;
  int64_t used = 0;
  S* take(int64_t n) {
    S* piece = base ? base + used : nullptr;
    used += (n + 15) / 16 * 16;
    return piece;
  }
};

template <typename S>
inline int64_t packed_size(int64_t K, int64_t N) {
  return panels<S>(N) * Simd<S>::kCols * K;
}

// This member's share of packing W^T for a layer W [N, K].
template <typename S>
inline void pack_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N, S* packed) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  for (int64_t p = team.begin(count); p < team.end(count); ++p)
    pack_panel_transposed(w + p * kCols * ld, ld, K, min(kCols, N - p * kCols), packed + p * kCols * K);
}
// The same of W itself, [K, N], for products with the gradients of what the layer gives.
template <typename S>
inline void pack_transposed_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N, S* packed) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  for (int64_t p = team.begin(count); p < team.end(count); ++p)
    pack_panel(w + p * kCols, ld, K, min(kCols, N - p * kCols), packed + p * kCols * K);
}

// This member's columns of c [rows, N] = start + a·packed; bias null: zero.
template <typename S>
inline void product(const Team& team, const S* a, int64_t lda, const S* packed, const S* bias, S* c, int64_t ldc,
                    int64_t rows, int64_t N, int64_t K, bool accumulate = false) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  const int64_t first = team.begin(count) * kCols, last = min(N, team.end(count) * kCols);
  if (first >= last) return;
  gemm(MatrixView<S>{a, lda, 1}, packed + first * K, bias ? bias + first : nullptr, c + first, ldc, rows, last - first,
       K, accumulate ? Start::kAccumulate : (bias ? Start::kBias : Start::kZero));
}

template <typename S>
inline void copy_row(const S* __restrict from, S* __restrict to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}
template <typename S>
inline void zero_row(S* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = S(0);
}

// out [n] := start (null: zero) + the columns of a stoch layer that `index` names, from its packed panels.
template <typename S>
inline void gather_row(const S* packed, const uint8_t* index, int64_t groups, int64_t classes, const S* start,
                       int64_t n, S* __restrict out) {
  constexpr int64_t kCols = Simd<S>::kCols, L = Simd<S>::kLanes;
  using Vector = typename Simd<S>::Vector;
  const int64_t K = groups * classes;
  for (int64_t first = 0; first < n; first += kCols) {
    const S* panel = packed + first * K;
    Vector a{}, b{};
    for (int64_t g = 0; g < groups; ++g) {
      const S* row = panel + (g * classes + index[g]) * kCols;
      a += *reinterpret_cast<const Vector*>(row);
      b += *reinterpret_cast<const Vector*>(row + L);
    }
    alignas(kVectorBytes) S sum[kCols];
    *reinterpret_cast<Vector*>(sum) = a;
    *reinterpret_cast<Vector*>(sum + L) = b;
    const int64_t columns = min(kCols, n - first);
    for (int64_t j = 0; j < columns; ++j) out[first + j] = (start ? start[first + j] : S(0)) + sum[j];
  }
}

// Packed weights of a step.
template <typename S>
struct StepWeights {
  S *deter_in, *stoch_in, *hidden_deter, *hidden_x, *gates, *gates_deter, *candidate, *candidate_deter, *head, *out;

  // Sizes of the parts: x is what the cell sees beside deter.
  static int64_t x_width(const RssmForm& f) { return f.cell == RssmCell::kBlockGru ? 2 * f.H : f.H; }

  StepWeights(const RssmForm& f, Arena<S>& arena) {
    const int64_t D = f.D, H = f.H, Dg = D / f.blocks, G = f.blocks;
    const bool block = f.cell == RssmCell::kBlockGru, norm = f.cell == RssmCell::kLayerNormGru,
               gru = f.cell == RssmCell::kGru, planet = f.cell == RssmCell::kGruBlock;
    deter_in = block ? arena.take(packed_size<S>(D, H)) : nullptr;
    stoch_in = arena.take(packed_size<S>(f.stoch(), H));
    hidden_deter = block ? arena.take(G * packed_size<S>(Dg, Dg)) : nullptr;
    hidden_x = block ? arena.take(G * packed_size<S>(2 * H, Dg)) : nullptr;
    gates = arena.take(block ? 3 * G * packed_size<S>(Dg, Dg) : packed_size<S>(H, planet ? 2 * D : 3 * D));
    gates_deter = norm || planet ? arena.take(packed_size<S>(D, planet ? 2 * D : 3 * D)) : nullptr;
    candidate = planet ? arena.take(packed_size<S>(H, D)) : nullptr;
    candidate_deter = gru || planet ? arena.take(packed_size<S>(D, gru ? 3 * D : D)) : nullptr;
    head = arena.take(packed_size<S>(D, H));
    out = arena.take(packed_size<S>(H, f.stats()));
  }

  void pack(const Team& team, const RssmForm& f, const RssmWeights<S>& w) const {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    pack_weight(team, w.stoch_in.weight, w.stoch_in.ld, f.stoch(), H, stoch_in);
    pack_weight(team, w.head.weight, w.head.ld, D, H, head);
    pack_weight(team, w.out.weight, w.out.ld, H, f.stats(), out);
    switch (f.cell) {
      case RssmCell::kBlockGru:
        pack_weight(team, w.deter_in.weight, w.deter_in.ld, D, H, deter_in);
        for (int64_t g = 0; g < G; ++g) {
          const S* hidden = w.hidden.weight + g * Dg * w.hidden.ld;
          pack_weight(team, hidden, w.hidden.ld, Dg, Dg, hidden_deter + g * packed_size<S>(Dg, Dg));
          pack_weight(team, hidden + Dg, w.hidden.ld, 2 * H, Dg, hidden_x + g * packed_size<S>(2 * H, Dg));
          for (int64_t part = 0; part < 3; ++part)
            pack_weight(team, w.gates.weight + (3 * g + part) * Dg * w.gates.ld, w.gates.ld, Dg, Dg,
                        gates + (3 * g + part) * packed_size<S>(Dg, Dg));
        }
        break;
      case RssmCell::kLayerNormGru:
        pack_weight(team, w.gates.weight, w.gates.ld, H, 3 * D, gates);
        pack_weight(team, w.gates.weight + H, w.gates.ld, D, 3 * D, gates_deter);
        break;
      case RssmCell::kGru:
        pack_weight(team, w.gates.weight, w.gates.ld, H, 3 * D, gates);
        pack_weight(team, w.candidate.weight, w.candidate.ld, D, 3 * D, candidate_deter);
        break;
      case RssmCell::kGruBlock:
        pack_weight(team, w.gates.weight, w.gates.ld, H, 2 * D, gates);
        pack_weight(team, w.gates.weight + H, w.gates.ld, D, 2 * D, gates_deter);
        pack_weight(team, w.candidate.weight, w.candidate.ld, H, D, candidate);
        pack_weight(team, w.candidate.weight + H, w.candidate.ld, D, D, candidate_deter);
        break;
    }
  }
};

// One step of `rows` rows. All row-major and contiguous; pre-activations as in RssmObserveArgs.
template <typename S>
struct StepRows {
  const S* action_proj;
  const S* h;  // masked deter [rows, D]
  S *u, *cell1, *cell2, *x, *y, *deter;
  int64_t rows;
};

template <typename S>
inline void block_gru_gates(const S* __restrict g, const S* __restrict h, int64_t Dg, int64_t first, int64_t n,
                            S* __restrict deter) {
#pragma GCC ivdep
  for (int64_t j = first; j < first + n; ++j) {
    const S reset = math::sigmoid(g[j]), update = math::sigmoid(g[2 * Dg + j] - S(1));
    const S candidate = math::tanh(reset * g[Dg + j]);
    deter[j] = update * candidate + (S(1) - update) * h[j];
  }
}

// x has its pre-activations u when it begins, but for block_gru's first half. Ends with `deter`, synchronised.
template <typename S>
inline void cell_forward(const Team& team, const RssmForm& f, const RssmWeights<S>& w, const StepWeights<S>& packed,
                         const StepRows<S>& s) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G, X = StepWeights<S>::x_width(f), rows = s.rows;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S eps = S(f.eps);
  const int64_t begin = team.begin(rows), end = team.end(rows);
  if (f.cell == RssmCell::kBlockGru) {
    product(team, s.h, D, packed.deter_in, w.deter_in.bias, s.u, X, rows, H, D);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      act.forward(s.u + r * X, w.deter_in.scale, w.deter_in.shift, H, eps, s.x + r * X);
      act.forward(s.u + r * X + H, w.stoch_in.scale, w.stoch_in.shift, H, eps, s.x + r * X + H);
    }
    team.sync();
    const int64_t count = panels<S>(Dg), all = G * count;
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, p = i % count, column = g * Dg + p * kCols, n = min(kCols, Dg - p * kCols);
      S* v = s.cell1 + column;
      for (int64_t r = 0; r < rows; ++r) copy_row(s.action_proj + r * D + column, v + r * D, n);
      gemm(MatrixView<S>{s.h + g * Dg, D, 1}, packed.hidden_deter + g * packed_size<S>(Dg, Dg) + p * kCols * Dg,
           static_cast<const S*>(nullptr), v, D, rows, n, Dg, Start::kAccumulate);
      gemm(MatrixView<S>{s.x, X, 1}, packed.hidden_x + g * packed_size<S>(X, Dg) + p * kCols * X,
           static_cast<const S*>(nullptr), v, D, rows, n, X, Start::kAccumulate);
    }
    team.sync();
    for (int64_t r = begin; r < end; ++r)
      act.forward(s.cell1 + r * D, w.hidden.scale, w.hidden.shift, D, eps, s.y + r * D);
    team.sync();
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, first = i % count * kCols, n = min(kCols, Dg - first);
      for (int64_t part = 0; part < 3; ++part) {
        const int64_t column = (3 * g + part) * Dg + first;
        gemm(MatrixView<S>{s.y + g * Dg, D, 1}, packed.gates + (3 * g + part) * packed_size<S>(Dg, Dg) + first * Dg,
             w.gates.bias + column, s.cell2 + column, 3 * D, rows, n, Dg, Start::kBias);
      }
      for (int64_t r = 0; r < rows; ++r)
        block_gru_gates(s.cell2 + r * 3 * D + 3 * g * Dg, s.h + r * D + g * Dg, Dg, first, n, s.deter + r * D + g * Dg);
    }
    team.sync();
    return;
  }
  for (int64_t r = begin; r < end; ++r)
    act.forward(s.u + r * X, w.stoch_in.scale, w.stoch_in.shift, H, eps, s.x + r * X);
  team.sync();
  if (f.cell == RssmCell::kLayerNormGru) {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 3 * D, rows, 3 * D, H);
    product(team, s.h, D, packed.gates_deter, static_cast<const S*>(nullptr), s.cell1, 3 * D, rows, 3 * D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const S *p = s.cell1 + r * 3 * D, *h = s.h + r * D, *scale = w.gates.scale, *shift = w.gates.shift;
      S* deter = s.deter + r * D;
      const Moments<S> m = moments<Norm::kLayer>(p, 3 * D, S(f.cell_eps));
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto q = [&](int64_t i) { return (p[i] - m.mean) * m.inverse * scale[i] + shift[i]; };
        const S reset = math::sigmoid(q(j)), update = math::sigmoid(q(2 * D + j) - S(1));
        deter[j] = update * math::tanh(reset * q(D + j)) + (S(1) - update) * h[j];
      }
    }
  } else if (f.cell == RssmCell::kGru) {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 3 * D, rows, 3 * D, H);
    product(team, s.h, D, packed.candidate_deter, w.candidate.bias, s.cell2, 3 * D, rows, 3 * D, D);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const S *gx = s.cell1 + r * 3 * D, *gh = s.cell2 + r * 3 * D, *h = s.h + r * D;
      S* deter = s.deter + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const S reset = math::sigmoid(gx[j] + gh[j]), keep = math::sigmoid(gx[D + j] + gh[D + j]);
        const S candidate = math::tanh(gx[2 * D + j] + reset * gh[2 * D + j]);
        deter[j] = keep * h[j] + (S(1) - keep) * candidate;
      }
    }
  } else {
    product(team, s.x, X, packed.gates, w.gates.bias, s.cell1, 2 * D, rows, 2 * D, H);
    product(team, s.h, D, packed.gates_deter, static_cast<const S*>(nullptr), s.cell1, 2 * D, rows, 2 * D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r)
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) s.y[r * D + j] = math::sigmoid(s.cell1[r * 2 * D + j]) * s.h[r * D + j];
    team.sync();
    product(team, s.x, X, packed.candidate, w.candidate.bias, s.cell2, D, rows, D, H);
    product(team, s.y, D, packed.candidate_deter, static_cast<const S*>(nullptr), s.cell2, D, rows, D, D, true);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      S* deter = s.deter + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const S keep = math::sigmoid(s.cell1[r * 2 * D + D + j]);
        deter[j] = keep * s.h[r * D + j] + (S(1) - keep) * math::tanh(s.cell2[r * D + j]);
      }
    }
  }
  team.sync();
}

}  // namespace
}  // namespace pywm::cpu::PYWM_ISA
