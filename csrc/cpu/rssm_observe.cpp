// The posterior filter of a recurrent state-space model over a window, on the CPU. See pywm/ops/rssm.py.
//
// What: T steps of  mask by is_first -> cell -> head on [deter, embed] -> sample  in one call, and its reverse.
// Layout: time-major, rows contiguous. Pre-activations are kept for the backward pass, activations are recomputed.
// Mapping: one parallel region. With many sequences each thread takes its own and waits for nobody. With few, all
//   threads go through the phases of a step together, each with its columns of every product (so that a weight is read
//   by one core only), then its rows of what lies between; a light barrier after each phase.
// Cost: weights are packed once a call; then 2·T·N·(recurrent weights) flops forward and as many backward. Gradients of
//   weights are not computed here: they are one product over all rows, which the caller makes afterwards.
// Numerics: everything in S, but for the operands of products where the form says bfloat16 (see gemm.h); sums of norms'
//   gradients run over time in a fixed order for a given number of threads.
// Source: Hafner et al. (2019, 2020, 2021, 2023); the formulas of the cells in ../math/gru.h.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// Members that have so many rows each take them through time alone, without a barrier. With fewer than kManyRows it
// pays only while every core may read all the weights from the cache that they share.
constexpr int64_t kRowsEach = 8, kManyRows = 16, kSharedBytes = 6 << 20;

template <typename S>
bool each_alone(int64_t N, int64_t members, int64_t weights) {
  return N >= kManyRows * members || (N >= kRowsEach * members && weights * int64_t(sizeof(S)) <= kSharedBytes);
}

// Where a plane of `width` numbers a row stands at time t; planes that are not kept have one row of time.
template <typename S>
inline S* at(S* plane, int64_t t, int64_t N, int64_t row, int64_t width, bool kept = true) {
  return plane + ((kept ? t * N : 0) + row) * width;
}

template <typename S>
struct ObserveScratch {
  StepWeights<S> packed;
  int64_t weights;  // packed numbers
  S *h, *z, *x, *y, *head, *probs, *squares, *u, *cell1, *cell2, *o;
  int64_t size;

  ObserveScratch(const RssmForm& f, int64_t N, bool keep, S* base) : ObserveScratch(f, N, keep, Arena<S>{base}) {}

 private:
  ObserveScratch(const RssmForm& f, int64_t N, bool keep, Arena<S> arena)
      : packed(f, arena, true), weights(arena.used) {
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
    const S* starts = block ? a.w.stoch_in.bias : action_proj;
    const int64_t starts_ld = block ? 0 : H;
    if (t > 0 && !gaussian)  // rows that begin an episode are put right below
      gather_rows(scratch.packed.stoch_in, a.index + ((t - 1) * N + first + begin) * G, end - begin, G, f.classes,
                  starts ? starts + begin * starts_ld : nullptr, starts_ld, H, from_stoch + begin * U, U);
    for (int64_t r = begin; r < end; ++r) {
      const bool reset = a.is_first[t * N + first + r];
      if (reset)
        zero_row(h + r * D, D);
      else
        copy_row(deter_before + r * D, h + r * D, D);
      if (reset && block)
        for (int64_t j = 0; j < H; ++j) u[r * U + j] = a.w.deter_in.bias ? a.w.deter_in.bias[j] : S(0);
      const S* start = starts ? starts + r * starts_ld : nullptr;
      S* to = from_stoch + r * U;
      if (reset || t == 0) {
        const S* proj = a.stoch_proj + (first + r) * H;
        for (int64_t j = 0; j < H; ++j) to[j] = (start ? start[j] : S(0)) + (reset ? S(0) : proj[j]);
      } else if (gaussian) {
        copy_row(at(a.stoch, t - 1, N, first + r, G), scratch.z + (first + r) * G, G);
        for (int64_t j = 0; j < H; ++j) to[j] = start ? start[j] : S(0);
      } else if (is_missing(at(a.stoch, t - 1, N, first + r, Z), G, f.classes)) {
        spoil_row(to, H);
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
      if (!a.force_index) {
        sample_row(l, a.noise + row * G, G, f.classes, S(f.unimix), scratch.probs + (first + r) * Z, index, stoch);
        continue;
      }
      for (int64_t g = 0; g < G; ++g) index[g] = a.force_index[row * G + g];
      one_hot_row(index, G, f.classes, stoch);
    }
  }
}

template <typename S>
void observe(const RssmObserveArgs<S>& a, const Team& team) {
  const ObserveScratch<S> scratch(a.form, a.N, a.u != nullptr, a.scratch);
  scratch.packed.pack(team, a.form, a.w);
  team.sync();
  if (each_alone<S>(a.N, team.size, scratch.weights)) {
    const Team alone{0, 1, nullptr};
    observe_rows(alone, a, scratch, team.begin(a.N), team.end(a.N) - team.begin(a.N));
  } else {
    observe_rows(team, a, scratch, 0, a.N);
  }
}

template <typename S>
struct BackwardScratch {
  BackwardWeights<S> packed;
  int64_t weights;
  S *carry, *grad_h, *grad_stoch, *grad_head, *grad_y, *grad_x, *probs, *h, *norms;
  int64_t size;

  BackwardScratch(const RssmForm& f, int64_t N, int64_t members, S* base)
      : BackwardScratch(f, N, members, Arena<S>{base}) {}

 private:
  BackwardScratch(const RssmForm& f, int64_t N, int64_t members, Arena<S> arena)
      : packed(f, arena, true), weights(arena.used) {
    const int64_t X = Widths(f).u;
    carry = arena.take(N * f.D);
    grad_h = arena.take(N * f.D);
    grad_stoch = arena.take(N * f.stoch());
    grad_head = arena.take(N * f.H);
    grad_y = arena.take(N * f.D);
    grad_x = arena.take(N * X);
    probs = arena.take(N * f.stoch());
    h = arena.take(N * f.D);
    norms = arena.take(members * norm_gradients(f, 1));
    size = arena.used;
  }
};

template <typename S>
int64_t observe_backward_workspace(const RssmForm& form, int64_t N, int64_t members) {
  return BackwardScratch<S>(form, N, members, nullptr).size;
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
                   at(a.head, t, N, first + r, H), grad_o + r * H, norms.head, norms.head + norms.head_shift);
    team.sync();
    product(team, grad_o, H, packed.head, none, grad_h, D, rows, D, H, true);
    team.sync();
    const Widths width(f);
    cell_backward(
        team, f, a.w, packed,
        StepRowsBackward<S>{h, grad_h, at(a.cell1, t, N, first, width.cell1), at(a.cell2, t, N, first, width.cell2),
                            at(a.grad_cell1, t, N, first, width.cell1), at(a.grad_cell2, t, N, first, width.cell2),
                            grad_x, carry, at(a.y, t, N, first, D), scratch.grad_y + first * D, rows},
        norms);
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
  const int64_t sums = norm_gradients(a.form, 1);
  zero_row(scratch.norms + team.rank * sums, sums);
  scratch.packed.pack(team, a.form, a.w);
  team.sync();
  const NormGradients<S> norms(a.form, scratch.norms + team.rank * sums);
  if (each_alone<S>(a.N, team.size, scratch.weights)) {
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
