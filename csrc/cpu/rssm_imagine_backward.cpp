// The reverse of imagination with a recurrent state-space model on the CPU. See pywm/ops/imagine_backward.py.
//
// What: from the gradients of all imagined states and of the prior's statistics to those of the start and of every
//   pre-activation, in one call. The policy saw features without gradient, so nothing comes back through it: its own
//   gradient, those of the actions and those of all weights are products over all rows, made afterwards.
// Layout: time-major, rows contiguous. Pre-activations are computed again from the states; their gradients, and what
//   the products took, are planes of all rows.
// Mapping: starts are independent. Each thread takes blocks of kRows of them through the whole horizon, from its end,
//   and waits for nobody but at the end, where sums of norms' gradients meet.
// Cost: 2·H·N·(weights of cell and prior) flops forward again, and as many backward.
// Numerics: as rssm_observe.cpp; a row's numbers depend on no other row. Sums of norms' gradients run in a fixed order
//   for a given number of threads.
// Source: Hafner et al. (2020, 2021); the formulas of the cells in ../math/gru.h.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kRows = 96, kMostLayers = 16;  // as forward

template <typename S>
struct ImagineBackwardScratch {
  StepWeights<S> packed;
  BackwardWeights<S> back;
  Packed<S> prior[kMostLayers], prior_back[kMostLayers];
  S* all_norms;
  // Of each member:
  S *u, *cell1, *cell2, *deter, *o, *grad_deter, *carry, *grad_stoch, *grad_head, *grad_x, *grad_y, *probs;
  int64_t shared, each;

  ImagineBackwardScratch(const RssmImagineBackwardArgs<S>& a, int64_t member)
      : ImagineBackwardScratch(a, member, Arena<S>{a.scratch}) {}

  int64_t size(int64_t members) const { return shared + members * each; }

 private:
  ImagineBackwardScratch(const RssmImagineBackwardArgs<S>& a, int64_t member, Arena<S> arena)
      : packed(a.form, arena, false), back(a.form, arena, false) {
    const RssmForm& f = a.form;
    const Widths width(f);
    const int64_t D = f.D, H = f.H, hidden = a.prior_layers - 1;
    for (int64_t i = 0; i < a.prior_layers; ++i) {
      const int64_t in = i == 0 ? D : H, out = i < hidden ? H : f.stats();
      prior[i] = i < hidden ? take_packed(arena, f, in, out) : Packed<S>{nullptr, false};
      prior_back[i] = take_packed(arena, f, out, in);
    }
    all_norms = arena.take(a.members * norm_gradients(f, hidden));
    shared = arena.used;
    for (int64_t m = 0; m <= member; ++m) {
      u = arena.take(kRows * width.u);
      cell1 = arena.take(kRows * width.cell1);
      cell2 = arena.take(kRows * width.cell2);
      deter = arena.take(kRows * D);
      o = arena.take(hidden * kRows * H);
      grad_deter = arena.take(kRows * D);
      carry = arena.take(kRows * D);
      grad_stoch = arena.take(kRows * f.stoch());
      grad_head = arena.take(kRows * H);
      grad_x = arena.take(kRows * width.u);
      grad_y = arena.take(kRows * D);
      probs = arena.take(f.stoch());
      if (m == 0) each = arena.used - shared;
    }
  }
};

template <typename S>
int64_t imagine_backward_workspace(const RssmImagineBackwardArgs<S>& a) {
  RssmImagineBackwardArgs<S> counted = a;
  counted.scratch = nullptr;
  return ImagineBackwardScratch<S>(counted, 0).size(a.members);
}

// The prior of step t, forward again, and from the gradients of the sample and the statistics to that of its deter.
template <typename S>
void prior_backward(const RssmImagineBackwardArgs<S>& a, const ImagineBackwardScratch<S>& s,
                    const NormGradients<S>& norms, int64_t t, int64_t first, int64_t rows) {
  const Team alone{0, 1, nullptr};
  const RssmForm& f = a.form;
  const int64_t N = a.N, D = f.D, H = f.H, Z = f.stoch(), Q = f.stats(), G = f.groups, hidden = a.prior_layers - 1,
                row = t * N + first, next = row + N, plane = a.horizon * N * H;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S* none = nullptr;
  const S* from = a.deter + next * D;
  for (int64_t i = 0; i < hidden; ++i) {
    S *o = s.o + i * kRows * H, *x = a.prior_x + i * plane + row * H;
    product(alone, from, i == 0 ? D : H, s.prior[i], a.prior[i].bias, o, H, rows, H, i == 0 ? D : H);
    if (i + 1 < hidden)  // the last one's is written on the way back
      for (int64_t r = 0; r < rows; ++r)
        act.forward(o + r * H, a.prior[i].scale, a.prior[i].shift, H, S(f.eps), x + r * H);
    from = x;
  }
  S* grad_stats = a.grad_stats_total + row * Q;
  for (int64_t r = 0; r < rows; ++r) {
    const S* l = a.stats + (row + r) * Q;
    S *out = grad_stats + r * Q, *z = s.grad_stoch + r * Z;
    if (a.grad_stats)
      copy_row(a.grad_stats + (row + r) * Q, out, Q);
    else
      zero_row(out, Q);
    if (a.grad_stoch)
      for (int64_t j = 0; j < Z; ++j) z[j] += a.grad_stoch[(next + r) * Z + j];
    if (f.gaussian())
      for (int64_t g = 0; g < G; ++g) {
        out[g] += z[g];
        out[G + g] += z[g] * a.noise[(row + r) * G + g] * std_slope(l[G + g], f.sigmoid_std);
      }
    else
      straight_through_row(l, z, G, f.classes, S(f.unimix), s.probs, out);
  }
  product(alone, grad_stats, Q, s.prior_back[hidden], none, s.grad_head, H, rows, H, Q);
  for (int64_t i = hidden - 1; i >= 0; --i) {
    S *o = s.o + i * kRows * H, *x = a.prior_x + i * plane + row * H, *grad_o = a.grad_prior + i * plane + row * H;
    S* scale = norms.head + i * norms.each_head;
    for (int64_t r = 0; r < rows; ++r)
      act.backward(o + r * H, a.prior[i].scale, a.prior[i].shift, H, S(f.eps), s.grad_head + r * H, x + r * H,
                   grad_o + r * H, scale, scale + norms.head_shift);
    if (i > 0)
      product(alone, grad_o, H, s.prior_back[i], none, s.grad_head, H, rows, H, H);
    else
      product(alone, grad_o, H, s.prior_back[0], none, s.grad_deter, D, rows, D, H, true);
  }
}

// The cell of step t: what its products made, computed again.
template <typename S>
void cell_again(const RssmImagineBackwardArgs<S>& a, const ImagineBackwardScratch<S>& s, int64_t t, int64_t first,
                int64_t rows) {
  const Team alone{0, 1, nullptr};
  const RssmForm& f = a.form;
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t N = a.N, D = f.D, H = f.H, X = Widths(f).u, Z = f.stoch(), G = f.groups, row = t * N + first;
  const S *deter = a.deter + row * D, *action_proj = a.action_proj + row * (block ? D : H);
  S* from_stoch = s.u + (block ? H : 0);
  stoch_rows(s.packed.stoch_in, f.gaussian() || t == 0 ? nullptr : a.index + row * G, G, f.classes,
             t == 0 ? a.stoch_proj + first * H : nullptr, block ? a.w.stoch_in.bias : action_proj, block ? 0 : H, rows,
             H, from_stoch, X);
  const S* none = nullptr;
  if (f.gaussian() && t > 0)
    product(alone, a.stoch + row * Z, Z, s.packed.stoch_in, none, from_stoch, X, rows, H, Z, true);
  if (block) product(alone, deter, D, s.packed.deter_in, a.w.deter_in.bias, s.u, X, rows, H, D);
  cell_forward(alone, f, a.w, s.packed,
               StepRows<S>{action_proj, nullptr, deter, s.u, s.cell1, s.cell2, a.x + row * X, a.y + row * D, s.deter,
                           nullptr, rows});
}

template <typename S>
void imagine_rows_backward(const RssmImagineBackwardArgs<S>& a, const ImagineBackwardScratch<S>& s,
                           const NormGradients<S>& norms, int64_t first, int64_t rows) {
  const Team alone{0, 1, nullptr};
  const RssmForm& f = a.form;
  const Widths width(f);
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t N = a.N, D = f.D, H = f.H, X = width.u, Z = f.stoch(), half = block ? H : 0;
  const NormAct<S> act = norm_act<S>(f.norm, f.activation);
  const S* none = nullptr;
  zero_row(s.carry, rows * D);
  zero_row(s.grad_stoch, rows * Z);
  const auto with_outer = [&](const S* inner, const S* outer, int64_t n, S* to) {
    for (int64_t i = 0; i < n; ++i) to[i] = inner[i] + (outer ? outer[i] : S(0));
  };
  for (int64_t t = a.horizon - 1; t >= 0; --t) {
    const int64_t row = t * N + first, next = row + N;
    with_outer(s.carry, a.grad_deter ? a.grad_deter + next * D : nullptr, rows * D, s.grad_deter);
    prior_backward(a, s, norms, t, first, rows);
    cell_again(a, s, t, first, rows);
    cell_backward(
        alone, f, a.w, s.back,
        StepRowsBackward<S>{a.deter + row * D, s.grad_deter, s.cell1, s.cell2, a.grad_cell1 + row * width.cell1,
                            a.grad_cell2 + row * width.cell2, s.grad_x, s.carry, a.y + row * D, s.grad_y, rows},
        norms);
    S* grad_u = a.grad_u + row * X;
    for (int64_t r = 0; r < rows; ++r) {
      const S *u = s.u + r * X, *grad_x = s.grad_x + r * X;
      S *x = a.x + (row + r) * X, *out = grad_u + r * X;
      if (block)
        act.backward(u, a.w.deter_in.scale, a.w.deter_in.shift, H, S(f.eps), grad_x, x, out, norms.deter_in,
                     norms.deter_in_shift);
      act.backward(u + half, a.w.stoch_in.scale, a.w.stoch_in.shift, H, S(f.eps), grad_x + half, x + half, out + half,
                   norms.stoch_in, norms.stoch_in_shift);
    }
    if (block) product(alone, grad_u, X, s.back.deter_in, none, s.carry, D, rows, D, H, true);
    product(alone, grad_u + half, X, s.back.stoch_in, none, s.grad_stoch, Z, rows, Z, H);
  }
  with_outer(s.carry, a.grad_deter ? a.grad_deter + first * D : nullptr, rows * D, a.grad_deter0 + first * D);
  with_outer(s.grad_stoch, a.grad_stoch ? a.grad_stoch + first * Z : nullptr, rows * Z, a.grad_stoch0 + first * Z);
}

template <typename S>
void imagine_backward(const RssmImagineBackwardArgs<S>& a, const Team& team) {
  const RssmForm& f = a.form;
  const int64_t D = f.D, H = f.H, hidden = a.prior_layers - 1, sums = norm_gradients(f, hidden);
  const ImagineBackwardScratch<S> s(a, team.rank);
  s.packed.pack(team, f, a.w);
  s.back.pack(team, f, a.w);
  for (int64_t i = 0; i <= hidden; ++i) {
    const int64_t in = i == 0 ? D : H, out = i < hidden ? H : f.stats();
    if (i < hidden) pack_weight(team, a.prior[i].weight, a.prior[i].ld, in, out, s.prior[i]);
    pack_transposed_weight(team, a.prior[i].weight, a.prior[i].ld, out, in, s.prior_back[i]);
  }
  zero_row(s.all_norms + team.rank * sums, sums);
  team.sync();
  const NormGradients<S> norms(f, s.all_norms + team.rank * sums);
  const int64_t begin = team.begin(a.N), end = team.end(a.N);
  for (int64_t first = begin; first < end; first += kRows)
    imagine_rows_backward(a, s, norms, first, smaller(kRows, end - first));
  team.sync();
  for (int64_t i = team.begin(sums); i < team.end(sums); ++i) {
    S sum = S(0);
    for (int64_t m = 0; m < team.size; ++m) sum += s.all_norms[m * sums + i];
    a.norms[i] = sum;
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.rssm_imagine_backward_workspace = imagine_backward_workspace<S>;
  table.rssm_imagine_backward = imagine_backward<S>;
}

}  // namespace

void fill_rssm_imagine_backward(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
