// Chooses the instruction set once, and spreads each kernel over torch's threads.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/pixels.h"
#include "kernels.h"
#include "parallel.h"

namespace pywm::cpu {

namespace baseline {
const Kernels& table();
}
#if defined(PYWM_X86_ISAS)
namespace x86_64_v3 {
const Kernels& table();
}
#endif
#if defined(PYWM_X86_AVX512)
namespace x86_64_v4 {
const Kernels& table();
}
namespace x86_64_v4_bf16 {
const Kernels& table();
}
#endif

namespace {

struct Isa {
  const char* name;
  const Kernels& (*table)();
  bool (*supported)();
};

#if defined(PYWM_X86_ISAS)
// Feature by feature: a level name says nothing on a machine that hides one of its features.
bool has_v3() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt") &&
         __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("x86-64-v3");
}
#endif
#if defined(PYWM_X86_AVX512)
bool has_v4() {
  return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_v4_bf16() { return has_v4() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best last.
const Isa kIsas[] = {
    {"baseline", baseline::table, [] { return true; }},
#if defined(PYWM_X86_ISAS)
    {"x86_64_v3", x86_64_v3::table, has_v3},
#endif
#if defined(PYWM_X86_AVX512)
    {"x86_64_v4", x86_64_v4::table, has_v4},
    {"x86_64_v4_bf16", x86_64_v4_bf16::table, has_v4_bf16},
#endif
};

const Kernels& choose() {
  const char* wanted = std::getenv("PYWM_CPU_ISA");
  const Isa* best = nullptr;
  for (const Isa& isa : kIsas) {
    if (wanted && *wanted && std::string(wanted) == isa.name) {
      if (!isa.supported())
        throw std::invalid_argument(std::string("PYWM_CPU_ISA is ") + wanted +
                                    ", but this processor lacks it; it has: " + available_isas());
      return isa.table();
    }
    if (isa.supported()) best = &isa;
  }
  if (wanted && *wanted)
    throw std::invalid_argument(std::string("PYWM_CPU_ISA is ") + wanted +
                                ", but one of these was expected: " + available_isas());
  return best->table();
}

// Columns are cut at multiples of a cache line of floats.
constexpr int64_t kColumnStep = 16;

// kernel(args, begin, end) over [0, n), as parallel_for cuts it.
template <typename Args>
void over_range(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t n, int64_t step,
                int64_t work) {
  struct Call {
    void (*kernel)(const Args&, int64_t, int64_t);
    const Args* args;
  } call{kernel, &args};
  parallel_for(n, step, work, &call, [](void* context, int64_t begin, int64_t end) {
    const Call& c = *static_cast<Call*>(context);
    c.kernel(*c.args, begin, end);
  });
}

template <typename Args>
void over_columns(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  over_range(kernel, args, args.N, kColumnStep, args.T * args.N);
}

constexpr int64_t kRowBlock = 512;   // rows that one partial sum covers, whatever the number of threads
constexpr int64_t kWorkPerRow = 32;  // a row of a loss costs about as much as this many elements of a scan

template <typename S>
PpoMoments moments(const PpoLossCommon<S>& a) {
  double count = 0, sum = 0, squares = 0;
  for (int64_t m = 0; m < a.M; ++m)
    if (!a.valid || a.valid[m]) {
      count += 1;
      sum += a.advantage[m];
    }
  PpoMoments result{0, 1, count > 0 ? 1 / count : 0};
  if (!a.options.normalize_advantage || count < 2) return result;
  result.mean = sum / count;
  // The first mean's rounding error is taken out again: advantages that are all equal become 0, not that error over
  // 1e-8.
  double error = 0;
  for (int64_t m = 0; m < a.M; ++m)
    if (!a.valid || a.valid[m]) {
      const double centred = a.advantage[m] - result.mean;
      error += centred;
      squares += centred * centred;
    }
  result.mean += error / count;
  const double variance = (squares - error * error / count) / (count - 1);
  result.scale = 1 / (std::sqrt(variance > 0 ? variance : 0) + 1e-8);
  return result;
}

// run(begin, end, sums, columns): `columns` doubles for the block, zeroed.
template <typename S, typename Run>
void ppo_loss(const PpoLossCommon<S>& a, int64_t columns, S* column_sums, const Run& run) {
  const PpoMoments m = moments(a);
  const int64_t blocks = (a.M + kRowBlock - 1) / kRowBlock;
  std::vector<PpoSums> sums(blocks);
  std::vector<double> partial(blocks * columns, 0.0);
  struct Call {
    const Run& run;
    const PpoMoments& m;
    PpoSums* sums;
    double* partial;
    int64_t columns, M;
  } call{run, m, sums.data(), partial.data(), columns, a.M};
  parallel_for(blocks, 1, a.M * kWorkPerRow, &call, [](void* context, int64_t first, int64_t last) {
    const Call& c = *static_cast<Call*>(context);
    for (int64_t b = first; b < last; ++b) {
      const int64_t end = (b + 1) * kRowBlock < c.M ? (b + 1) * kRowBlock : c.M;
      c.run(c.m, b * kRowBlock, end, c.sums[b], c.columns ? c.partial + b * c.columns : nullptr);
    }
  });
  PpoSums total;
  for (const PpoSums& s : sums) {
    total.policy += s.policy;
    total.value += s.value;
    total.entropy += s.entropy;
    total.clipped += s.clipped;
    total.kl += s.kl;
    if (total.bad_row < 0 && s.bad_row >= 0) {
      total.bad_row = s.bad_row;
      total.bad_action = s.bad_action;
      total.bad_classes = s.bad_classes;
    }
  }
  if (total.bad_row >= 0) {
    char message[160];
    std::snprintf(message, sizeof message, "ppo_loss: action is %lld in row %lld, but 0 <= action < %lld was expected",
                  static_cast<long long>(total.bad_action), static_cast<long long>(total.bad_row),
                  static_cast<long long>(total.bad_classes));
    throw std::out_of_range(message);
  }
  for (int64_t j = 0; j < columns; ++j) {
    double s = 0;
    for (int64_t b = 0; b < blocks; ++b) s += partial[b * columns + j];
    column_sums[j] = S(s);
  }
  const double n = m.inverse_count;
  const PpoLossOptions& o = a.options;
  a.loss[0] = S(n * (total.policy + o.value_coef * total.value - o.entropy_coef * total.entropy));
  a.stats[0] = S(n * total.policy);
  a.stats[1] = S(n * total.value);
  a.stats[2] = S(n * total.entropy);
  a.stats[3] = S(n * total.clipped);
  a.stats[4] = S(n * total.kl);
}

constexpr int64_t kMacsPerWork = 32;  // multiply-adds that take the time of one element of a scan

// Panels of the matrices [sizes[l+1], sizes[l]] cut along their rows or columns, and their elements with padding.
struct Panels {
  int64_t count = 0, elements = 0;
};

template <typename S>
Panels panels(const int64_t* sizes, int64_t first_layer, int64_t L, bool along_inputs) {
  const int64_t columns = of<S>(kernels()).tile_columns;
  Panels total;
  for (int64_t l = first_layer; l < L; ++l) {
    const int64_t N = along_inputs ? sizes[l] : sizes[l + 1], K = along_inputs ? sizes[l + 1] : sizes[l];
    const int64_t count = (N + columns - 1) / columns;
    total.count += count;
    total.elements += count * columns * K;
  }
  return total;
}

int64_t mlp_parameters(const int64_t* sizes, int64_t L) {
  int64_t total = 0;
  for (int64_t l = 0; l < L; ++l) total += sizes[l] * sizes[l + 1];
  return total;
}

// Elements of a scan that take the time of one element of a normalisation, or of a state behind its gates.
constexpr int64_t kWorkPerNorm = 4, kWorkPerGate = 8;

// Blocks of rows whose contributions to scale and shift are summed apart, whatever the number of threads.
constexpr int64_t kMaxNormBlocks = 64, kMinNormRows = 8;
int64_t norm_block_rows(int64_t M) {
  const int64_t rows = (M + kMaxNormBlocks - 1) / kMaxNormBlocks;
  return rows > kMinNormRows ? rows : kMinNormRows;
}
int64_t norm_blocks(int64_t M) { return (M + norm_block_rows(M) - 1) / norm_block_rows(M); }

// kernel(args, begin, end, partial) over blocks of rows, then the sums of their contributions. D numbers a row.
template <typename Args, typename S>
void norm_backward(void (*kernel)(const Args&, int64_t, int64_t, S*), const Args& args, int64_t D, int64_t work) {
  struct Call {
    void (*kernel)(const Args&, int64_t, int64_t, S*);
    const Args* args;
    int64_t D;
  } call{kernel, &args, D};
  parallel_for(norm_blocks(args.M), 1, work, &call, [](void* context, int64_t first, int64_t last) {
    const Call& c = *static_cast<Call*>(context);
    const int64_t M = c.args->M, rows = norm_block_rows(M);
    for (int64_t b = first; b < last; ++b)
      c.kernel(*c.args, b * rows, (b + 1) * rows < M ? (b + 1) * rows : M,
               c.args->partial ? c.args->partial + b * 3 * c.D : nullptr);
  });
  const int64_t blocks = norm_blocks(args.M);
  const auto add = of<S>(kernels()).norm_add_blocks;
  if (args.grad_scale) over_range(add, NormBlocks<S>{args.partial, args.grad_scale, blocks, 3 * D}, D, 64, blocks * D);
  if (args.grad_shift)
    over_range(add, NormBlocks<S>{args.partial + D, args.grad_shift, blocks, 3 * D}, D, 64, blocks * D);
}

template <typename Args>
void over_gates(void (*kernel)(const Args&, int64_t, int64_t), const Args& args) {
  over_range(kernel, args, args.M, 1, args.M * args.D * kWorkPerGate);
}

constexpr int64_t kFewOneHotRows = 32;  // fewer are not worth packing the weights

void check_classes(const char* op, const char* what, const uint8_t* index, int64_t M, int64_t groups, int64_t classes) {
  uint8_t largest = 0;
  for (int64_t i = 0; i < M * groups; ++i) largest = index[i] > largest ? index[i] : largest;
  if (largest < classes) return;
  for (int64_t i = 0; i < M * groups; ++i)
    if (index[i] >= classes) {
      char message[160];
      std::snprintf(message, sizeof message, "%s: %s is %d in row %lld, but 0 <= %s < %lld was expected", op, what,
                    int(index[i]), static_cast<long long>(i / groups), what, static_cast<long long>(classes));
      throw std::out_of_range(message);
    }
}

constexpr int64_t kNormBlock = 4096;  // elements that one partial sum of a norm covers, whatever the number of threads

template <typename S>
double norm_of(const S* x, int64_t n) {
  const int64_t blocks = (n + kNormBlock - 1) / kNormBlock;
  std::vector<double> sums(blocks);
  struct Call {
    const S* x;
    double* sums;
    int64_t n;
  } call{x, sums.data(), n};
  parallel_for(blocks, 1, n, &call, [](void* context, int64_t first, int64_t last) {
    const Call& c = *static_cast<Call*>(context);
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * kNormBlock, rest = c.n - begin;
      c.sums[b] = of<S>(kernels()).sum_of_squares(c.x + begin, rest < kNormBlock ? rest : kNormBlock);
    }
  });
  double total = 0;
  for (double s : sums) total += s;
  return std::sqrt(total);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* available_isas() {
  static const std::string names = [] {
    std::string list;
    for (const Isa& isa : kIsas)
      if (isa.supported()) {
        if (!list.empty()) list += ' ';
        list += isa.name;
      }
    return list;
  }();
  return names.c_str();
}

template <typename S>
void gae(const GaeArgs<S>& a) {
  over_columns(of<S>(kernels()).gae, a);
}
template <typename S>
void gae_backward(const GaeBackwardArgs<S>& a) {
  over_columns(of<S>(kernels()).gae_backward, a);
}
template <typename S>
void lambda_return(const LambdaReturnArgs<S>& a) {
  over_columns(of<S>(kernels()).lambda_return, a);
}
template <typename S>
void lambda_return_backward(const LambdaReturnBackwardArgs<S>& a) {
  over_columns(of<S>(kernels()).lambda_return_backward, a);
}
template <typename S>
void discounted_return(const DiscountedReturnArgs<S>& a) {
  over_columns(of<S>(kernels()).discounted_return, a);
}
template <typename S>
void discounted_return_backward(const DiscountedReturnBackwardArgs<S>& a) {
  over_columns(of<S>(kernels()).discounted_return_backward, a);
}
template <typename S>
void vtrace(const VtraceArgs<S>& a) {
  over_columns(of<S>(kernels()).vtrace, a);
}
template <typename S>
void vtrace_backward(const VtraceBackwardArgs<S>& a) {
  over_columns(of<S>(kernels()).vtrace_backward, a);
}
template <typename S>
void ppo_loss_categorical(const PpoLossCategoricalArgs<S>& a) {
  ppo_loss<S>(a.common, 0, nullptr, [&](const PpoMoments& m, int64_t begin, int64_t end, PpoSums& sums, double*) {
    of<S>(kernels()).ppo_loss_categorical(a, m, begin, end, sums);
  });
}
template <typename S>
void ppo_loss_gaussian(const PpoLossGaussianArgs<S>& a) {
  const bool summed = a.grad_log_std && a.log_std_rows == 1;
  ppo_loss<S>(a.common, summed ? a.A : 0, a.grad_log_std,
              [&](const PpoMoments& m, int64_t begin, int64_t end, PpoSums& sums, double* columns) {
                of<S>(kernels()).ppo_loss_gaussian(a, m, begin, end, sums, columns);
              });
}

template <typename S>
int64_t mlp_workspace(const int64_t* sizes, int64_t L) {
  return panels<S>(sizes, 0, L, false).elements;
}
template <typename S>
int64_t mlp_backward_workspace(const int64_t* sizes, int64_t L) {
  return panels<S>(sizes, 0, L, true).elements;
}
template <typename S>
void mlp(const MlpArgs<S>& a) {
  const KernelsOf<S>& k = of<S>(kernels());
  const Panels all = panels<S>(a.sizes, 0, a.L, false);
  over_range(k.mlp_pack, a, all.count, 1, all.elements);
  over_range(k.mlp, a, a.M, kMlpRows, a.M * mlp_parameters(a.sizes, a.L) / kMacsPerWork);
}
int64_t norm_mlp_members(const NormMlpForm& f) {
  constexpr int64_t kMacsForTeam = 1 << 20;  // some tens of microseconds
  return f.M * mlp_parameters(f.sizes, f.L) < kMacsForTeam ? 1 : num_threads();
}
template <typename S>
int64_t norm_mlp_workspace(const NormMlpForm& f, int64_t members) {
  return of<S>(kernels()).norm_mlp_workspace(f, members);
}
template <typename S>
int64_t norm_mlp_backward_workspace(const NormMlpForm& f, int64_t members) {
  return of<S>(kernels()).norm_mlp_backward_workspace(f, members);
}
template <typename S>
void norm_mlp(const NormMlpArgs<S>& a) {
  check_classes("norm_mlp", "index", a.index, a.form.M, a.form.groups, a.form.classes);
  run_team(a.members, const_cast<NormMlpArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).norm_mlp(*static_cast<const NormMlpArgs<S>*>(context), team);
  });
}
template <typename S>
void norm_mlp_backward(const NormMlpBackwardArgs<S>& a) {
  run_team(a.members, const_cast<NormMlpBackwardArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).norm_mlp_backward(*static_cast<const NormMlpBackwardArgs<S>*>(context), team);
  });
}
template <typename S>
void mlp_backward(const MlpBackwardArgs<S>& a) {
  const KernelsOf<S>& k = of<S>(kernels());
  const int64_t work = a.M * mlp_parameters(a.sizes, a.L) / kMacsPerWork;
  const Panels packed = panels<S>(a.sizes, a.grad_x ? 0 : 1, a.L, true);
  if (packed.count > 0) over_range(k.mlp_backward_pack, a, packed.count, 1, packed.elements);
  over_range(k.mlp_backward, a, a.M, kMlpRows, work);
  if (a.grad_weights) over_range(k.mlp_backward_weights, a, panels<S>(a.sizes, 0, a.L, true).count + a.L, 1, work);
}
int64_t norm_act_workspace(int64_t M, int64_t D) { return norm_blocks(M) * 3 * D; }
template <typename S>
void norm_act(const NormActArgs<S>& a) {
  over_range(of<S>(kernels()).norm_act, a, a.M, 1, a.M * a.D * kWorkPerNorm);
}
template <typename S>
void norm_act_backward(const NormActBackwardArgs<S>& a) {
  norm_backward(of<S>(kernels()).norm_act_backward, a, a.D, a.M * a.D * kWorkPerNorm);
}
template <typename S>
void layernorm_gru_gates(const LayernormGruGatesArgs<S>& a) {
  over_gates(of<S>(kernels()).layernorm_gru_gates, a);
}
template <typename S>
void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>& a) {
  norm_backward(of<S>(kernels()).layernorm_gru_gates_backward, a, 3 * a.D, a.M * a.D * kWorkPerGate);
}
template <typename S>
void block_gru_gates(const BlockGruGatesArgs<S>& a) {
  over_gates(of<S>(kernels()).block_gru_gates, a);
}
template <typename S>
void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>& a) {
  over_gates(of<S>(kernels()).block_gru_gates_backward, a);
}
template <typename S>
void gru_gates(const GruGatesArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_gates, a);
}
template <typename S>
void gru_gates_backward(const GruGatesBackwardArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_gates_backward, a);
}
template <typename S>
void gru_block_reset(const GruBlockResetArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_block_reset, a);
}
template <typename S>
void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_block_reset_backward, a);
}
template <typename S>
void gru_block_update(const GruBlockUpdateArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_block_update, a);
}
template <typename S>
void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>& a) {
  over_gates(of<S>(kernels()).gru_block_update_backward, a);
}
template <typename S>
int64_t one_hot_linear_workspace(int64_t U, int64_t columns) {
  return (U + kOneHotPanel - 1) / kOneHotPanel * kOneHotPanel * columns;
}
template <typename S>
void one_hot_linear(const OneHotLinearArgs<S>& a) {
  check_classes("one_hot_linear", "index", a.index, a.M, a.groups, a.classes);
  const KernelsOf<S>& k = of<S>(kernels());
  const int64_t work = a.M * a.U * a.groups, panels = (a.U + kOneHotPanel - 1) / kOneHotPanel;
  if (a.M < kFewOneHotRows) return over_range(k.one_hot_linear_few, a, a.U, kColumnStep, work);
  over_range(k.one_hot_linear_pack, a, panels, 1, a.U * a.groups * a.classes);
  over_range(k.one_hot_linear, a, a.M, 1, work / 4);
}
template <typename S>
void one_hot_linear_backward(const OneHotLinearBackwardArgs<S>& a) {
  check_classes("one_hot_linear", "index", a.index, a.M, a.groups, a.classes);
  const int64_t panels = (a.U + kOneHotPanel - 1) / kOneHotPanel;
  over_range(of<S>(kernels()).one_hot_linear_backward, a, panels * (a.groups + 1), 1, a.M * a.U * a.groups / 4);
}
template <typename S>
void adam_step(const AdamArgs<S>& a) {
  const double norm = norm_of(a.grad, a.P);
  a.norm[0] = S(norm);
  if (!std::isfinite(a.norm[0])) return;
  const double clip = a.max_grad_norm < 0 ? 1 : a.max_grad_norm / (norm + 1e-6);
  const double bias1 = 1 - std::pow(a.beta1, double(a.step)), bias2 = 1 - std::pow(a.beta2, double(a.step));
  const math::AdamFactors<S> factors{S(clip < 1 ? clip : 1),  S(1 - a.beta1),  S(a.beta2), S(1 - a.beta2),
                                     S(1 / std::sqrt(bias2)), S(a.lr / bias1), S(a.eps)};
  struct Call {
    const AdamArgs<S>& a;
    const math::AdamFactors<S>& factors;
  } call{a, factors};
  parallel_for(a.P, 64, a.P, &call, [](void* context, int64_t begin, int64_t end) {
    const Call& c = *static_cast<Call*>(context);
    of<S>(kernels()).adam_update(c.a, c.factors, begin, end);
  });
}

// Every piece of a tensor in blocks first to last - 1, which do not depend on the number of threads: fn(piece, segment,
// begin, end). A piece is numbered block + segment; from one to the next the block, the segment or both grow.
template <typename S, typename Fn>
void over_pieces(const LaPropArgs<S>& a, int64_t first, int64_t last, const Fn& fn) {
  for (int64_t b = first; b < last; ++b) {
    const int64_t begin = b * kNormBlock, end = begin + kNormBlock < a.P ? begin + kNormBlock : a.P;
    for (int64_t s = math::segment_of(a.offsets, a.segments, begin); s < a.segments && a.offsets[s] < end; ++s) {
      const int64_t from = a.offsets[s] > begin ? a.offsets[s] : begin;
      const int64_t to = a.offsets[s + 1] < end ? a.offsets[s + 1] : end;
      fn(b + s, s, from, to);
    }
  }
}

template <typename S>
void laprop_step(const LaPropArgs<S>& a) {
  const int64_t blocks = (a.P + kNormBlock - 1) / kNormBlock;
  struct Call {
    const LaPropArgs<S>& a;
    math::LaPropFactors<S> factors;
    std::vector<double> grad_sq, param_sq, scales;
  } call{a, {}, {}, {}, {}};
  call.grad_sq.resize(blocks + a.segments);
  call.param_sq.resize(blocks + a.segments);
  parallel_for(blocks, 1, 2 * a.P, &call, [](void* context, int64_t first, int64_t last) {
    Call& c = *static_cast<Call*>(context);
    const auto sum = of<S>(kernels()).sum_of_squares;
    over_pieces(c.a, first, last, [&](int64_t piece, int64_t, int64_t begin, int64_t end) {
      c.grad_sq[piece] = sum(c.a.grad + begin, end - begin);
      if (c.a.clip >= 0) c.param_sq[piece] = sum(c.a.param + begin, end - begin);
    });
  });

  std::vector<double> grad_sq(a.segments), param_sq(a.segments);
  double total = 0;
  over_pieces(a, 0, blocks, [&](int64_t piece, int64_t s, int64_t, int64_t) {
    grad_sq[s] += call.grad_sq[piece];
    param_sq[s] += call.param_sq[piece];
    total += call.grad_sq[piece];
  });
  a.norm[0] = S(std::sqrt(total));
  if (!std::isfinite(a.norm[0])) return;
  call.scales.resize(a.segments);
  for (int64_t s = 0; s < a.segments; ++s)
    call.scales[s] = math::agc_scale(grad_sq[s], param_sq[s], a.clip, a.min_norm);

  const double bias1 = 1 - std::pow(a.beta1, double(a.step)), bias2 = 1 - std::pow(a.beta2, double(a.step));
  call.factors = {S(1 - a.beta1),  S(a.beta2), S(1 - a.beta2), S(1 / std::sqrt(bias2)),
                  S(a.lr / bias1), S(a.eps),   S(a.slow_rate)};
  parallel_for(blocks, 1, 2 * a.P, &call, [](void* context, int64_t first, int64_t last) {
    const Call& c = *static_cast<Call*>(context);
    over_pieces(c.a, first, last, [&](int64_t, int64_t s, int64_t begin, int64_t end) {
      of<S>(kernels()).laprop_update(c.a, c.factors, c.scales[s], begin, end);
    });
  });
}

template <typename S>
int64_t rssm_observe_workspace(const RssmForm& form, int64_t N, bool keep) {
  return of<S>(kernels()).rssm_observe_workspace(form, N, keep);
}
template <typename S>
void rssm_observe(const RssmObserveArgs<S>& a) {
  run_team(num_threads(), const_cast<RssmObserveArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).rssm_observe(*static_cast<const RssmObserveArgs<S>*>(context), team);
  });
}
template <typename S>
int64_t rssm_observe_backward_workspace(const RssmForm& form, int64_t N, int64_t members) {
  return of<S>(kernels()).rssm_observe_backward_workspace(form, N, members);
}
template <typename S>
void rssm_observe_backward(const RssmObserveBackwardArgs<S>& a) {
  run_team(a.members, const_cast<RssmObserveBackwardArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).rssm_observe_backward(*static_cast<const RssmObserveBackwardArgs<S>*>(context), team);
  });
}

template <typename S>
int64_t rssm_act_workspace(const RssmActArgs<S>& a) {
  return of<S>(kernels()).rssm_act_workspace(a);
}
template <typename S>
void rssm_act(const RssmActArgs<S>& a) {
  constexpr int64_t kShort = int64_t{1} << 26;  // multiply-adds of a millisecond or two
  const auto run = rssm_act_work(a.form, a.N) < kShort ? run_short_team : run_team;
  run(a.members, const_cast<RssmActArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).rssm_act(*static_cast<const RssmActArgs<S>*>(context), team);
  });
}
template <typename S>
int64_t rssm_imagine_workspace(const RssmImagineArgs<S>& a) {
  return of<S>(kernels()).rssm_imagine_workspace(a);
}
template <typename S>
void rssm_imagine(const RssmImagineArgs<S>& a) {
  run_team(a.members, const_cast<RssmImagineArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).rssm_imagine(*static_cast<const RssmImagineArgs<S>*>(context), team);
  });
}
template <typename S>
int64_t rssm_imagine_backward_workspace(const RssmImagineBackwardArgs<S>& a) {
  return of<S>(kernels()).rssm_imagine_backward_workspace(a);
}
template <typename S>
void rssm_imagine_backward(const RssmImagineBackwardArgs<S>& a) {
  run_team(a.members, const_cast<RssmImagineBackwardArgs<S>*>(&a), [](void* context, const Team& team) {
    of<S>(kernels()).rssm_imagine_backward(*static_cast<const RssmImagineBackwardArgs<S>*>(context), team);
  });
}

// Rows of distributions: an exponential or a logarithm takes about the time of so many elements of a scan.
constexpr int64_t kWorkPerExp = 4;

template <typename S>
void philox(const PhiloxArgs<S>& a) {
  over_range(of<S>(kernels()).philox, a, a.T * a.N, 1, a.T * a.N * a.slots * kWorkPerExp);
}
template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>& a) {
  over_range(of<S>(kernels()).categorical_sample, a, a.M, 1, a.M * a.K * kWorkPerExp);
}
template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).categorical_sample_backward, a, a.M, 1, a.M * a.K * kWorkPerExp);
}
template <typename S>
void rssm_enter(const RssmEnterArgs<S>& a) {
  over_range(of<S>(kernels()).rssm_enter, a, a.N, 1, a.N * (a.D + a.groups * a.H));
}
template <typename S>
void rssm_leave(const RssmLeaveArgs<S>& a) {
  over_range(of<S>(kernels()).rssm_leave, a, a.N, 1, a.N * (a.D + a.groups * a.classes * kWorkPerExp));
}
template <typename S>
void kl_balance(const KlBalanceArgs<S>& a) {
  over_range(of<S>(kernels()).kl_balance, a, a.M, 1, 2 * a.M * a.G * a.K * kWorkPerExp);
}
template <typename S>
void kl_balance_backward(const KlBalanceBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).kl_balance_backward, a, a.M, 1, 2 * a.M * a.G * a.K * kWorkPerExp);
}
template <typename S>
void symexp_twohot_loss(const SymexpTwohotLossArgs<S>& a) {
  over_range(of<S>(kernels()).symexp_twohot_loss, a, a.M, 1, a.M * a.B * kWorkPerExp);
}
template <typename S>
void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).symexp_twohot_loss_backward, a, a.M, 1, a.M * a.B * kWorkPerExp);
}
template <typename S>
void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>& a) {
  over_range(of<S>(kernels()).symexp_twohot_mean, a, a.M, 1, a.M * a.B * kWorkPerExp);
}
template <typename S>
void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).symexp_twohot_mean_backward, a, a.M, 1, a.M * a.B * kWorkPerExp);
}
template <typename S>
void pixel_cross_entropy(const PixelCrossEntropyArgs<S>& a) {
  if (a.K < kMaxClasses) check_classes("pixel_cross_entropy", "target", a.target, a.M, 1, a.K);
  over_range(of<S>(kernels()).pixel_cross_entropy, a, a.M, 1, a.M * a.K * kWorkPerExp);
}
template <typename S>
void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<S>& a) {
  if (a.K < kMaxClasses) check_classes("pixel_cross_entropy_backward", "target", a.target, a.M, 1, a.K);
  over_range(of<S>(kernels()).pixel_cross_entropy_backward, a, a.M, 1, a.M * a.K * kWorkPerExp);
}
template <typename S>
void stack_frames(const StackFramesArgs<S>& a) {
  over_range(of<S>(kernels()).stack_frames, a, a.B * a.stack, 1, a.B * a.stack * a.C * a.pixels);
}
template <>
void stack_frames(const StackFramesArgs<uint8_t>& a) {
  const auto copy = [](const StackFramesArgs<uint8_t>& args, int64_t begin, int64_t end) {
    const int64_t size = args.C * args.pixels;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / args.stack, back = (args.stack - 1 - i % args.stack) * args.stride;
      const int64_t row = math::stack_row(args.index[b], args.first[b], back, args.R);
      std::memcpy(args.out + i * size, args.frames + row * size, size);
    }
  };
  over_range<StackFramesArgs<uint8_t>>(copy, a, a.B * a.stack, 1, a.B * a.stack * a.C * a.pixels / 8);
}

void resize_area(const ResizeAreaArgs& a) {
  const int64_t of_rows = std::gcd(a.h, a.h2), of_columns = std::gcd(a.w, a.w2);
  AreaPlan plan{a.h / of_rows, a.h2 / of_rows, a.w / of_columns, a.w2 / of_columns, nullptr, nullptr, 1};
  std::vector<int32_t> place(a.w2);
  for (int64_t j = 0; j < a.w2; ++j) {
    const math::Cover cover(j, plan.columns, plan.columns2);
    place[j] = static_cast<int32_t>(cover.first);
    plan.taps = std::max(plan.taps, cover.last - cover.first + 1);
  }
  std::vector<int32_t> weight(plan.taps * a.w2, 0);
  for (int64_t j = 0; j < a.w2; ++j) {
    const math::Cover cover(j, plan.columns, plan.columns2);
    for (int64_t q = cover.first; q <= cover.last; ++q)
      weight[(q - cover.first) * a.w2 + j] = static_cast<int32_t>(cover.overlap(q, plan.columns2));
  }
  plan.place = place.data();
  plan.weight = weight.data();
  struct Call {
    const ResizeAreaArgs& a;
    const AreaPlan& plan;
  } call{a, plan};
  parallel_for(a.M * a.h2, 1, a.M * a.h * a.w, &call, [](void* context, int64_t begin, int64_t end) {
    const Call& c = *static_cast<Call*>(context);
    kernels().resize_area(c.a, c.plan, begin, end);
  });
}

namespace {

// Numbers the marked cells of [T, N] in blocks, so that one of them is found without looking at all.
class Marks {
 public:
  Marks(const StartMasks& masks, bool beginnings) : masks_(masks), beginnings_(beginnings) {
    for (int64_t begin = 0; begin < cells(); begin += kCells) before_.push_back(before_.back() + mark(begin));
  }
  int64_t count() const { return before_.back(); }
  int64_t cell(int64_t number) {
    const auto after = std::upper_bound(before_.begin(), before_.end(), number);
    const int64_t block = after - before_.begin() - 1, begin = block * kCells;
    mark(begin);
    int64_t i = -1;
    for (int64_t left = number - before_[block]; left >= 0; left -= marks_[i]) ++i;
    return begin + i;
  }

 private:
  static constexpr int64_t kCells = 4096;

  int64_t cells() const { return masks_.T * masks_.N; }
  int64_t mark(int64_t begin) {
    return kernels().mark_starts(masks_, beginnings_, begin, std::min(begin + kCells, cells()), marks_);
  }

  const StartMasks& masks_;
  const bool beginnings_;
  std::vector<int64_t> before_{0};
  uint8_t marks_[kCells];
};

}  // namespace

template <typename S>
void sample_starts(const SampleStartsArgs<S>& a) {
  const auto draw = [&](Marks& marks, int64_t b, int64_t history) {
    const int64_t count = marks.count();
    const int64_t cell = count > 0 ? marks.cell(math::chosen(a.uniform[b], count)) : -1;
    a.row[b] = cell < 0 ? -1 : cell / a.masks.N;
    a.env[b] = cell < 0 ? -1 : cell % a.masks.N;
    a.first[b] = cell < 0 ? -1 : a.row[b] - history;
  };
  if (a.beginning) {
    Marks beginnings(a.masks, true);
    draw(beginnings, 0, 0);
  }
  if (a.B == 1 && a.beginning) return;
  Marks starts(a.masks, false);
  for (int64_t b = a.beginning ? 1 : 0; b < a.B; ++b) draw(starts, b, a.masks.stack - 1);
}
template <typename S>
void gaussian_sample(const GaussianSampleArgs<S>& a) {
  over_range(of<S>(kernels()).gaussian_sample, a, a.P, 64, a.P * kWorkPerExp);
}
template <typename S>
void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).gaussian_sample_backward, a, a.P, 64, a.P * kWorkPerExp);
}
template <typename S>
void gaussian_kl(const GaussianKlArgs<S>& a) {
  over_range(of<S>(kernels()).gaussian_kl, a, a.M, 1, a.M * a.Z * kWorkPerExp);
}
template <typename S>
void gaussian_kl_backward(const GaussianKlBackwardArgs<S>& a) {
  over_range(of<S>(kernels()).gaussian_kl_backward, a, a.M, 1, a.M * a.Z * kWorkPerExp);
}

#define PYWM_INSTANTIATE(S)                                                               \
  template void gae(const GaeArgs<S>&);                                                   \
  template void gae_backward(const GaeBackwardArgs<S>&);                                  \
  template void lambda_return(const LambdaReturnArgs<S>&);                                \
  template void lambda_return_backward(const LambdaReturnBackwardArgs<S>&);               \
  template void discounted_return(const DiscountedReturnArgs<S>&);                        \
  template void discounted_return_backward(const DiscountedReturnBackwardArgs<S>&);       \
  template void vtrace(const VtraceArgs<S>&);                                             \
  template void vtrace_backward(const VtraceBackwardArgs<S>&);                            \
  template void ppo_loss_categorical(const PpoLossCategoricalArgs<S>&);                   \
  template void ppo_loss_gaussian(const PpoLossGaussianArgs<S>&);                         \
  template void mlp(const MlpArgs<S>&);                                                   \
  template void mlp_backward(const MlpBackwardArgs<S>&);                                  \
  template int64_t mlp_workspace<S>(const int64_t*, int64_t);                             \
  template int64_t norm_mlp_workspace<S>(const NormMlpForm&, int64_t);                    \
  template int64_t norm_mlp_backward_workspace<S>(const NormMlpForm&, int64_t);           \
  template void norm_mlp(const NormMlpArgs<S>&);                                          \
  template void norm_mlp_backward(const NormMlpBackwardArgs<S>&);                         \
  template int64_t mlp_backward_workspace<S>(const int64_t*, int64_t);                    \
  template void adam_step(const AdamArgs<S>&);                                            \
  template void laprop_step(const LaPropArgs<S>&);                                        \
  template int64_t rssm_observe_workspace<S>(const RssmForm&, int64_t, bool);             \
  template void rssm_observe(const RssmObserveArgs<S>&);                                  \
  template int64_t rssm_observe_backward_workspace<S>(const RssmForm&, int64_t, int64_t); \
  template void rssm_observe_backward(const RssmObserveBackwardArgs<S>&);                 \
  template int64_t rssm_act_workspace(const RssmActArgs<S>&);                             \
  template void rssm_act(const RssmActArgs<S>&);                                          \
  template int64_t rssm_imagine_workspace(const RssmImagineArgs<S>&);                     \
  template void rssm_imagine(const RssmImagineArgs<S>&);                                  \
  template int64_t rssm_imagine_backward_workspace(const RssmImagineBackwardArgs<S>&);    \
  template void rssm_imagine_backward(const RssmImagineBackwardArgs<S>&);                 \
  template void norm_act(const NormActArgs<S>&);                                          \
  template void norm_act_backward(const NormActBackwardArgs<S>&);                         \
  template void block_gru_gates(const BlockGruGatesArgs<S>&);                             \
  template void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>&);            \
  template void layernorm_gru_gates(const LayernormGruGatesArgs<S>&);                     \
  template void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>&);    \
  template void gru_gates(const GruGatesArgs<S>&);                                        \
  template void gru_gates_backward(const GruGatesBackwardArgs<S>&);                       \
  template void gru_block_reset(const GruBlockResetArgs<S>&);                             \
  template void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>&);            \
  template void gru_block_update(const GruBlockUpdateArgs<S>&);                           \
  template void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>&);          \
  template void one_hot_linear(const OneHotLinearArgs<S>&);                               \
  template void one_hot_linear_backward(const OneHotLinearBackwardArgs<S>&);              \
  template int64_t one_hot_linear_workspace<S>(int64_t, int64_t);                         \
  template void philox(const PhiloxArgs<S>&);                                             \
  template void categorical_sample(const CategoricalSampleArgs<S>&);                      \
  template void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>&);     \
  template void rssm_enter(const RssmEnterArgs<S>&);                                      \
  template void rssm_leave(const RssmLeaveArgs<S>&);                                      \
  template void kl_balance(const KlBalanceArgs<S>&);                                      \
  template void kl_balance_backward(const KlBalanceBackwardArgs<S>&);                     \
  template void symexp_twohot_loss(const SymexpTwohotLossArgs<S>&);                       \
  template void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>&);      \
  template void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>&);                       \
  template void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>&);      \
  template void pixel_cross_entropy(const PixelCrossEntropyArgs<S>&);                     \
  template void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<S>&);    \
  template void stack_frames(const StackFramesArgs<S>&);                                  \
  template void sample_starts(const SampleStartsArgs<S>&);                                \
  template void gaussian_sample(const GaussianSampleArgs<S>&);                            \
  template void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>&);           \
  template void gaussian_kl(const GaussianKlArgs<S>&);                                    \
  template void gaussian_kl_backward(const GaussianKlBackwardArgs<S>&);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cpu
