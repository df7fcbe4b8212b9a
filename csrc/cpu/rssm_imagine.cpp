// Imagination with a recurrent state-space model on the CPU, forward. See pywm/ops/imagine.py; the reverse is in
// rssm_imagine_backward.cpp.
//
// What: from N starts, `horizon` times  policy -> action -> cell -> prior -> sample  in one call.
// Layout: time-major, rows contiguous; all activations are scratch.
// Mapping: starts are independent. Each thread takes blocks of up to kRows of them through the whole horizon and waits
//   for nobody; a block's activations stay near the core, the packed weights pass by once a step.
// Cost: 2·H·N·(weights of policy, cell and prior) flops, with the one-hot inputs gathered; 80 % of one core's peak in
//   the products, about a tenth of the time in the rows between them.
// Numerics: as rssm_observe.cpp; a row's numbers depend on no other row, and not on the number of threads.
// Source: Hafner et al. (2020, 2021, 2023); the formulas of the cells in ../math/gru.h.

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kRows = 96;  // a multiple of every tile's rows

constexpr int64_t kMostLayers = 16;  // of a perceptron

inline int64_t largest(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename S>
struct ImagineScratch {
  StepWeights<S> packed;
  Packed<S> action_in, action_x;  // the weights of actions: their own layer, and its way into the cell
  S *table, *table_features;      // block_gru with one group of classes: what the cell gets of each; else null
  Packed<S> policy_deter, policy_stoch, policy[kMostLayers], prior[kMostLayers];
  // Of each member:
  S *u, *cell1, *cell2, *x, *y, *action_u, *action_features, *action_proj, *wide, *wide2, *probs, *bounded, *z;
  uint8_t* taken;
  int64_t* next;  // the first block of rows that nobody has taken
  int64_t shared, each;

  ImagineScratch(const RssmImagineArgs<S>& a, int64_t member) : ImagineScratch(a, member, Arena<S>{a.scratch}) {}

  int64_t size(int64_t members) const { return shared + members * each; }

 private:
  ImagineScratch(const RssmImagineArgs<S>& a, int64_t member, Arena<S> arena) : packed(a.form, arena, false) {
    const RssmForm& f = a.form;
    const PolicyNetwork<S>& p = a.policy;
    const bool block = f.cell == RssmCell::kBlockGru;
    const int64_t D = f.D, H = f.H, X = StepWeights<S>::x_width(f);
    const auto take = [&](int64_t K, int64_t N) { return take_packed(arena, f, K, N); };
    action_in = take(a.A, H);
    action_x = block ? take(H, D) : Packed<S>{nullptr, false};
    const bool tabled = block && p.kind == PolicyKind::kCategorical && p.groups == 1 && !a.force_action;
    table = tabled ? arena.take(a.A * D) : nullptr;
    table_features = tabled ? arena.take(2 * a.A * H) : nullptr;
    policy_deter = take(D, p.U);
    policy_stoch = take(f.stoch(), p.U);
    for (int64_t i = 1; i < p.count; ++i) policy[i] = take(p.U, i + 1 < p.count ? p.U : p.outputs);
    for (int64_t i = 0; i < a.prior_layers; ++i)
      prior[i] = take(i == 0 ? D : H, i + 1 < a.prior_layers ? H : f.stats());
    next = reinterpret_cast<int64_t*>(arena.take(16));
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
      sample_row(stats + first, noise + g, 1, p.classes[g], S(p.unimix), probs, taken, action + first);
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
    const auto pre_activation = [&](int64_t i) {
      return a.policy_pre ? a.policy_pre + (i * a.horizon * N + row) * U : s.wide2;
    };
    S *in = s.wide, *out = pre_activation(0);
    const uint8_t* classes =
        t > 0 ? index : nullptr;  // the start's stoch may be floats: its products were made outside
    stoch_rows(s.policy_stoch, classes, G, f.classes, t == 0 ? a.policy_proj + first * U : nullptr, p.layers[0].bias, 0,
               rows, U, out, U);
    if (classes)
      for (int64_t r = 0; r < rows; ++r)
        if (is_missing(stoch + r * Z, G, f.classes)) spoil_row(out + r * U, U);
    if (gaussian && t > 0) product(alone, stoch, Z, s.policy_stoch, none, out, U, rows, U, Z, true);
    product(alone, deter, D, s.policy_deter, none, out, U, rows, U, D, true);
    for (int64_t i = 0; i + 1 < p.count; ++i) {
      for (int64_t r = 0; r < rows; ++r)
        policy_norm.forward(out + r * U, p.layers[i].scale, p.layers[i].shift, U, S(p.eps), in + r * U);
      const bool last = i + 2 == p.count;
      const int64_t width = last ? p.outputs : U;
      out = last ? a.policy_stats + row * p.outputs : pre_activation(i + 1);
      product(alone, in, U, s.policy[i + 1], p.layers[i + 1].bias, out, width, rows, width, U);
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
    stoch_rows(s.packed.stoch_in, classes, G, f.classes, t == 0 ? a.stoch_proj + first * H : nullptr,
               block ? a.w.stoch_in.bias : s.action_proj, block ? 0 : H, rows, H, from_stoch, X);
    for (int64_t r = 0; r < rows; ++r)
      if ((classes && is_missing(stoch + r * Z, G, f.classes)) || (s.table && is_missing(action + r * A, 1, A)))
        spoil_row(from_stoch + r * X, H);
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
      product(alone, from, width, s.prior[i], a.prior[i].bias, s.wide2, H, rows, H, width);
      for (int64_t r = 0; r < rows; ++r)
        norm.forward(s.wide2 + r * H, a.prior[i].scale, a.prior[i].shift, H, S(f.eps), s.wide + r * H);
      from = s.wide;
      width = H;
    }
    S* stats = a.prior_stats + row * Q;
    product(alone, from, width, s.prior[a.prior_layers - 1], a.prior[a.prior_layers - 1].bias, stats, Q, rows, Q,
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
      if (!a.force_index) {
        sample_row(l, a.noise + (row + r) * G, G, f.classes, S(f.unimix), s.probs, drawn, sample);
        continue;
      }
      for (int64_t g = 0; g < G; ++g) drawn[g] = a.force_index[(row + r) * G + g];
      one_hot_row(drawn, G, f.classes, sample);
    }
  }
}

// Blocks of at most kRows rows: as many for each member, and no two differ by more than a tile's rows.
struct Blocks {
  int64_t rows, count;
  Blocks(int64_t N, int64_t members) : rows(N) {
    const int64_t each = (N + members - 1) / members;
    count = (each + kRows - 1) / kRows * members;
  }
  int64_t begin(int64_t block) const {
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    return smaller(rows, tiles * block / count * kTileRows);
  }
};

template <typename S>
void imagine(const RssmImagineArgs<S>& a, const Team& team) {
  const RssmForm& f = a.form;
  const PolicyNetwork<S>& p = a.policy;
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t D = f.D, H = f.H, Dg = D / f.blocks, Z = f.stoch();
  const ImagineScratch<S> s(a, team.rank);
  if (team.rank == 0) *s.next = team.size;
  const Blocks blocks(a.N, team.size);
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
    pack_weight(team, p.layers[i].weight, p.layers[i].ld, p.U, i + 1 < p.count ? p.U : p.outputs, s.policy[i]);
  for (int64_t i = 0; i < a.prior_layers; ++i)
    pack_weight(team, a.prior[i].weight, a.prior[i].ld, i == 0 ? D : H, i + 1 < a.prior_layers ? H : f.stats(),
                s.prior[i]);
  team.sync();
  if (s.table && team.rank == 0) {
    const Team alone{0, 1, nullptr};
    const NormAct<S> norm = norm_act<S>(f.norm, f.activation);
    const RssmLayer<S>& in = a.action_in;
    S *u = s.table_features, *features = u + a.A * H;
    for (int64_t i = 0; i < a.A; ++i) {
      for (int64_t j = 0; j < H; ++j) {
        const S weight = in.weight[j * in.ld + i];
        u[i * H + j] = (f.bfloat16 ? S(rounded(float(weight))) : weight) + (in.bias ? in.bias[j] : S(0));
      }
      norm.forward(u + i * H, in.scale, in.shift, H, S(f.eps), features + i * H);
    }
    product(alone, features, H, s.action_x, a.w.hidden.bias, s.table, D, a.A, D, H);
  }
  if (s.table) team.sync();
  // Who is done first takes the next block: a core that other processes hold must not make everybody wait.
  for (int64_t block = team.rank; block < blocks.count; block = Team::take(s.next))
    imagine_rows(a, s, blocks.begin(block), blocks.begin(block + 1) - blocks.begin(block));
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
