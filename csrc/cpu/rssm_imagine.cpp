// Imagination with a recurrent state-space model on the CPU, forward only. See pywm/ops/rssm.py.
//
// What: from N starts, `horizon` times  policy -> action -> cell -> prior -> sample  in one call.
// Layout: time-major, rows contiguous; all activations are scratch.
// Mapping: starts are independent. Each thread takes blocks of kRows of them through the whole horizon and waits for
//   nobody; a block's activations stay near the core, the packed weights pass by once a step.
// Cost: 2·H·N·(weights of policy, cell and prior) flops, with the one-hot inputs gathered; 80 % of one core's peak in
// the
//   products, about a tenth of the time in the rows between them.
// Numerics: as rssm_observe.cpp; a row's numbers depend on no other row, and not on the number of threads.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kRows = 96;  // a multiple of every tile's rows

// Packed layers of a perceptron, and its widths.
template <typename S>
struct Packed {
  static constexpr int64_t kMost = 16;
  S* layers[kMost];
};

inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename S>
struct ImagineScratch {
  StepWeights<S> packed;
  S *action_in, *action_x;    // the weights of actions: their own layer, and its way into the cell
  S *table, *table_features;  // block_gru with one group of classes: what the cell gets of each; else null
  S *policy_deter, *policy_stoch;
  Packed<S> policy, prior;
  // Of each member:
  S *u, *cell1, *cell2, *x, *y, *action_u, *action_features, *action_proj, *wide, *wide2, *probs, *bounded, *z;
  uint8_t* taken;
  int64_t shared, each;

  ImagineScratch(const RssmImagineArgs<S>& a, int64_t member) : ImagineScratch(a, member, Arena<S>{a.scratch}) {}

  int64_t size(int64_t members) const { return shared + members * each; }

 private:
  ImagineScratch(const RssmImagineArgs<S>& a, int64_t member, Arena<S> arena) : packed(a.form, arena, false) {
    const RssmForm& f = a.form;
    const PolicyNetwork<S>& p = a.policy;
    const bool block = f.cell == RssmCell::kBlockGru;
    const int64_t D = f.D, H = f.H, X = StepWeights<S>::x_width(f);
    action_in = arena.take(packed_size<S>(a.A, H));
    action_x = block ? arena.take(packed_size<S>(H, D)) : nullptr;
    const bool tabled = block && p.kind == PolicyKind::kCategorical && p.groups == 1 && !a.force_action;
    table = tabled ? arena.take(a.A * D) : nullptr;
    table_features = tabled ? arena.take(2 * a.A * H) : nullptr;
    policy_deter = arena.take(packed_size<S>(D, p.U));
    policy_stoch = arena.take(packed_size<S>(f.stoch(), p.U));
    for (int64_t i = 1; i < p.count; ++i)
      policy.layers[i] = arena.take(packed_size<S>(p.U, i + 1 < p.count ? p.U : p.outputs));
    for (int64_t i = 0; i < a.prior_layers; ++i)
      prior.layers[i] = arena.take(packed_size<S>(i == 0 ? D : H, i + 1 < a.prior_layers ? H : f.stats()));
    shared = arena.used;
    const int64_t cell1_width = block ? D : 3 * D;
    for (int64_t m = 0; m <= member; ++m) {
      u = arena.take(kRows * X);
      cell1 = arena.take(kRows * cell1_width);
      cell2 = arena.take(kRows * 3 * D);
      x = arena.take(kRows * X);
      y = arena.take(kRows * D);
      action_u = arena.take(kRows * H);
      action_features = arena.take(kRows * H);
      action_proj = arena.take(kRows * (block ? D : H));
      wide = arena.take(kRows * largest(p.U, H));
      wide2 = arena.take(kRows * largest(p.U, H));
      probs = arena.take(kRows * largest(f.stoch(), p.outputs));
      bounded = arena.take(kRows * a.A);
      z = arena.take(kRows * f.groups);
      taken = reinterpret_cast<uint8_t*>(arena.take(kRows));
      if (m == 0) each = arena.used - shared;
    }
  }
};

template <typename S>
int64_t imagine_workspace(const RssmImagineArgs<S>& a) {
  RssmImagineArgs<S> counted = a;
  counted.scratch = nullptr;
  return ImagineScratch<S>(counted, 0).size(a.members);
}

// A row's action from what the policy gave; `taken` is the class of its last group.
template <typename S>
void act(const PolicyNetwork<S>& p, const S* stats, const S* noise, int64_t A, S* probs, S* action, uint8_t* taken) {
  if (p.kind == PolicyKind::kCategorical) {
    for (int64_t g = 0, first = 0; g < p.groups; first += p.classes[g++]) {
      sample_row(stats + first, noise + g, 1, p.classes[g], S(p.unimix), probs, taken);
      one_hot_row(taken, 1, p.classes[g], action + first);
    }
    return;
  }
  for (int64_t j = 0; j < A; ++j) {
    const S mean = stats[j], raw = stats[A + j];
    if (p.kind == PolicyKind::kNormal) {
      const S std = S(p.max_std - p.min_std) * math::sigmoid(raw + S(2)) + S(p.min_std);
      action[j] = math::tanh(mean) + std * noise[j];
    } else {
      constexpr double kInit = 4.993239250550512;  // log(exp(5) - 1): a raw 0 gives 5
      const S std = std_of(raw + S(kInit), S(p.min_std), false);
      action[j] = math::tanh(S(5) * math::tanh(mean / S(5)) + std * noise[j]);
    }
  }
}

template <typename S>
void imagine_rows(const RssmImagineArgs<S>& a, const ImagineScratch<S>& s, int64_t first, int64_t rows) {
  const Team alone{0, 1, nullptr};
  const RssmForm& f = a.form;
  const PolicyNetwork<S>& p = a.policy;
  const bool block = f.cell == RssmCell::kBlockGru, gaussian = f.gaussian();
  const int64_t N = a.N, D = f.D, H = f.H, X = StepWeights<S>::x_width(f), Z = f.stoch(), Q = f.stats(), A = a.A,
                G = f.groups, U = p.U, action_noise = p.kind == PolicyKind::kCategorical ? p.groups : A;
  const NormAct<S> norm = norm_act<S>(f.norm, f.activation), policy_norm = norm_act<S>(p.norm, p.activation);
  const S* none = nullptr;
  for (int64_t t = 0; t < a.horizon; ++t) {
    const int64_t row = t * N + first, next = row + N;
    const S* deter = a.deter + row * D;
    const uint8_t* index = gaussian ? nullptr : a.index + row * G;
    const S* stoch = a.stoch + row * Z;
    // The policy.
    S *in = s.wide, *out = s.wide2;
    for (int64_t r = 0; r < rows; ++r) {
      const S* bias = p.layers[0].bias;
      if (t == 0)
        for (int64_t j = 0; j < U; ++j) out[r * U + j] = (bias ? bias[j] : S(0)) + a.policy_proj[(first + r) * U + j];
      else if (gaussian)
        for (int64_t j = 0; j < U; ++j) out[r * U + j] = bias ? bias[j] : S(0);
      else
        gather_row(s.policy_stoch, index + r * G, G, f.classes, bias, U, out + r * U);
    }
    if (gaussian && t > 0) product(alone, stoch, Z, s.policy_stoch, none, out, U, rows, U, Z, true);
    product(alone, deter, D, s.policy_deter, none, out, U, rows, U, D, true);
    for (int64_t i = 0; i + 1 < p.count; ++i) {
      for (int64_t r = 0; r < rows; ++r)
        policy_norm.forward(out + r * U, p.layers[i].scale, p.layers[i].shift, U, S(p.eps), in + r * U);
      const bool last = i + 2 == p.count;
      const int64_t width = last ? p.outputs : U;
      product(alone, in, U, s.policy.layers[i + 1], p.layers[i + 1].bias, last ? a.policy_stats + row * p.outputs : out,
              width, rows, width, U);
    }
    S* action = a.action + row * A;
    for (int64_t r = 0; r < rows; ++r) {
      if (a.force_action)
        copy_row(a.force_action + (row + r) * A, action + r * A, A);
      else
        act(p, a.policy_stats + (row + r) * p.outputs, a.action_noise + (row + r) * action_noise, A, s.probs,
            action + r * A, s.taken + r);
    }
    // The cell.
    S* from_stoch = s.u + (block ? H : 0);
    const S* action_proj = s.action_proj;
    const uint8_t* action_class = nullptr;
    if (s.table) {
      action_proj = s.table;
      action_class = s.taken;
    } else if (block) {
      for (int64_t i = 0; i < rows * A; ++i) {
        const S magnitude = action[i] < S(0) ? -action[i] : action[i];
        s.bounded[i] = magnitude > S(1) ? action[i] / magnitude : action[i];
      }
      product(alone, s.bounded, A, s.action_in, a.action_in.bias, s.action_u, H, rows, H, A);
      for (int64_t r = 0; r < rows; ++r)
        norm.forward(s.action_u + r * H, a.action_in.scale, a.action_in.shift, H, S(f.eps), s.action_features + r * H);
      product(alone, s.action_features, H, s.action_x, a.w.hidden.bias, s.action_proj, D, rows, D, H);
    } else {
      product(alone, action, A, s.action_in, a.w.stoch_in.bias, s.action_proj, H, rows, H, A);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const S* start = block ? a.w.stoch_in.bias : s.action_proj + r * H;
      S* to = from_stoch + r * X;
      if (t == 0)
        for (int64_t j = 0; j < H; ++j) to[j] = (start ? start[j] : S(0)) + a.stoch_proj[(first + r) * H + j];
      else if (gaussian)
        for (int64_t j = 0; j < H; ++j) to[j] = start ? start[j] : S(0);
      else
        gather_row(s.packed.stoch_in, index + r * G, G, f.classes, start, H, to);
    }
    if (gaussian && t > 0) product(alone, stoch, Z, s.packed.stoch_in, none, from_stoch, X, rows, H, Z, true);
    if (block) product(alone, deter, D, s.packed.deter_in, a.w.deter_in.bias, s.u, X, rows, H, D);
    S* deter_next = a.deter + next * D;
    cell_forward(
        alone, f, a.w, s.packed,
        StepRows<S>{action_proj, action_class, deter, s.u, s.cell1, s.cell2, s.x, s.y, deter_next, nullptr, rows});
    // The prior.
    const S* from = deter_next;
    int64_t width = D;
    for (int64_t i = 0; i + 1 < a.prior_layers; ++i) {
      product(alone, from, width, s.prior.layers[i], a.prior[i].bias, s.wide2, H, rows, H, width);
      for (int64_t r = 0; r < rows; ++r)
        norm.forward(s.wide2 + r * H, a.prior[i].scale, a.prior[i].shift, H, S(f.eps), s.wide + r * H);
      from = s.wide;
      width = H;
    }
    S* stats = a.prior_stats + row * Q;
    product(alone, from, width, s.prior.layers[a.prior_layers - 1], a.prior[a.prior_layers - 1].bias, stats, Q, rows, Q,
            width);
    for (int64_t r = 0; r < rows; ++r) {
      S* sample = a.stoch + (next + r) * Z;
      const S* l = stats + r * Q;
      if (gaussian) {
        for (int64_t g = 0; g < G; ++g)
          sample[g] = a.force_stoch ? a.force_stoch[(row + r) * G + g]
                                    : l[g] + std_of(l[G + g], S(f.min_std), f.sigmoid_std) * a.noise[(row + r) * G + g];
        continue;
      }
      uint8_t* drawn = a.index + (next + r) * G;
      if (a.force_index)
        for (int64_t g = 0; g < G; ++g) drawn[g] = a.force_index[(row + r) * G + g];
      else
        sample_row(l, a.noise + (row + r) * G, G, f.classes, S(f.unimix), s.probs, drawn);
      one_hot_row(drawn, G, f.classes, sample);
    }
  }
}

template <typename S>
void imagine(const RssmImagineArgs<S>& a, const Team& team) {
  const RssmForm& f = a.form;
  const PolicyNetwork<S>& p = a.policy;
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t D = f.D, H = f.H, Dg = D / f.blocks, Z = f.stoch();
  const ImagineScratch<S> s(a, team.rank);
  s.packed.pack(team, f, a.w);
  if (block) {
    pack_weight(team, a.action_in.weight, a.action_in.ld, a.A, H, s.action_in);
    pack_weight(team, a.w.hidden.weight + Dg + 2 * H, a.w.hidden.ld, H, D, s.action_x);
  } else {
    pack_weight(team, a.w.stoch_in.weight + Z, a.w.stoch_in.ld, a.A, H, s.action_in);
  }
  pack_weight(team, p.layers[0].weight, p.layers[0].ld, D, p.U, s.policy_deter);
  pack_weight(team, p.layers[0].weight + D, p.layers[0].ld, Z, p.U, s.policy_stoch);
  for (int64_t i = 1; i < p.count; ++i)
    pack_weight(team, p.layers[i].weight, p.layers[i].ld, p.U, i + 1 < p.count ? p.U : p.outputs, s.policy.layers[i]);
  for (int64_t i = 0; i < a.prior_layers; ++i)
    pack_weight(team, a.prior[i].weight, a.prior[i].ld, i == 0 ? D : H, i + 1 < a.prior_layers ? H : f.stats(),
                s.prior.layers[i]);
  team.sync();
  if (s.table && team.rank == 0) {
    const Team alone{0, 1, nullptr};
    const NormAct<S> norm = norm_act<S>(f.norm, f.activation);
    const RssmLayer<S>& in = a.action_in;
    S *u = s.table_features, *features = u + a.A * H;
    for (int64_t i = 0; i < a.A; ++i) {
      for (int64_t j = 0; j < H; ++j) u[i * H + j] = in.weight[j * in.ld + i] + (in.bias ? in.bias[j] : S(0));
      norm.forward(u + i * H, in.scale, in.shift, H, S(f.eps), features + i * H);
    }
    product(alone, features, H, s.action_x, a.w.hidden.bias, s.table, D, a.A, D, H);
  }
  if (s.table) team.sync();
  const int64_t begin = team.begin(a.N), end = team.end(a.N);
  for (int64_t first = begin; first < end; first += kRows) imagine_rows(a, s, first, smaller(kRows, end - first));
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.rssm_imagine_workspace = imagine_workspace<S>;
  table.rssm_imagine = imagine<S>;
}

}  // namespace

void fill_rssm_imagine(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
