// The table of CPU kernels that dispatch.cpp chooses once at load. Every kernel source is compiled once for each
// instruction set, inside the namespace PYWM_ISA, and works on a range of independent items: columns of a scan, rows of
// a loss. Kernel sources include nothing that emits shared inline functions (no <vector>, <algorithm>, <string>):
// the linker would be free to keep the copy compiled for the larger instruction set.
#pragma once

#include <cstdint>

#include "../math/adam.h"
#include "../math/laprop.h"
#include "../ops.h"
#include "parallel.h"

namespace pywm::cpu {

// Sums that every range of rows of a PPO loss contributes.
struct PpoSums {
  double policy = 0, value = 0, entropy = 0, clipped = 0, kl = 0;
  int64_t bad_row = -1;  // the first row whose action is not a class
  int64_t bad_action = 0, bad_classes = 0;
};

// What the loss needs to know of all rows before it looks at one.
struct PpoMoments {
  double mean, scale;  // advantages are used as (advantage - mean)·scale
  double inverse_count;
};

constexpr int64_t kMlpRows = 48;  // rows that go through an MLP together; a multiple of every tile's rows

// The gradients of a normalisation's scale and shift: sum [n] := the sum of `blocks` arrays, `stride` elements apart.
template <typename S>
struct NormBlocks {
  const S* partial;
  S* sum;
  int64_t blocks, stride;
};

// Sizes by their common divisors, rows to rows2 and columns to columns2; and what each of w2 columns adds up: weight
// [taps, w2] of the pixels from `place` on, 0 behind the last.
struct AreaPlan {
  int64_t rows, rows2, columns, columns2;
  const int32_t *place, *weight;
  int64_t taps;
};

constexpr int64_t kOneHotPanel = 64;  // outputs whose weights are packed together

template <typename S>
struct KernelsOf {
  void (*gae)(const GaeArgs<S>&, int64_t begin, int64_t end);
  void (*gae_backward)(const GaeBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*lambda_return)(const LambdaReturnArgs<S>&, int64_t begin, int64_t end);
  void (*lambda_return_backward)(const LambdaReturnBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*discounted_return)(const DiscountedReturnArgs<S>&, int64_t begin, int64_t end);
  void (*discounted_return_backward)(const DiscountedReturnBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*vtrace)(const VtraceArgs<S>&, int64_t begin, int64_t end);
  void (*vtrace_backward)(const VtraceBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*ppo_loss_categorical)(const PpoLossCategoricalArgs<S>&, const PpoMoments&, int64_t begin, int64_t end,
                               PpoSums&);
  // shared_grad_log_std [A] is added to; null unless log_std is shared by all rows and its gradient wanted.
  void (*ppo_loss_gaussian)(const PpoLossGaussianArgs<S>&, const PpoMoments&, int64_t begin, int64_t end, PpoSums&,
                            double* shared_grad_log_std);
  int64_t tile_columns;  // of a panel of a packed matrix, see gemm.h
  // Ranges of panels of all layers together, of rows, and of panels plus one bias a layer.
  void (*mlp_pack)(const MlpArgs<S>&, int64_t begin, int64_t end);
  void (*mlp)(const MlpArgs<S>&, int64_t begin, int64_t end);
  void (*mlp_backward_pack)(const MlpBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*mlp_backward)(const MlpBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*mlp_backward_weights)(const MlpBackwardArgs<S>&, int64_t begin, int64_t end);
  int64_t (*norm_mlp_workspace)(const NormMlpForm&, int64_t members);
  void (*norm_mlp)(const NormMlpArgs<S>&, const Team&);
  int64_t (*norm_mlp_backward_workspace)(const NormMlpForm&, int64_t members);
  void (*norm_mlp_backward)(const NormMlpBackwardArgs<S>&, const Team&);
  int64_t (*rssm_observe_workspace)(const RssmForm&, int64_t N, bool keep);
  void (*rssm_observe)(const RssmObserveArgs<S>&, const Team&);
  int64_t (*rssm_observe_backward_workspace)(const RssmForm&, int64_t N, int64_t members);
  void (*rssm_observe_backward)(const RssmObserveBackwardArgs<S>&, const Team&);
  int64_t (*rssm_act_workspace)(const RssmActArgs<S>&);
  void (*rssm_act)(const RssmActArgs<S>&, const Team&);
  int64_t (*rssm_imagine_workspace)(const RssmImagineArgs<S>&);
  void (*rssm_imagine)(const RssmImagineArgs<S>&, const Team&);
  int64_t (*rssm_imagine_backward_workspace)(const RssmImagineBackwardArgs<S>&);
  void (*rssm_imagine_backward)(const RssmImagineBackwardArgs<S>&, const Team&);
  // Ranges of rows, of rows, and of elements; `partial` is the scratch of the range, null if no sums are wanted.
  void (*norm_act)(const NormActArgs<S>&, int64_t begin, int64_t end);
  void (*norm_act_backward)(const NormActBackwardArgs<S>&, int64_t begin, int64_t end, S* partial);
  void (*norm_add_blocks)(const NormBlocks<S>&, int64_t begin, int64_t end);
  void (*block_gru_gates)(const BlockGruGatesArgs<S>&, int64_t begin, int64_t end);
  void (*block_gru_gates_backward)(const BlockGruGatesBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*layernorm_gru_gates)(const LayernormGruGatesArgs<S>&, int64_t begin, int64_t end);
  void (*layernorm_gru_gates_backward)(const LayernormGruGatesBackwardArgs<S>&, int64_t begin, int64_t end, S* partial);
  void (*gru_gates)(const GruGatesArgs<S>&, int64_t begin, int64_t end);
  void (*gru_gates_backward)(const GruGatesBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*gru_block_reset)(const GruBlockResetArgs<S>&, int64_t begin, int64_t end);
  void (*gru_block_reset_backward)(const GruBlockResetBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*gru_block_update)(const GruBlockUpdateArgs<S>&, int64_t begin, int64_t end);
  void (*gru_block_update_backward)(const GruBlockUpdateBackwardArgs<S>&, int64_t begin, int64_t end);
  // Ranges of panels, of rows, of outputs, and of groups plus one bias of all panels.
  void (*one_hot_linear_pack)(const OneHotLinearArgs<S>&, int64_t begin, int64_t end);
  void (*one_hot_linear)(const OneHotLinearArgs<S>&, int64_t begin, int64_t end);
  void (*one_hot_linear_few)(const OneHotLinearArgs<S>&, int64_t begin, int64_t end);
  void (*one_hot_linear_backward)(const OneHotLinearBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*philox)(const PhiloxArgs<S>&, int64_t begin, int64_t end);
  void (*categorical_sample)(const CategoricalSampleArgs<S>&, int64_t begin, int64_t end);
  void (*categorical_sample_backward)(const CategoricalSampleBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*rssm_enter)(const RssmEnterArgs<S>&, int64_t begin, int64_t end);
  void (*rssm_leave)(const RssmLeaveArgs<S>&, int64_t begin, int64_t end);
  void (*kl_balance)(const KlBalanceArgs<S>&, int64_t begin, int64_t end);
  void (*kl_balance_backward)(const KlBalanceBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*symexp_twohot_loss)(const SymexpTwohotLossArgs<S>&, int64_t begin, int64_t end);
  void (*symexp_twohot_loss_backward)(const SymexpTwohotLossBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*symexp_twohot_mean)(const SymexpTwohotMeanArgs<S>&, int64_t begin, int64_t end);
  void (*symexp_twohot_mean_backward)(const SymexpTwohotMeanBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*pixel_cross_entropy)(const PixelCrossEntropyArgs<S>&, int64_t begin, int64_t end);
  void (*pixel_cross_entropy_backward)(const PixelCrossEntropyBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*stack_frames)(const StackFramesArgs<S>&, int64_t begin, int64_t end);
  void (*gaussian_sample)(const GaussianSampleArgs<S>&, int64_t begin, int64_t end);
  void (*gaussian_sample_backward)(const GaussianSampleBackwardArgs<S>&, int64_t begin, int64_t end);
  void (*gaussian_kl)(const GaussianKlArgs<S>&, int64_t begin, int64_t end);
  void (*gaussian_kl_backward)(const GaussianKlBackwardArgs<S>&, int64_t begin, int64_t end);
  double (*sum_of_squares)(const S* x, int64_t n);
  void (*adam_update)(const AdamArgs<S>&, const math::AdamFactors<S>&, int64_t begin, int64_t end);
  void (*laprop_update)(const LaPropArgs<S>&, const math::LaPropFactors<S>&, double grad_scale, int64_t begin,
                        int64_t end);
};

struct Kernels {
  const char* name;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  void (*resize_area)(const ResizeAreaArgs&, const AreaPlan&, int64_t begin, int64_t end);
  int64_t (*mark_starts)(const StartMasks&, bool beginnings, int64_t begin, int64_t end, uint8_t* marks);
};

template <typename S>
const KernelsOf<S>& of(const Kernels& kernels);
template <>
inline const KernelsOf<float>& of(const Kernels& kernels) {
  return kernels.f32;
}
template <>
inline const KernelsOf<double>& of(const Kernels& kernels) {
  return kernels.f64;
}

const Kernels& kernels();      // chosen at load; PYWM_CPU_ISA overrides; an unusable name throws
const char* available_isas();  // space-separated names that this machine can run

}  // namespace pywm::cpu
