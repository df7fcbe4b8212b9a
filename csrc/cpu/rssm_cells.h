// The recurrent cells as phases that a team of threads goes through together: products by panels of columns, then rows.
// Included by kernel sources only. Everything lies in the namespace of an instruction set, so nothing is shared between
// them (see kernels.h); what takes long to compile is compiled once for each, in rssm_cells.cpp.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "parallel.h"
#include "rssm_rows.h"

namespace pywm::cpu::PYWM_ISA {

// c [rows, N] = start + a·packed, where start is bias, zero without one, or what c holds.
template <typename S>
void multiply(const S* a, int64_t lda, const S* packed, const S* bias, S* c, int64_t ldc, int64_t rows, int64_t N,
              int64_t K, bool accumulate);

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
[[gnu::noinline]] void pack_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N, S* packed) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  for (int64_t p = team.begin(count); p < team.end(count); ++p)
    pack_panel_transposed(w + p * kCols * ld, ld, K, min(kCols, N - p * kCols), packed + p * kCols * K);
}
// The same of W itself, [K, N], for products with the gradients of what the layer gives.
template <typename S>
[[gnu::noinline]] void pack_transposed_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N,
                                              S* packed) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  for (int64_t p = team.begin(count); p < team.end(count); ++p)
    pack_panel(w + p * kCols, ld, K, min(kCols, N - p * kCols), packed + p * kCols * K);
}

// This member's columns of c [rows, N] = start + a·packed; bias null: zero.
template <typename S>
[[gnu::noinline]] void product(const Team& team, const S* a, int64_t lda, const S* packed, const S* bias, S* c,
                               int64_t ldc, int64_t rows, int64_t N, int64_t K, bool accumulate = false) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  const int64_t first = team.begin(count) * kCols, last = min(N, team.end(count) * kCols);
  if (first >= last) return;
  multiply(a, lda, packed + first * K, bias ? bias + first : nullptr, c + first, ldc, rows, last - first, K,
           accumulate);
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
[[gnu::noinline]] void gather_row(const S* packed, const uint8_t* index, int64_t groups, int64_t classes,
                                  const S* start, int64_t n, S* __restrict out) {
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

  // `head`: of the posterior; imagination has another.
  StepWeights(const RssmForm& f, Arena<S>& arena, bool with_head) {
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
    head = with_head ? arena.take(packed_size<S>(D, H)) : nullptr;
    out = with_head ? arena.take(packed_size<S>(H, f.stats())) : nullptr;
  }

  void pack(const Team& team, const RssmForm& f, const RssmWeights<S>& w) const {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    pack_weight(team, w.stoch_in.weight, w.stoch_in.ld, f.stoch(), H, stoch_in);
    if (w.head.weight) {
      pack_weight(team, w.head.weight, w.head.ld, D, H, head);
      pack_weight(team, w.out.weight, w.out.ld, H, f.stats(), out);
    }
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
  const uint8_t* action_class;  // [rows]: which row of action_proj is whose; null: each has its own
  const S* h;                   // masked deter [rows, D]
  S *u, *cell1, *cell2, *x, *y, *deter;
  S* squares;  // scratch [rows, kMostSquares], or null
  int64_t rows;
};
constexpr int64_t kMostSquares = 16;  // members of a team that exchange sums

// One step of a team. It begins with the pre-activations u of this member's rows; before anybody reads h, there is a
// barrier. Ends with `deter`, synchronised.
template <typename S>
void cell_forward(const Team& team, const RssmForm& form, const RssmWeights<S>& w, const StepWeights<S>& packed,
                  const StepRows<S>& rows);

}  // namespace pywm::cpu::PYWM_ISA
