// The CUDA launchers of csrc/ops.h as C functions, for the emulator: what run_launchers.py calls through ctypes.
//
// Each takes a pointer to the launcher's own struct of arguments and its size, as a check of the Python side's layout,
// and returns 0, or 1 with the reason in emulator_error().
#include <cuda_runtime.h>

#include <exception>
#include <string>

#include "math/philox.h"
#include "ops.h"

namespace {

std::string error;

template <typename Args>
int call(void (*launcher)(const Args&, pywm::Stream), const void* args, size_t bytes) {
  if (bytes != sizeof(Args)) {
    error = "the struct of arguments has " + std::to_string(sizeof(Args)) + " bytes, not " + std::to_string(bytes);
    return 1;
  }
  try {
    launcher(*static_cast<const Args*>(args), nullptr);
  } catch (const std::exception& e) {
    error = e.what();
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" {

const char* emulator_error() { return error.c_str(); }

void emulator_set_schedule(int order, uint64_t seed, int resident_blocks) {
  emulator::set_schedule(static_cast<emulator::Order>(order), seed, resident_blocks);
}

int64_t ppo_loss_workspace(int64_t M, int64_t columns) { return pywm::cuda::ppo_loss_workspace(M, columns); }

int64_t norm_act_workspace(int64_t M, int64_t D) { return pywm::cuda::norm_act_workspace(M, D); }
int64_t laprop_workspace(int64_t P, int64_t segments) { return pywm::cuda::laprop_workspace(P, segments); }

void philox_words(const uint32_t* counter, uint64_t seed, uint32_t* words) {
  const auto made = pywm::math::philox(counter[0], counter[1], counter[2], counter[3], seed);
  for (int i = 0; i < 4; ++i) words[i] = made.word[i];
}

#define EXPORT(op, Args)                                                                                        \
  int op##_f32(const void* args, size_t bytes) { return call<pywm::Args<float>>(pywm::cuda::op, args, bytes); } \
  int op##_f64(const void* args, size_t bytes) { return call<pywm::Args<double>>(pywm::cuda::op, args, bytes); }

EXPORT(gae, GaeArgs)
EXPORT(gae_backward, GaeBackwardArgs)
EXPORT(lambda_return, LambdaReturnArgs)
EXPORT(lambda_return_backward, LambdaReturnBackwardArgs)
EXPORT(discounted_return, DiscountedReturnArgs)
EXPORT(discounted_return_backward, DiscountedReturnBackwardArgs)
EXPORT(ppo_loss_categorical, PpoLossCategoricalArgs)
EXPORT(ppo_loss_gaussian, PpoLossGaussianArgs)
EXPORT(norm_act, NormActArgs)
EXPORT(norm_act_backward, NormActBackwardArgs)
EXPORT(block_gru_gates, BlockGruGatesArgs)
EXPORT(block_gru_gates_backward, BlockGruGatesBackwardArgs)
EXPORT(layernorm_gru_gates, LayernormGruGatesArgs)
EXPORT(layernorm_gru_gates_backward, LayernormGruGatesBackwardArgs)
EXPORT(gru_gates, GruGatesArgs)
EXPORT(gru_gates_backward, GruGatesBackwardArgs)
EXPORT(gru_block_reset, GruBlockResetArgs)
EXPORT(gru_block_reset_backward, GruBlockResetBackwardArgs)
EXPORT(gru_block_update, GruBlockUpdateArgs)
EXPORT(gru_block_update_backward, GruBlockUpdateBackwardArgs)
EXPORT(one_hot_linear, OneHotLinearArgs)
EXPORT(one_hot_linear_backward, OneHotLinearBackwardArgs)
EXPORT(laprop_step, LaPropArgs)
EXPORT(philox, PhiloxArgs)
EXPORT(categorical_sample, CategoricalSampleArgs)
EXPORT(categorical_sample_backward, CategoricalSampleBackwardArgs)
EXPORT(rssm_enter, RssmEnterArgs)
EXPORT(rssm_leave, RssmLeaveArgs)
EXPORT(kl_balance, KlBalanceArgs)
EXPORT(kl_balance_backward, KlBalanceBackwardArgs)
EXPORT(symexp_twohot_loss, SymexpTwohotLossArgs)
EXPORT(symexp_twohot_loss_backward, SymexpTwohotLossBackwardArgs)
EXPORT(symexp_twohot_mean, SymexpTwohotMeanArgs)
EXPORT(symexp_twohot_mean_backward, SymexpTwohotMeanBackwardArgs)
EXPORT(gaussian_sample, GaussianSampleArgs)
EXPORT(gaussian_sample_backward, GaussianSampleBackwardArgs)
EXPORT(gaussian_kl, GaussianKlArgs)
EXPORT(gaussian_kl_backward, GaussianKlBackwardArgs)
EXPORT(pixel_cross_entropy, PixelCrossEntropyArgs)
EXPORT(pixel_cross_entropy_backward, PixelCrossEntropyBackwardArgs)
EXPORT(stack_frames, StackFramesArgs)
EXPORT(sample_starts, SampleStartsArgs)

int stack_frames_bytes(const void* args, size_t bytes) {
  return call<pywm::StackFramesArgs<uint8_t>>(pywm::cuda::stack_frames, args, bytes);
}
int resize_area(const void* args, size_t bytes) {
  return call<pywm::ResizeAreaArgs>(pywm::cuda::resize_area, args, bytes);
}
}
