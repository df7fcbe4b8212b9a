// One step of a recurrent state-space model for a few states, on the CPU: what acting needs. See pywm/ops/rssm.py.
//
// What: mask by is_first -> cell -> head -> sample for N states, forward only; block_gru and layernorm_gru with
//   categorical latents.
// Layout: rows contiguous; weights as they are, [out, in]: packing them would take longer than the step.
// Mapping: every output of a layer is a product of a row of its weight with a state. Members of a team share the
//   outputs of a layer, so each weight is read once, by one core; a light barrier after each layer. What is cheap
//   (norms of hidden layers) each member does for itself. A few states are dot products; more of them are packed, and
//   the weight's rows pass by them as the left side of gemm.h's tiles.
// Cost: the weights once from wherever they are: bandwidth-bound for one state, 2·N flops a weight.
// Numerics: everything in S; a few states' sums run in as many parts as a vector has lanes, those of many in one.
// Source: Hafner et al. (2021, 2023); the formulas of the cells in ../math/gru.h.

#include <type_traits>

#include "kernels.h"
#include "rssm_cells.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// The lanes 0 .. N - 1, as <utility>, whose functions every instruction set would compile anew, would count them.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct FirstLanes : FirstLanes<N - 1, N - 1, I...> {};
template <int... I>
struct FirstLanes<0, I...> {
  using Type = Lanes<I...>;
};

// Where vectors are groups of kWidth lanes: the sums of each group's halves, of x's groups and then of y's.
template <int kWidth, typename Mask, typename Vector, int... I>
inline Vector halves(const Vector& x, const Vector& y, Lanes<I...>) {
  constexpr auto lane = [](int i) { return i / (kWidth / 2) * kWidth + i % (kWidth / 2); };
#if defined(__clang__)
  return __builtin_shufflevector(x, y, lane(I)...) + __builtin_shufflevector(x, y, (lane(I) + kWidth / 2)...);
#else
  return __builtin_shuffle(x, y, Mask{lane(I)...}) + __builtin_shuffle(x, y, Mask{(lane(I) + kWidth / 2)...});
#endif
}

// y [O] += the sums of O vectors' numbers, half and half. Vectors are folded into each other, so one addition serves
// several sums: short rows of weights cost about as much to sum up as to multiply.
template <typename S, int O, int kWidth = Simd<S>::kLanes, typename Vector>
inline void add_sums(const Vector* v, S* y) {
  constexpr int L = Simd<S>::kLanes;
  if constexpr (kWidth == 1) {
    alignas(kVectorBytes) S sums[(O + L - 1) / L * L];
    for (int i = 0; i < O; i += L) *reinterpret_cast<Vector*>(sums + i) = v[i / L];
    for (int o = 0; o < O; ++o) y[o] += sums[o];
  } else {
    constexpr int kVectors = (O * kWidth + L - 1) / L, kLeft = (kVectors + 1) / 2;
    using Mask [[gnu::vector_size(kVectorBytes)]] = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
    Vector left[kLeft];
#pragma GCC unroll 8
    for (int i = 0; i < kLeft; ++i)
      left[i] =
          halves<kWidth, Mask>(v[2 * i], v[2 * i + 1 < kVectors ? 2 * i + 1 : 2 * i], typename FirstLanes<L>::Type());
    add_sums<S, O, kWidth / 2>(left, y);
  }
}

// y [R, O] += x [R, K]·w [O, K]^T.
template <typename S, int R, int O>
inline void add_dots(const S* x, int64_t ldx, const S* w, int64_t ldw, int64_t K, S* y, int64_t ldy) {
  constexpr int64_t L = Simd<S>::kLanes, kLine = 64 / sizeof(S);
  using Vector = typename Simd<S>::Vector;
  Vector sum[R][O] = {};
  int64_t k = 0;
  for (; k + L <= K; k += L) {
    // Fetch the next rows of w, which come from memory, meanwhile. With vectors of a whole line that is an instruction
    // a multiply-add, which costs more than it brings.
    if constexpr (O > 3 && L < kLine)
      if (k % kLine == 0)
#pragma GCC unroll 8
        for (int o = 0; o < O; ++o) __builtin_prefetch(w + (O + o) * ldw + k);
    Vector a[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) a[r] = *reinterpret_cast<const Vector*>(x + r * ldx + k);
#pragma GCC unroll 8
    for (int o = 0; o < O; ++o) {
      const Vector b = *reinterpret_cast<const Vector*>(w + o * ldw + k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][o] += a[r] * b;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    add_sums<S, O>(sum[r], y + r * ldy);
    for (int o = 0; o < O && k < K; ++o)
      for (int64_t i = k; i < K; ++i) y[r * ldy + o] += x[r * ldx + i] * w[o * ldw + i];
  }
}

// From so many states on they lie side by side in the vectors' lanes, and a weight is read in order, once.
constexpr int64_t kManyRows = 5;
// Outputs whose products with kCols states stay in the first-level cache until they go to their rows.
constexpr int64_t kChunk = 96;

// What a layer reads: x [rows, K], and where there are many rows also x^T in panels of kCols states.
template <typename S>
struct Input {
  const S* x;
  int64_t ld, K;
  const S* panels;
};

template <typename S>
inline int64_t panels_size(int64_t rows, int64_t K) {
  return rows < kManyRows ? 0 : panels<S>(rows) * Simd<S>::kCols * K;
}

// `room` has panels_size(rows, K) numbers.
template <typename S>
inline Input<S> input_of(const S* x, int64_t ld, int64_t rows, int64_t K, S* room) {
  constexpr int64_t kCols = Simd<S>::kCols;
  if (rows < kManyRows) return {x, ld, K, nullptr};
  for (int64_t r = 0; r < rows; r += kCols)
    pack_panel_transposed(x + r * ld, ld, K, min(kCols, rows - r), room + r * K);
  return {x, ld, K, room};
}

// y [rows, count] += x·w^T for few rows.
template <typename S>
inline void add_product(const Input<S>& in, int64_t rows, const S* w, int64_t ldw, int64_t count, S* y, int64_t ldy) {
  int64_t o = 0;
  const auto outputs = [&]<int O>() {
    for (; o + O <= count; o += O) {
      int64_t r = 0;
      if constexpr (O <= 3)
        for (; r + 4 <= rows; r += 4)
          add_dots<S, 4, O>(in.x + r * in.ld, in.ld, w + o * ldw, ldw, in.K, y + r * ldy + o, ldy);
      for (; r < rows; ++r) add_dots<S, 1, O>(in.x + r * in.ld, in.ld, w + o * ldw, ldw, in.K, y + r * ldy + o, ldy);
    }
  };
  if (rows < 4) outputs.template operator()<8>();
  outputs.template operator()<3>();
  outputs.template operator()<1>();
}

// y [rows, count] := bias + [left, right]·w [count, left.K + right.K]^T.
template <typename S>
[[gnu::noinline]] void linear(const Input<S>& left, const Input<S>& right, int64_t rows, const S* w, int64_t ldw,
                              const S* bias, int64_t count, S* y, int64_t ldy) {
  constexpr int64_t L = Simd<S>::kLanes, kCols = Simd<S>::kCols;
  if (!left.panels) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < count; ++j) y[r * ldy + j] = bias ? bias[j] : S(0);
    add_product(left, rows, w, ldw, count, y, ldy);
    if (right.K > 0) add_product(right, rows, w + left.K, ldw, count, y, ldy);
    return;
  }
  alignas(kVectorBytes) const S zeros[kCols] = {};
  alignas(kVectorBytes) S c[kChunk * kCols];
  for (int64_t o = 0; o < count; o += kChunk) {
    const int64_t outputs = min(kChunk, count - o);
    for (int64_t first = 0; first < rows; first += kCols) {
      const int64_t states = min(kCols, rows - first), columns = states > L ? kCols : L;
      const S* from = w + o * ldw;
      const auto run = states > L ? column_of_tiles<2, true, true, S, S> : column_of_tiles<1, true, true, S, S>;
      run(from, ldw, left.panels + first * left.K, zeros, c, kCols, outputs, left.K, columns);
      if (right.K > 0)
        run(from + left.K, ldw, right.panels + first * right.K, nullptr, c, kCols, outputs, right.K, columns);
      for (int64_t r = 0; r < states; ++r)
        for (int64_t j = 0; j < outputs; ++j)
          y[(first + r) * ldy + o + j] = c[j * kCols + r] + (bias ? bias[o + j] : S(0));
    }
  }
}

template <typename S>
inline const S* part(const S* bias, int64_t first) {
  return bias ? bias + first : nullptr;
}

inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename S>
struct ActScratch {
  // Of all members:
  S *h, *z, *u, *cell1, *cell2, *y, *o;
  // Of each:
  S *x{}, *action{}, *head{}, *probs{}, *left{}, *right{};
  int64_t shared, each;

  ActScratch(const RssmActArgs<S>& a, int64_t member) : ActScratch(a, member, Arena<S>{a.scratch}) {}
  int64_t size(int64_t members) const { return shared + members * each; }

 private:
  ActScratch(const RssmActArgs<S>& a, int64_t member, Arena<S> arena) {
    const RssmForm& f = a.form;
    const int64_t N = a.N, D = f.D, H = f.H, widest = larger(larger(larger(D, f.stoch()), 3 * H), larger(a.A, a.E));
    h = arena.take(N * D);
    z = arena.take(N * f.stoch());
    u = arena.take(N * 3 * H);
    cell1 = arena.take(N * 3 * D);
    cell2 = arena.take(N * 3 * D);
    y = arena.take(N * D);
    o = arena.take(N * H);
    shared = arena.used;
    for (int64_t m = 0; m <= member; ++m) {
      x = arena.take(N * 3 * H);
      action = arena.take(N * a.A);
      head = arena.take(N * H);
      probs = arena.take(f.stoch());
      left = arena.take(panels_size<S>(N, widest));
      right = arena.take(panels_size<S>(N, widest));
      if (m == 0) each = arena.used - shared;
    }
  }
};

template <typename S>
int64_t act_workspace(const RssmActArgs<S>& a) {
  RssmActArgs<S> counted = a;
  counted.scratch = nullptr;
  return ActScratch<S>(counted, 0).size(a.members);
}

// The new deter, synchronised.
template <typename S>
void act_cell(const Team& team, const RssmActArgs<S>& a, const ActScratch<S>& s, const S* h, const S* z) {
  const RssmForm& f = a.form;
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t N = a.N, D = f.D, H = f.H, Z = f.stoch(), A = a.A, G = f.blocks, Dg = D / G, X = block ? 3 * H : H;
  const NormAct<S> norm = norm_act<S>(f.norm, f.activation);
  const RssmWeights<S>& w = a.w;
  const Input<S> nothing{};
  // The layers of the cell's inputs side by side, [deter_in, stoch_in, action_in].
  for (int64_t j = team.begin(X), last = team.end(X); j < last;) {
    const int64_t layer = j / H, first = j % H, count = min(H - first, last - j);
    S* u = s.u + layer * H;
    if (!block) {
      linear(input_of(z, Z, N, Z, s.left), input_of(s.action, A, N, A, s.right), N,
             w.stoch_in.weight + first * w.stoch_in.ld, w.stoch_in.ld, part(w.stoch_in.bias, first), count, u + first,
             X);
    } else {
      const RssmLayer<S>& in = layer == 0 ? w.deter_in : (layer == 1 ? w.stoch_in : a.action_in);
      const S* input = layer == 0 ? h : (layer == 1 ? z : s.action);
      const int64_t K = layer == 0 ? D : (layer == 1 ? Z : A);
      linear(input_of(input, K, N, K, s.left), nothing, N, in.weight + first * in.ld, in.ld, part(in.bias, first),
             count, u + first, X);
    }
    j += count;
  }
  team.sync();
  for (int64_t n = 0; n < N; ++n)
    for (int64_t layer = 0; layer * H < X; ++layer) {
      const RssmLayer<S>& in = !block || layer == 1 ? w.stoch_in : (layer == 0 ? w.deter_in : a.action_in);
      norm.forward(s.u + n * X + layer * H, in.scale, in.shift, H, S(f.eps), s.x + n * X + layer * H);
    }
  const int64_t row_begin = team.begin(N), row_end = team.end(N);
  if (!block) {
    const int64_t first = team.begin(3 * D), count = team.end(3 * D) - first;
    linear(input_of(s.x, X, N, H, s.left), input_of(h, D, N, D, s.right), N, w.gates.weight + first * w.gates.ld,
           w.gates.ld, part(w.gates.bias, first), count, s.cell1 + first, 3 * D);
    team.sync();
    for (int64_t n = row_begin; n < row_end; ++n)
      layernorm_gru_row(s.cell1 + n * 3 * D, w.gates.scale, w.gates.shift, h + n * D, D, S(f.cell_eps),
                        a.deter_out + n * D);
    team.sync();
    return;
  }
  // Columns of one block at a time.
  const auto over_blocks = [&](const auto& run) {
    for (int64_t j = team.begin(D), last = team.end(D); j < last;) {
      const int64_t g = j / Dg, first = j % Dg, count = min(Dg - first, last - j);
      run(g, first, count);
      j += count;
    }
  };
  const Input<S> x = input_of(s.x, X, N, X, s.right);
  over_blocks([&](int64_t g, int64_t first, int64_t count) {
    const int64_t column = g * Dg + first;
    linear(input_of(h + g * Dg, D, N, Dg, s.left), x, N, w.hidden.weight + column * w.hidden.ld, w.hidden.ld,
           part(w.hidden.bias, column), count, s.cell1 + column, D);
  });
  team.sync();
  for (int64_t n = row_begin; n < row_end; ++n)
    norm.forward(s.cell1 + n * D, w.hidden.scale, w.hidden.shift, D, S(f.eps), s.y + n * D);
  team.sync();
  over_blocks([&](int64_t g, int64_t first, int64_t count) {
    const Input<S> y = input_of(s.y + g * Dg, D, N, Dg, s.left);
    for (int64_t gate = 0; gate < 3; ++gate) {
      const int64_t column = (3 * g + gate) * Dg + first;
      linear(y, nothing, N, w.gates.weight + column * w.gates.ld, w.gates.ld, part(w.gates.bias, column), count,
             s.cell2 + column, 3 * D);
    }
    for (int64_t n = 0; n < N; ++n)
      block_gru_row(s.cell2 + n * 3 * D + 3 * g * Dg, h + n * D + g * Dg, Dg, first, count,
                    a.deter_out + n * D + g * Dg);
  });
  team.sync();
}

template <typename S>
void act(const RssmActArgs<S>& a, const Team& team) {
  const ActScratch<S> s(a, team.rank);
  const RssmForm& f = a.form;
  const int64_t N = a.N, D = f.D, H = f.H, Z = f.stoch(), Q = f.stats(), A = a.A, G = f.groups;
  const NormAct<S> norm = norm_act<S>(f.norm, f.activation);
  const int64_t begin = team.begin(N), end = team.end(N);
  bool resets = false;
  for (int64_t n = 0; n < N; ++n) resets |= a.is_first && a.is_first[n];
  const S *h = a.deter, *z = a.stoch;
  if (resets || a.stoch_index) {
    for (int64_t n = begin; n < end; ++n) {
      const bool reset = a.is_first && a.is_first[n];
      if (reset) {
        zero_row(s.h + n * D, D);
        zero_row(s.z + n * Z, Z);
        continue;
      }
      copy_row(a.deter + n * D, s.h + n * D, D);
      if (a.stoch_index)
        one_hot_row(a.stoch_index + n * G, G, f.classes, s.z + n * Z);
      else
        copy_row(a.stoch + n * Z, s.z + n * Z, Z);
    }
    h = s.h;
    z = s.z;
    team.sync();
  }
  for (int64_t n = 0; n < N; ++n)
    for (int64_t j = 0; j < A; ++j) {
      S x = a.is_first && a.is_first[n] ? S(0) : a.action[n * A + j];
      if (f.cell == RssmCell::kBlockGru) {
        const S magnitude = x < S(0) ? -x : x;
        x = magnitude > S(1) ? x / magnitude : x;
      }
      s.action[n * A + j] = x;
    }
  act_cell(team, a, s, h, z);
  const Input<S> nothing{};
  const S* input = a.deter_out;
  int64_t K = D;
  for (int64_t i = 0; i < a.head_layers; ++i) {
    const RssmLayer<S>& layer = a.head[i];
    const bool last = i + 1 == a.head_layers;
    const int64_t width = last ? Q : H, first = team.begin(width), count = team.end(width) - first;
    S* y = last ? a.stats : s.o;
    const bool embedded = i == 0 && a.embed;
    linear(input_of(input, K, N, K, s.left), embedded ? input_of(a.embed, a.E, N, a.E, s.right) : nothing, N,
           layer.weight + first * layer.ld, layer.ld, part(layer.bias, first), count, y + first, width);
    team.sync();
    if (last) break;
    for (int64_t n = 0; n < N; ++n) norm.forward(s.o + n * H, layer.scale, layer.shift, H, S(f.eps), s.head + n * H);
    if (i + 2 < a.head_layers) team.sync();  // the next hidden layer overwrites what others may still read
    input = s.head;
    K = H;
  }
  for (int64_t n = begin; n < end; ++n) {
    uint8_t* index = a.index + n * G;
    if (!a.force_index) {
      sample_row(a.stats + n * Q, a.noise + n * G, G, f.classes, S(f.unimix), s.probs, index, a.stoch_out + n * Z);
      continue;
    }
    for (int64_t g = 0; g < G; ++g) index[g] = a.force_index[n * G + g];
    one_hot_row(index, G, f.classes, a.stoch_out + n * Z);
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.rssm_act_workspace = act_workspace<S>;
  table.rssm_act = act<S>;
}

}  // namespace

void fill_rssm_act(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
