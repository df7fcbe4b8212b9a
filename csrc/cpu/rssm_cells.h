// The recurrent cells as phases that a team of threads goes through together: products by panels of columns, then rows.
//
// What: packed weights and their products, the gathered columns of one-hot inputs, and what a step takes and leaves.
// Layout: a weight [K, N] in panels of kCols columns, of numbers or of pairs of bfloat16 numbers (gemm.h); rows
//   contiguous.
// Mapping: members of a team pack and multiply their own panels; who gathers has rows of its own, and a panel stays
//   near the core while they pass.
// Cost: packing reads and writes a weight once; gathering takes one addition a group and output; the cells:
//   rssm_cells.cpp.
// Numerics: sums over K as in gemm.h; gathered columns are added in the order of their groups, in S.
// Source: the cells': rssm_cells.cpp.
//
// Included by kernel sources only. Everything lies in the namespace of an instruction set, so nothing is shared between
// them (see kernels.h); what takes long to compile is compiled once for each, in rssm_cells.cpp.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "parallel.h"
#include "rssm_rows.h"

namespace pywm::cpu::PYWM_ISA {

// A weight in packed panels: of numbers, or of pairs of bfloat16 numbers (float only; see gemm.h).
template <typename S>
struct Packed {
  S* data;
  bool pairs;

  Pair* words() const { return reinterpret_cast<Pair*>(data); }
  int64_t depth(int64_t K) const { return pairs ? pairs_of(K) : K; }
  // The panels from a column on, which begins one, and those of one of several weights [K, N] behind each other.
  Packed from(int64_t column, int64_t K) const { return {data + column * depth(K), pairs}; }
  Packed block(int64_t i, int64_t K, int64_t N) const { return from(i * panels<S>(N) * Simd<S>::kCols, K); }
};

// c [rows, N] = start + a·packed, where start is bias, zero without one, or what c holds.
template <typename S>
void multiply(const S* a, int64_t lda, Packed<S> packed, const S* bias, S* c, int64_t ldc, int64_t rows, int64_t N,
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

// Room for `count` packed weights [K, N].
template <typename S>
inline Packed<S> take_packed(Arena<S>& arena, const RssmForm& f, int64_t K, int64_t N, int64_t count = 1) {
  const Packed<S> none{nullptr, f.bfloat16 && sizeof(S) == sizeof(Pair)};
  return {arena.take(count * panels<S>(N) * Simd<S>::kCols * none.depth(K)), none.pairs};
}

// pack(columns [first, first + n), panel) for this member's panels of a weight [K, N].
template <typename S, typename Pack>
inline void pack_panels(const Team& team, int64_t K, int64_t N, const Packed<S>& packed, const Pack& pack) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  for (int64_t p = team.begin(count); p < team.end(count); ++p) {
    const Packed<S> panel = packed.from(p * kCols, K);
    if constexpr (sizeof(S) == sizeof(Pair)) {
      if (packed.pairs) {
        pack(p * kCols, min(kCols, N - p * kCols), panel.words());
        continue;
      }
    }
    pack(p * kCols, min(kCols, N - p * kCols), panel.data);
  }
}
// This member's share of packing W^T for a layer W [N, K].
template <typename S>
[[gnu::noinline]] void pack_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N, Packed<S> packed) {
  pack_panels(team, K, N, packed,
              [&](int64_t first, int64_t n, auto* panel) { pack_panel_transposed(w + first * ld, ld, K, n, panel); });
}
// The same of W itself, [K, N], for products with the gradients of what the layer gives.
template <typename S>
[[gnu::noinline]] void pack_transposed_weight(const Team& team, const S* w, int64_t ld, int64_t K, int64_t N,
                                              Packed<S> packed) {
  pack_panels(team, K, N, packed,
              [&](int64_t first, int64_t n, auto* panel) { pack_panel(w + first, ld, K, n, panel); });
}

// This member's columns of c [rows, N] = start + a·packed; bias null: zero.
template <typename S>
[[gnu::noinline]] void product(const Team& team, const S* a, int64_t lda, Packed<S> packed, const S* bias, S* c,
                               int64_t ldc, int64_t rows, int64_t N, int64_t K, bool accumulate = false) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t count = panels<S>(N);
  const int64_t first = team.begin(count) * kCols, last = min(N, team.end(count) * kCols);
  if (first >= last) return;
  multiply(a, lda, packed.from(first, K), bias ? bias + first : nullptr, c + first, ldc, rows, last - first, K,
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

// sums [R][2] += the rows of a panel that `index` [R, groups] names.
template <int R, typename S>
inline void gather_panel(Packed<S> panel, const uint8_t* index, int64_t groups, int64_t classes,
                         typename Simd<S>::Vector (&sums)[R][2]) {
  constexpr int64_t kCols = Simd<S>::kCols, L = Simd<S>::kLanes;
  using Vector = typename Simd<S>::Vector;
  for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const int64_t k = g * classes + index[r * groups + g];
      if constexpr (sizeof(S) == sizeof(Pair)) {
        if (panel.pairs) {
          using Words = Simd<Pair>::Vector;
          const Pair* row = panel.words() + k / 2 * kCols;
          const Pair up = k % 2 ? 0 : 16;  // which half of the words the row is
          const Words left = *reinterpret_cast<const Words*>(row) << up & kUpperHalf,
                      right = *reinterpret_cast<const Words*>(row + L) << up & kUpperHalf;
          sums[r][0] += reinterpret_cast<const Vector&>(left);
          sums[r][1] += reinterpret_cast<const Vector&>(right);
          continue;
        }
      }
      const S* row = panel.data + k * kCols;
      sums[r][0] += *reinterpret_cast<const Vector*>(row);
      sums[r][1] += *reinterpret_cast<const Vector*>(row + L);
    }
  }
}

// out [rows, n] := start + the columns of a stoch layer that `index` [rows, groups] names, from its packed panels, each
// of which stays near the core while all rows pass. Rows are read in no order, so no core guesses the next: the next
// panel is fetched meanwhile, a share with each two rows (2.5 times faster), and two rows are summed at a time, as one
// waits for its additions. A few rows leave most of a panel unread, and fetch nothing. `start`: null for zero, else
// `start_ld` apart (0: one for all rows).
template <typename S>
[[gnu::noinline]] void gather_rows(Packed<S> packed, const uint8_t* index, int64_t rows, int64_t groups,
                                   int64_t classes, const S* start, int64_t start_ld, int64_t n, S* __restrict out,
                                   int64_t ldo) {
  constexpr int64_t kCols = Simd<S>::kCols, L = Simd<S>::kLanes, kLine = 64;
  using Vector = typename Simd<S>::Vector;
  if (rows <= 0) return;
  const int64_t K = groups * classes, bytes = packed.depth(K) * kCols * int64_t(sizeof(S));
  const int64_t share = 2 * ((bytes / kLine + rows - 1) / rows) * kLine;
  for (int64_t first = 0; first < n; first += kCols) {
    const Packed<S> panel = packed.from(first, K);
    const int64_t columns = min(kCols, n - first);
    const char* next =
        classes <= 8 * rows && first + kCols < n ? reinterpret_cast<const char*>(panel.data) + bytes : nullptr;
    const char* const end = next + bytes;
    const auto store = [&](int64_t r, const Vector(&sum)[2]) {
      S* to = out + r * ldo + first;
      const S* from = start ? start + r * start_ld + first : nullptr;
      if (columns == kCols && from) {
        *reinterpret_cast<Vector*>(to) = sum[0] + *reinterpret_cast<const Vector*>(from);
        *reinterpret_cast<Vector*>(to + L) = sum[1] + *reinterpret_cast<const Vector*>(from + L);
        return;
      }
      alignas(kVectorBytes) S all[kCols];
      *reinterpret_cast<Vector*>(all) = sum[0];
      *reinterpret_cast<Vector*>(all + L) = sum[1];
      for (int64_t j = 0; j < columns; ++j) to[j] = (from ? from[j] : S(0)) + all[j];
    };
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
      if (next)
        for (const char* const stop = next + share; next < end && next < stop; next += kLine)
          __builtin_prefetch(next, 0, 2);
      Vector sums[2][2] = {};
      gather_panel<2>(panel, index + r * groups, groups, classes, sums);
      store(r, sums[0]);
      store(r + 1, sums[1]);
    }
    if (r < rows) {
      Vector sums[1][2] = {};
      gather_panel<1>(panel, index + r * groups, groups, classes, sums);
      store(r, sums[0]);
    }
  }
}

// out [rows, n] := start + what a stoch layer makes of its input: the columns that `index` names, or, where it is null,
// `proj` [rows, n], or, where that is null too, nothing yet. `start` as above.
template <typename S>
inline void stoch_rows(Packed<S> packed, const uint8_t* index, int64_t groups, int64_t classes, const S* proj,
                       const S* start, int64_t start_ld, int64_t rows, int64_t n, S* out, int64_t ldo) {
  if (index) return gather_rows(packed, index, rows, groups, classes, start, start_ld, n, out, ldo);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; ++j)
      out[r * ldo + j] = (start ? start[r * start_ld + j] : S(0)) + (proj ? proj[r * n + j] : S(0));
}

// Packed weights of a step.
template <typename S>
struct StepWeights {
  Packed<S> deter_in, stoch_in, hidden_deter, hidden_x, gates, gates_deter, candidate, candidate_deter, head, out;

  // Sizes of the parts: x is what the cell sees beside deter.
  static int64_t x_width(const RssmForm& f) { return f.cell == RssmCell::kBlockGru ? 2 * f.H : f.H; }

  // `head`: of the posterior; imagination has another.
  StepWeights(const RssmForm& f, Arena<S>& arena, bool with_head) {
    const int64_t D = f.D, H = f.H, Dg = D / f.blocks, G = f.blocks;
    const Packed<S> none{nullptr, false};
    const auto take = [&](int64_t K, int64_t N, int64_t count = 1) { return take_packed(arena, f, K, N, count); };
    const bool block = f.cell == RssmCell::kBlockGru, norm = f.cell == RssmCell::kLayerNormGru,
               gru = f.cell == RssmCell::kGru, planet = f.cell == RssmCell::kGruBlock;
    deter_in = block ? take(D, H) : none;
    stoch_in = take(f.stoch(), H);
    hidden_deter = block ? take(Dg, Dg, G) : none;
    hidden_x = block ? take(2 * H, Dg, G) : none;
    gates = block ? take(Dg, Dg, 3 * G) : take(H, planet ? 2 * D : 3 * D);
    gates_deter = norm || planet ? take(D, planet ? 2 * D : 3 * D) : none;
    candidate = planet ? take(H, D) : none;
    candidate_deter = gru || planet ? take(D, gru ? 3 * D : D) : none;
    head = with_head ? take(D, H) : none;
    out = with_head ? take(H, f.stats()) : none;
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
          pack_weight(team, hidden, w.hidden.ld, Dg, Dg, hidden_deter.block(g, Dg, Dg));
          pack_weight(team, hidden + Dg, w.hidden.ld, 2 * H, Dg, hidden_x.block(g, 2 * H, Dg));
          for (int64_t part = 0; part < 3; ++part)
            pack_weight(team, w.gates.weight + (3 * g + part) * Dg * w.gates.ld, w.gates.ld, Dg, Dg,
                        gates.block(3 * g + part, Dg, Dg));
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

// Of the pre-activations of x and of the cell; see RssmObserveArgs.
struct Widths {
  int64_t u, cell1, cell2;
  explicit Widths(const RssmForm& f) {
    const int64_t D = f.D;
    u = f.cell == RssmCell::kBlockGru ? 2 * f.H : f.H;
    cell1 = f.cell == RssmCell::kBlockGru ? D : (f.cell == RssmCell::kGruBlock ? 2 * D : 3 * D);
    cell2 = f.cell == RssmCell::kLayerNormGru ? 0 : (f.cell == RssmCell::kGruBlock ? D : 3 * D);
  }
};

// Weights as they stand, for products with gradients.
template <typename S>
struct BackwardWeights {
  Packed<S> deter_in, stoch_in, hidden_deter, hidden_x, gates, gates_deter, candidate, candidate_deter, head, out;

  // `head`: of the posterior; imagination has another.
  BackwardWeights(const RssmForm& f, Arena<S>& arena, bool with_head) {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    const Packed<S> none{nullptr, false};
    const auto take = [&](int64_t K, int64_t N, int64_t count = 1) { return take_packed(arena, f, K, N, count); };
    const bool block = f.cell == RssmCell::kBlockGru, norm = f.cell == RssmCell::kLayerNormGru,
               gru = f.cell == RssmCell::kGru, planet = f.cell == RssmCell::kGruBlock;
    deter_in = block ? take(H, D) : none;
    stoch_in = take(H, f.stoch());
    hidden_deter = block ? take(Dg, Dg, G) : none;
    hidden_x = block ? take(D, 2 * H) : none;
    gates = block ? take(3 * Dg, Dg, G) : take(planet ? 2 * D : 3 * D, H);
    gates_deter = norm || planet ? take(planet ? 2 * D : 3 * D, D) : none;
    candidate = planet ? take(D, H) : none;
    candidate_deter = gru || planet ? take(gru ? 3 * D : D, D) : none;
    head = with_head ? take(H, D) : none;
    out = with_head ? take(f.stats(), H) : none;
  }

  void pack(const Team& team, const RssmForm& f, const RssmWeights<S>& w) const {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    pack_transposed_weight(team, w.stoch_in.weight, w.stoch_in.ld, H, f.stoch(), stoch_in);
    if (w.head.weight) {
      pack_transposed_weight(team, w.head.weight, w.head.ld, H, D, head);
      pack_transposed_weight(team, w.out.weight, w.out.ld, f.stats(), H, out);
    }
    switch (f.cell) {
      case RssmCell::kBlockGru:
        pack_transposed_weight(team, w.deter_in.weight, w.deter_in.ld, H, D, deter_in);
        for (int64_t g = 0; g < G; ++g) {
          pack_transposed_weight(team, w.hidden.weight + g * Dg * w.hidden.ld, w.hidden.ld, Dg, Dg,
                                 hidden_deter.block(g, Dg, Dg));
          pack_transposed_weight(team, w.gates.weight + 3 * g * Dg * w.gates.ld, w.gates.ld, 3 * Dg, Dg,
                                 gates.block(g, 3 * Dg, Dg));
        }
        pack_transposed_weight(team, w.hidden.weight + Dg, w.hidden.ld, D, 2 * H, hidden_x);
        break;
      case RssmCell::kLayerNormGru:
        pack_transposed_weight(team, w.gates.weight, w.gates.ld, 3 * D, H, gates);
        pack_transposed_weight(team, w.gates.weight + H, w.gates.ld, 3 * D, D, gates_deter);
        break;
      case RssmCell::kGru:
        pack_transposed_weight(team, w.gates.weight, w.gates.ld, 3 * D, H, gates);
        pack_transposed_weight(team, w.candidate.weight, w.candidate.ld, 3 * D, D, candidate_deter);
        break;
      case RssmCell::kGruBlock:
        pack_transposed_weight(team, w.gates.weight, w.gates.ld, 2 * D, H, gates);
        pack_transposed_weight(team, w.gates.weight + H, w.gates.ld, 2 * D, D, gates_deter);
        pack_transposed_weight(team, w.candidate.weight, w.candidate.ld, D, H, candidate);
        pack_transposed_weight(team, w.candidate.weight + H, w.candidate.ld, D, D, candidate_deter);
        break;
    }
  }
};

// Gradients of scales and shifts: how many there are with so many hidden layers in the head, in the order of
// RssmObserveBackwardArgs.
inline int64_t norm_gradients(const RssmForm& f, int64_t heads) {
  const int64_t each = f.norm == Norm::kNone ? 0 : (f.norm == Norm::kLayer ? 2 : 1);
  const int64_t cell = f.cell == RssmCell::kBlockGru ? each * (f.H + f.D)  // deter_in and hidden
                                                     : (f.cell == RssmCell::kLayerNormGru ? 6 * f.D : 0);
  return cell + (1 + heads) * each * f.H;
}

template <typename S>
struct NormGradients {
  S *deter_in, *deter_in_shift, *stoch_in, *stoch_in_shift, *cell, *cell_shift, *head;
  int64_t head_shift, each_head;  // from a scale to its shift, and from one hidden layer of the head to the next

  NormGradients(const RssmForm& f, S* base) {
    const bool shifts = f.norm == Norm::kLayer, block = f.cell == RssmCell::kBlockGru;
    const auto take = [&](int64_t n) {
      S* piece = base;
      base += n;
      return piece;
    };
    const int64_t H = f.norm == Norm::kNone ? 0 : f.H;
    const int64_t C = block ? (f.norm == Norm::kNone ? 0 : f.D) : (f.cell == RssmCell::kLayerNormGru ? 3 * f.D : 0);
    deter_in = take(block ? H : 0);
    deter_in_shift = take(block && shifts ? H : 0);
    stoch_in = take(H);
    stoch_in_shift = take(shifts ? H : 0);
    cell = take(C);
    cell_shift = take(!block || shifts ? C : 0);
    head = base;
    head_shift = H;
    each_head = shifts ? 2 * H : H;
  }
};

// The same step backwards. `grad` is the gradient of the new deter; written are those of the pre-activations, of x, and
// of h without what comes through deter_in; and y, what the last products took.
template <typename S>
struct StepRowsBackward {
  const S *h, *grad, *cell1, *cell2;
  S *grad_cell1, *grad_cell2, *grad_x, *grad_h, *y;
  S* grad_y;  // scratch [rows, D]
  int64_t rows;
};

// Begins with `grad` of all rows synchronised, and ends synchronised.
template <typename S>
void cell_backward(const Team& team, const RssmForm& form, const RssmWeights<S>& w, const BackwardWeights<S>& packed,
                   const StepRowsBackward<S>& rows, const NormGradients<S>& norms);

}  // namespace pywm::cpu::PYWM_ISA
