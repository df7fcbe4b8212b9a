// The posterior filter of a recurrent state-space model over a window, on the CPU. See pywm/ops/rssm.py.
//
// What: T steps of  mask by is_first -> cell -> head on [deter, embed] -> sample  in one call, and its reverse.
// Layout: time-major, rows contiguous. Pre-activations are kept for the backward pass, activations are recomputed.
// Mapping: one parallel region. With many sequences each thread takes its own and waits for nobody. With few, all
//   threads go through the phases of a step together, each with its columns of every product (so that a weight is read
//   by one core only), then its rows of what lies between; a light barrier after each phase.
// Cost: weights are packed once a call; then 2·T·N·(recurrent weights) flops forward and as many backward. Gradients of
//   weights are not computed here: they are one product over all rows, which the caller makes afterwards.
// Numerics: everything in S; sums of norms' gradients run over time in a fixed order for a given number of threads.
// Source: Hafner et al. (2019, 2020, 2021, 2023); the formulas of the cells in rssm_cells.h.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// From so many rows a thread on, rows are divided instead of columns.
constexpr int64_t kRowsEach = 16;

// Where a plane of `width` numbers a row stands at time t; planes that are not kept have one row of time.
template <typename S>
inline S* at(S* plane, int64_t t, int64_t N, int64_t row, int64_t width, bool kept = true) {
  return plane + ((kept ? t * N : 0) + row) * width;
}

struct Widths {
  int64_t u, cell1, cell2;
  explicit Widths(const RssmForm& f) {
    const int64_t D = f.D;
    u = f.cell == RssmCell::kBlockGru ? 2 * f.H : f.H;
    cell1 = f.cell == RssmCell::kBlockGru ? D : (f.cell == RssmCell::kGruBlock ? 2 * D : 3 * D);
    cell2 = f.cell == RssmCell::kLayerNormGru ? 0 : (f.cell == RssmCell::kGruBlock ? D : 3 * D);
  }
};

template <typename S>
struct ObserveScratch {
  StepWeights<S> packed;
  S *h, *z, *x, *y, *head, *probs, *squares, *u, *cell1, *cell2, *o;
  int64_t size;

  ObserveScratch(const RssmForm& f, int64_t N, bool keep, S* base) : ObserveScratch(f, N, keep, Arena<S>{base}) {}

 private:
  ObserveScratch(const RssmForm& f, int64_t N, bool keep, Arena<S> arena) : packed(f, arena, true) {
    const Widths width(f);
    h = arena.take(N * f.D);
    z = arena.take(f.gaussian() ? N * f.groups : 0);
    x = arena.take(N * width.u);
    y = arena.take(N * f.D);
    head = arena.take(N * f.H);
    probs = arena.take(N * f.stoch());
    squares = arena.take(N * kMostSquares);
    u = keep ? nullptr : arena.take(N * width.u);
    cell1 = keep ? nullptr : arena.take(N * width.cell1);
    cell2 = keep ? nullptr : arena.take(N * width.cell2);
    o = keep ? nullptr : arena.take(N * f.H);
    size = arena.used;
  }
};

template <typename S>
int64_t observe_workspace(const RssmForm& form, int64_t N, bool keep) {
  return ObserveScratch<S>(form, N, keep, nullptr).size;
}

// Rows [first, first + rows) through all of time, by one team.
template <typename S>
void observe_rows(const Team& team, const RssmObserveArgs<S>& a, const ObserveScratch<S>& scratch, int64_t first,
                  int64_t rows) {
  const RssmForm& f = a.form;
  const Widths width(f);
  const int64_t N = a.N, D = f.D, H = f.H, U = width.u, Z = f.stoch(), G = f.groups;
  const bool keep = a.u != nullptr, block = f.cell == RssmCell::kBlockGru, gaussian = f.gaussian();
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  S *h = scratch.h + first * D, *head = scratch.head + first * H;
  const int64_t begin = team.begin(rows), end = team.end(rows), P = block ? D : H;
  // deter_in of the step after `deter`, with the products that read it too; masked rows are put right later.
  const auto deter_in = [&](const S* deter, int64_t t) {
    S* u = keep ? at(a.u, t, N, first, U) : scratch.u + first * U;
    product(team, deter, D, scratch.packed.deter_in, a.w.deter_in.bias, u, U, rows, H, D);
  };
  if (block) {
    deter_in(a.deter0 + first * D, 0);
    team.sync();
  }
  for (int64_t t = 0; t < a.T; ++t) {
    S* u = keep ? at(a.u, t, N, first, U) : scratch.u + first * U;
    S* cell1 = keep ? at(a.cell1, t, N, first, width.cell1) : scratch.cell1 + first * width.cell1;
    S* cell2 = keep ? at(a.cell2, t, N, first, width.cell2) : scratch.cell2 + first * width.cell2;
    S* o = keep ? at(a.o, t, N, first, H) : scratch.o + first * H;
    const S* deter_before = t > 0 ? at(a.deter, t - 1, N, first, D) : a.deter0 + first * D;
    const S* action_proj = a.action_class ? a.action_proj : at(a.action_proj, t, N, first, P);
    const uint8_t* action_class = a.action_class ? a.action_class + t * N + first : nullptr;
    // Pre-activations of the half of x that the stoch feeds.
    S* from_stoch = u + (block ? H : 0);
    for (int64_t r = begin; r < end; ++r) {
      const bool reset = a.is_first[t * N + first + r];
      if (reset)
        zero_row(h + r * D, D);
      else
        copy_row(deter_before + r * D, h + r * D, D);
      if (reset && block)
        for (int64_t j = 0; j < H; ++j) u[r * U + j] = a.w.deter_in.bias ? a.w.deter_in.bias[j] : S(0);
      const S* start = block ? a.w.stoch_in.bias : action_proj + r * H;
      S* to = from_stoch + r * U;
      if (reset || t == 0) {
        const S* proj = a.stoch_proj + (first + r) * H;
        for (int64_t j = 0; j < H; ++j) to[j] = (start ? start[j] : S(0)) + (reset ? S(0) : proj[j]);
      } else if (gaussian) {
        copy_row(at(a.stoch, t - 1, N, first + r, G), scratch.z + (first + r) * G, G);
        for (int64_t j = 0; j < H; ++j) to[j] = start ? start[j] : S(0);
      } else {
        gather_row(scratch.packed.stoch_in, a.index + ((t - 1) * N + first + r) * G, G, f.classes, start, H, to);
      }
      if (gaussian && (reset || t == 0)) zero_row(scratch.z + (first + r) * G, G);
    }
    if (gaussian && t > 0) {
      team.sync();
      product(team, scratch.z + first * G, G, scratch.packed.stoch_in, static_cast<const S*>(nullptr), from_stoch, U,
              rows, H, G, true);
      team.sync();
    }
    S* deter = at(a.deter, t, N, first, D);
    cell_forward(team, f, a.w, scratch.packed,
                 StepRows<S>{action_proj, action_class, h, u, cell1, cell2, scratch.x + first * U,
                             scratch.y + first * D, deter, scratch.squares + first * kMostSquares, rows});
    const int64_t count = panels<S>(H), left = team.begin(count) * Simd<S>::kCols,
                  right = min(H, team.end(count) * Simd<S>::kCols);
    for (int64_t r = 0; r < rows && left < right; ++r)
      copy_row(at(a.token_proj, t, N, first + r, H) + left, o + r * H + left, right - left);
    product(team, deter, D, scratch.packed.head, static_cast<const S*>(nullptr), o, H, rows, H, D, true);
    if (block && t + 1 < a.T) deter_in(deter, t + 1);
    team.sync();
    for (int64_t r = begin; r < end; ++r)
      act.forward(o + r * H, a.w.head.scale, a.w.head.shift, H, S(f.eps), head + r * H);
    team.sync();
    S* stats = at(a.stats, t, N, first, f.stats());
    product(team, head, H, scratch.packed.out, a.w.out.bias, stats, f.stats(), rows, f.stats(), H);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = t * N + first + r;
      const S* l = stats + r * f.stats();
      S* stoch = a.stoch + row * Z;
      if (gaussian) {
        for (int64_t g = 0; g < G; ++g)
          stoch[g] = a.force_stoch ? a.force_stoch[row * G + g]
                                   : l[g] + std_of(l[G + g], S(f.min_std), f.sigmoid_std) * a.noise[row * G + g];
        continue;
      }
      uint8_t* index = a.index + row * G;
      if (a.force_index)
        for (int64_t g = 0; g < G; ++g) index[g] = a.force_index[row * G + g];
      else
        sample_row(l, a.noise + row * G, G, f.classes, S(f.unimix), scratch.probs + (first + r) * Z, index);
      one_hot_row(index, G, f.classes, stoch);
    }
  }
}

template <typename S>
void observe(const RssmObserveArgs<S>& a, const Team& team) {
  const ObserveScratch<S> scratch(a.form, a.N, a.u != nullptr, a.scratch);
  scratch.packed.pack(team, a.form, a.w);
  team.sync();
  if (a.N >= kRowsEach * team.size) {
    const Team alone{0, 1, nullptr};
    observe_rows(alone, a, scratch, team.begin(a.N), team.end(a.N) - team.begin(a.N));
  } else {
    observe_rows(team, a, scratch, 0, a.N);
  }
}

// Weights as they stand, for products with gradients.
template <typename S>
struct BackwardWeights {
  S *deter_in, *stoch_in, *hidden_deter, *hidden_x, *gates, *gates_deter, *candidate, *candidate_deter, *head, *out;

  BackwardWeights(const RssmForm& f, Arena<S>& arena) {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    const bool block = f.cell == RssmCell::kBlockGru, norm = f.cell == RssmCell::kLayerNormGru,
               gru = f.cell == RssmCell::kGru, planet = f.cell == RssmCell::kGruBlock;
    deter_in = block ? arena.take(packed_size<S>(H, D)) : nullptr;
    stoch_in = arena.take(packed_size<S>(H, f.stoch()));
    hidden_deter = block ? arena.take(G * packed_size<S>(Dg, Dg)) : nullptr;
    hidden_x = block ? arena.take(packed_size<S>(D, 2 * H)) : nullptr;
    gates = arena.take(block ? G * packed_size<S>(3 * Dg, Dg) : packed_size<S>(planet ? 2 * D : 3 * D, H));
    gates_deter = norm || planet ? arena.take(packed_size<S>(planet ? 2 * D : 3 * D, D)) : nullptr;
    candidate = planet ? arena.take(packed_size<S>(D, H)) : nullptr;
    candidate_deter = gru || planet ? arena.take(packed_size<S>(gru ? 3 * D : D, D)) : nullptr;
    head = arena.take(packed_size<S>(H, D));
    out = arena.take(packed_size<S>(f.stats(), H));
  }

  void pack(const Team& team, const RssmForm& f, const RssmWeights<S>& w) const {
    const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G;
    pack_transposed_weight(team, w.stoch_in.weight, w.stoch_in.ld, H, f.stoch(), stoch_in);
    pack_transposed_weight(team, w.head.weight, w.head.ld, H, D, head);
    pack_transposed_weight(team, w.out.weight, w.out.ld, f.stats(), H, out);
    switch (f.cell) {
      case RssmCell::kBlockGru:
        pack_transposed_weight(team, w.deter_in.weight, w.deter_in.ld, H, D, deter_in);
        for (int64_t g = 0; g < G; ++g) {
          pack_transposed_weight(team, w.hidden.weight + g * Dg * w.hidden.ld, w.hidden.ld, Dg, Dg,
                                 hidden_deter + g * packed_size<S>(Dg, Dg));
          pack_transposed_weight(team, w.gates.weight + 3 * g * Dg * w.gates.ld, w.gates.ld, 3 * Dg, Dg,
                                 gates + g * packed_size<S>(3 * Dg, Dg));
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

// Gradients of scales and shifts: how many there are, in the order of RssmObserveBackwardArgs.
inline int64_t norm_gradients(const RssmForm& f) {
  const int64_t each = f.norm == Norm::kNone ? 0 : (f.norm == Norm::kLayer ? 2 : 1);
  const int64_t cell = f.cell == RssmCell::kBlockGru ? each * (f.H + f.D)  // deter_in and hidden
                                                     : (f.cell == RssmCell::kLayerNormGru ? 6 * f.D : 0);
  return cell + 2 * each * f.H;
}

template <typename S>
struct NormGradients {
  S *deter_in, *deter_in_shift, *stoch_in, *stoch_in_shift, *cell, *cell_shift, *head, *head_shift;

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
    head = take(H);
    head_shift = take(shifts ? H : 0);
  }
};

template <typename S>
struct BackwardScratch {
  BackwardWeights<S> packed;
  S *carry, *grad_h, *grad_stoch, *grad_head, *grad_y, *grad_x, *probs, *h, *norms;
  int64_t size;

  BackwardScratch(const RssmForm& f, int64_t N, int64_t members, S* base)
      : BackwardScratch(f, N, members, Arena<S>{base}) {}

 private:
  BackwardScratch(const RssmForm& f, int64_t N, int64_t members, Arena<S> arena) : packed(f, arena) {
    const int64_t X = Widths(f).u;
    carry = arena.take(N * f.D);
    grad_h = arena.take(N * f.D);
    grad_stoch = arena.take(N * f.stoch());
    grad_head = arena.take(N * f.H);
    grad_y = arena.take(N * f.D);
    grad_x = arena.take(N * X);
    probs = arena.take(N * f.stoch());
    h = arena.take(N * f.D);
    norms = arena.take(members * norm_gradients(f));
    size = arena.used;
  }
};

template <typename S>
int64_t observe_backward_workspace(const RssmForm& form, int64_t N, int64_t members) {
  return BackwardScratch<S>(form, N, members, nullptr).size;
}

// Through the cell: grad [rows, D] of the new deter; carry becomes the gradient of the old one (without what comes
// through deter_in), grad_x that of x. Ends synchronised.
template <typename S>
void cell_backward(const Team& team, const RssmObserveBackwardArgs<S>& a, const BackwardScratch<S>& scratch,
                   const NormGradients<S>& norms, int64_t t, int64_t first, int64_t rows) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const RssmForm& f = a.form;
  const Widths width(f);
  const BackwardWeights<S>& packed = scratch.packed;
  const int64_t N = a.N, D = f.D, H = f.H, G = f.blocks, Dg = D / G, X = width.u;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S* none = nullptr;
  const int64_t begin = team.begin(rows), end = team.end(rows);
  const S *cell1 = at(a.cell1, t, N, first, width.cell1), *cell2 = at(a.cell2, t, N, first, width.cell2);
  S *grad1 = at(a.grad_cell1, t, N, first, width.cell1), *grad2 = at(a.grad_cell2, t, N, first, width.cell2);
  const S *h = scratch.h + first * D, *grad = scratch.grad_h + first * D;
  S *carry = scratch.carry + first * D, *grad_x = scratch.grad_x + first * X, *grad_y = scratch.grad_y + first * D;
  S* y = at(a.y, t, N, first, D);
  if (f.cell == RssmCell::kBlockGru) {
    // Each row's gates; blocks are contiguous.
    for (int64_t r = begin; r < end; ++r)
      for (int64_t g = 0; g < G; ++g) {
        const S *pre = cell2 + r * 3 * D + 3 * g * Dg, *gd = grad + r * D + g * Dg, *hb = h + r * D + g * Dg;
        S *out = grad2 + r * 3 * D + 3 * g * Dg, *cb = carry + r * D + g * Dg;
#pragma GCC ivdep
        for (int64_t j = 0; j < Dg; ++j) {
          const auto back = math::gru_grad(gd[j], math::GruGates<S>{pre[j], pre[Dg + j], pre[2 * Dg + j]}, hb[j]);
          out[j] = back.gates.reset;
          out[Dg + j] = back.gates.candidate;
          out[2 * Dg + j] = back.gates.update;
          cb[j] = back.deter;
        }
      }
    team.sync();
    const int64_t count = panels<S>(Dg), all = G * count;
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, column = i % count * kCols;
      multiply(grad2 + 3 * g * Dg, 3 * D, packed.gates + g * packed_size<S>(3 * Dg, Dg) + column * 3 * Dg, none,
               grad_y + g * Dg + column, D, rows, min(kCols, Dg - column), 3 * Dg, false);
    }
    team.sync();
    for (int64_t r = begin; r < end; ++r)
      act.backward(cell1 + r * D, a.w.hidden.scale, a.w.hidden.shift, D, S(f.eps), grad_y + r * D, y + r * D,
                   grad1 + r * D, norms.cell, norms.cell_shift);
    team.sync();
    for (int64_t i = team.begin(all); i < team.end(all); ++i) {
      const int64_t g = i / count, column = i % count * kCols;
      multiply(grad1 + g * Dg, D, packed.hidden_deter + g * packed_size<S>(Dg, Dg) + column * Dg, none,
               carry + g * Dg + column, D, rows, min(kCols, Dg - column), Dg, true);
    }
    product(team, grad1, D, packed.hidden_x, none, grad_x, X, rows, X, D);
    team.sync();
    return;
  }
  if (f.cell == RssmCell::kLayerNormGru) {
    for (int64_t r = begin; r < end; ++r) {
      const S *p = cell1 + r * 3 * D, *hr = h + r * D, *g = grad + r * D;
      const S *scale = a.w.gates.scale, *shift = a.w.gates.shift;
      S *out = grad1 + r * 3 * D, *c = carry + r * D;
      const Moments<S> m = moments<Norm::kLayer>(p, 3 * D, S(f.cell_eps));
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto q = [&](int64_t i) { return (p[i] - m.mean) * m.inverse * scale[i] + shift[i]; };
        const auto back = math::gru_grad(g[j], math::GruGates<S>{q(j), q(D + j), q(2 * D + j)}, hr[j]);
        out[j] = back.gates.reset;
        out[D + j] = back.gates.candidate;
        out[2 * D + j] = back.gates.update;
        c[j] = back.deter;
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < 3 * D; ++i) {
        const S hat = (p[i] - m.mean) * m.inverse;
        norms.cell[i] += out[i] * hat;
        norms.cell_shift[i] += out[i];
        out[i] *= scale[i];
      }
      const S along = sum_over<S>(3 * D, [&](int64_t i) { return out[i] * (p[i] - m.mean); }) * m.inverse / S(3 * D);
      const S mean = sum_over<S>(3 * D, [&](int64_t i) { return out[i]; }) / S(3 * D);
#pragma GCC ivdep
      for (int64_t i = 0; i < 3 * D; ++i) out[i] = m.inverse * (out[i] - mean - (p[i] - m.mean) * m.inverse * along);
    }
    team.sync();
    product(team, grad1, 3 * D, packed.gates, none, grad_x, X, rows, H, 3 * D);
    product(team, grad1, 3 * D, packed.gates_deter, none, carry, D, rows, D, 3 * D, true);
  } else if (f.cell == RssmCell::kGru) {
    for (int64_t r = begin; r < end; ++r) {
      const S *gx = cell1 + r * 3 * D, *gh = cell2 + r * 3 * D, *hr = h + r * D, *g = grad + r * D;
      S *ox = grad1 + r * 3 * D, *oh = grad2 + r * 3 * D, *c = carry + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_after_grad(g[j], math::ResetAfterGates<S>{gx[j], gx[D + j], gx[2 * D + j]},
                                                 math::ResetAfterGates<S>{gh[j], gh[D + j], gh[2 * D + j]}, hr[j]);
        ox[j] = oh[j] = back.input.reset;
        ox[D + j] = oh[D + j] = back.input.keep;
        ox[2 * D + j] = back.input.candidate;
        oh[2 * D + j] = back.hidden_candidate;
        c[j] = back.deter;
      }
    }
    team.sync();
    product(team, grad1, 3 * D, packed.gates, none, grad_x, X, rows, H, 3 * D);
    product(team, grad2, 3 * D, packed.candidate_deter, none, carry, D, rows, D, 3 * D, true);
  } else {
    for (int64_t r = begin; r < end; ++r) {
      const S *ru = cell1 + r * 2 * D, *c = cell2 + r * D, *hr = h + r * D, *g = grad + r * D;
      S *out_gates = grad1 + r * 2 * D, *out_candidate = grad2 + r * D, *cr = carry + r * D, *yr = y + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_before_update_grad(g[j], ru[D + j], c[j], hr[j]);
        out_candidate[j] = back.candidate;
        out_gates[D + j] = back.update;
        cr[j] = back.deter;
        yr[j] = math::reset_before_reset(ru[j], hr[j]);
      }
    }
    team.sync();
    product(team, grad2, D, packed.candidate_deter, none, grad_y, D, rows, D, D);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      const S *ru = cell1 + r * 2 * D, *hr = h + r * D, *gy = grad_y + r * D;
      S *out_gates = grad1 + r * 2 * D, *cr = carry + r * D;
#pragma GCC ivdep
      for (int64_t j = 0; j < D; ++j) {
        const auto back = math::reset_before_reset_grad(gy[j], ru[j], hr[j]);
        out_gates[j] = back.reset;
        cr[j] += back.deter;
      }
    }
    team.sync();
    product(team, grad2, D, packed.candidate, none, grad_x, X, rows, H, D);
    product(team, grad1, 2 * D, packed.gates, none, grad_x, X, rows, H, 2 * D, true);
    product(team, grad1, 2 * D, packed.gates_deter, none, carry, D, rows, D, 2 * D, true);
  }
  team.sync();
}

template <typename S>
void observe_rows_backward(const Team& team, const RssmObserveBackwardArgs<S>& a, const BackwardScratch<S>& scratch,
                           const NormGradients<S>& norms, int64_t first, int64_t rows) {
  const RssmForm& f = a.form;
  const int64_t N = a.N, D = f.D, H = f.H, X = Widths(f).u, Z = f.stoch(), Q = f.stats(), G = f.groups;
  const bool block = f.cell == RssmCell::kBlockGru, gaussian = f.gaussian();
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const BackwardWeights<S>& packed = scratch.packed;
  const S* none = nullptr;
  const int64_t begin = team.begin(rows), end = team.end(rows);
  S *carry = scratch.carry + first * D, *grad_h = scratch.grad_h + first * D, *h = scratch.h + first * D;
  S *grad_stoch = scratch.grad_stoch + first * Z, *grad_head = scratch.grad_head + first * H;
  S* grad_x = scratch.grad_x + first * X;
  for (int64_t r = begin; r < end; ++r) {
    zero_row(carry + r * D, D);
    zero_row(grad_stoch + r * Z, Z);
  }
  for (int64_t t = a.T - 1; t >= 0; --t) {
    S* grad_stats = at(a.grad_stats_total, t, N, first, Q);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t row = t * N + first + r;
      const S* l = a.stats + row * Q;
      S *out = grad_stats + r * Q, *z = grad_stoch + r * Z;
      if (a.grad_stats)
        copy_row(a.grad_stats + row * Q, out, Q);
      else
        zero_row(out, Q);
      if (a.grad_stoch)
        for (int64_t j = 0; j < Z; ++j) z[j] += a.grad_stoch[row * Z + j];
      if (gaussian)
        for (int64_t g = 0; g < G; ++g) {
          out[g] += z[g];
          out[G + g] += z[g] * a.noise[row * G + g] * std_slope(l[G + g], f.sigmoid_std);
        }
      else
        straight_through_row(l, z, G, f.classes, S(f.unimix), scratch.probs + (first + r) * Z, out);
      // The old deter as the cell saw it, and what reaches the new one directly.
      const S* before = t > 0 ? at(a.deter, t - 1, N, first + r, D) : a.deter0 + (first + r) * D;
      if (a.is_first[row])
        zero_row(h + r * D, D);
      else
        copy_row(before, h + r * D, D);
      for (int64_t j = 0; j < D; ++j)
        grad_h[r * D + j] = carry[r * D + j] + (a.grad_deter ? a.grad_deter[row * D + j] : S(0));
    }
    team.sync();
    product(team, grad_stats, Q, packed.out, none, grad_head, H, rows, H, Q);
    team.sync();
    S* grad_o = at(a.grad_o, t, N, first, H);
    for (int64_t r = begin; r < end; ++r)
      act.backward(at(a.o, t, N, first + r, H), a.w.head.scale, a.w.head.shift, H, S(f.eps), grad_head + r * H,
                   at(a.head, t, N, first + r, H), grad_o + r * H, norms.head, norms.head_shift);
    team.sync();
    product(team, grad_o, H, packed.head, none, grad_h, D, rows, D, H, true);
    team.sync();
    cell_backward(team, a, scratch, norms, t, first, rows);
    S* grad_u = at(a.grad_u, t, N, first, X);
    for (int64_t r = begin; r < end; ++r) {
      const S* u = at(a.u, t, N, first + r, X);
      S *x = at(a.x, t, N, first + r, X), *out = grad_u + r * X;
      const S* gx = grad_x + r * X;
      if (block)
        act.backward(u, a.w.deter_in.scale, a.w.deter_in.shift, H, S(f.eps), gx, x, out, norms.deter_in,
                     norms.deter_in_shift);
      const int64_t half = block ? H : 0;
      act.backward(u + half, a.w.stoch_in.scale, a.w.stoch_in.shift, H, S(f.eps), gx + half, x + half, out + half,
                   norms.stoch_in, norms.stoch_in_shift);
    }
    team.sync();
    if (block) product(team, grad_u, X, packed.deter_in, none, carry, D, rows, D, H, true);
    product(team, grad_u + (block ? H : 0), X, packed.stoch_in, none, grad_stoch, Z, rows, Z, H);
    team.sync();
    for (int64_t r = begin; r < end; ++r) {
      if (!a.is_first[t * N + first + r]) continue;
      zero_row(carry + r * D, D);
      zero_row(grad_stoch + r * Z, Z);
    }
  }
  for (int64_t r = begin; r < end; ++r) {
    const int64_t row = first + r;
    copy_row(carry + r * D, a.grad_deter0 + row * D, D);
    const S* from = a.grad_u + row * X + (block ? H : 0);
    for (int64_t j = 0; j < H; ++j) a.grad_stoch_proj[row * H + j] = a.is_first[row] ? S(0) : from[j];
  }
}

template <typename S>
void observe_backward(const RssmObserveBackwardArgs<S>& a, const Team& team) {
  const BackwardScratch<S> scratch(a.form, a.N, a.members, a.scratch);
  const int64_t sums = norm_gradients(a.form);
  zero_row(scratch.norms + team.rank * sums, sums);
  scratch.packed.pack(team, a.form, a.w);
  team.sync();
  const NormGradients<S> norms(a.form, scratch.norms + team.rank * sums);
  if (a.N >= kRowsEach * team.size) {
    const Team alone{0, 1, nullptr};
    observe_rows_backward(alone, a, scratch, norms, team.begin(a.N), team.end(a.N) - team.begin(a.N));
  } else {
    observe_rows_backward(team, a, scratch, norms, 0, a.N);
  }
  team.sync();
  for (int64_t i = team.begin(sums); i < team.end(sums); ++i) {
    S sum = S(0);
    for (int64_t m = 0; m < team.size; ++m) sum += scratch.norms[m * sums + i];
    a.norms[i] = sum;
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.rssm_observe_workspace = observe_workspace<S>;
  table.rssm_observe = observe<S>;
  table.rssm_observe_backward_workspace = observe_backward_workspace<S>;
  table.rssm_observe_backward = observe_backward<S>;
}

}  // namespace

void fill_rssm_observe(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
