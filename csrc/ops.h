// Every kernel launcher of the extension, both backends: the table of contents.
//
// Contract, for all functions here:
//   - pointers are to contiguous row-major arrays on the backend's device; sizes are in elements and at least 1
//     (the binding never calls with an empty array); outputs are written in full and alias nothing;
//   - masks are bytes, non-zero is true; `valid` may be null (all rows valid);
//   - a null gradient output is one that nobody wants, and is not written; a null incoming gradient is all zeros;
//   - arguments were checked by the binding; nothing is re-checked here;
//   - the CUDA overloads enqueue on `stream` and return without synchronising; a failed launch throws;
//   - no allocation that outlives the call, no globals, no torch headers.
#pragma once

#include <cstdint>

namespace pywm {

using Stream = void*;  // cudaStream_t, kept opaque so that CPU-only builds need no CUDA headers

// All of [T, N], time-major.
template <typename S>
struct GaeArgs {
  const S *reward, *value, *next_value;
  const uint8_t *terminated, *truncated, *valid;
  S *advantage, *returns;
  int64_t T, N;
  S discount, lam;
};

template <typename S>
struct GaeBackwardArgs {
  const S *grad_advantage, *grad_returns;
  const uint8_t *terminated, *truncated, *valid;
  S *grad_reward, *grad_value, *grad_next_value;
  int64_t T, N;
  S discount, lam;
};

// lam_rows [T, N] stands in for the scalar lam where it is not null.
template <typename S>
struct LambdaReturnArgs {
  const S *reward, *discount, *next_value, *lam_rows;
  const uint8_t* valid;
  S* returns;
  int64_t T, N;
  S lam;
};

template <typename S>
struct LambdaReturnBackwardArgs {
  const S *grad, *discount, *next_value, *returns, *lam_rows;
  const uint8_t* valid;
  S *grad_reward, *grad_discount, *grad_next_value;
  int64_t T, N;
  S lam;
};

// bootstrap [N]
template <typename S>
struct DiscountedReturnArgs {
  const S *reward, *discount, *bootstrap;
  S* returns;
  int64_t T, N;
};

template <typename S>
struct DiscountedReturnBackwardArgs {
  const S *grad, *discount, *bootstrap, *returns;
  S *grad_reward, *grad_discount, *grad_bootstrap;
  int64_t T, N;
};

// y [T, N]: the correction target - value, kept for the backward pass.
template <typename S>
struct VtraceArgs {
  const S *log_ratio, *reward, *discount, *value, *next_value;
  const uint8_t* truncated;
  S *target, *advantage, *y;  // y may be null
  int64_t T, N;
  S lam, rho_clip, c_clip;
};

template <typename S>
struct VtraceBackwardArgs {
  const S *grad_target, *grad_advantage, *log_ratio, *discount, *next_value, *y;
  const uint8_t* truncated;
  S *grad_reward, *grad_discount, *grad_value, *grad_next_value;
  int64_t T, N;
  S lam, rho_clip, c_clip;
};

// PPO's clipped objective over M rows; loss, statistics and gradients in one pass. See pywm/ops/ppo_loss.py.
// Categorical family: logits [M, sum of nvec], action int64 [M, G]; a plain categorical has G = 1.
// Gaussian: mean [M, A], action [M, A], log_std [A] (shared: log_std_rows = 1) or [M, A] (log_std_rows = M).
struct PpoLossOptions {
  double clip, value_clip, value_coef, entropy_coef;  // value_clip < 0: value loss not clipped
  bool normalize_advantage;
};

// stats: policy loss, value loss, entropy, clip fraction, approximate KL. loss [1], stats [5].
template <typename S>
struct PpoLossCommon {
  const S *old_log_prob, *advantage, *value, *returns, *old_value;  // [M]; old_value null unless value_clip >= 0
  const uint8_t* valid;                                             // [M] or null
  S *loss, *stats, *grad_value;                                     // grad_value [M] or null
  double* workspace;  // CUDA only: ppo_loss_workspace(M, ...) doubles of scratch
  int64_t M;
  PpoLossOptions options;
};

// Groups of a categorical family that the kernels keep track of at once; pywm/ops/ppo_loss.py sends more to the
// reference.
constexpr int64_t kMaxGroups = 32;

template <typename S>
struct PpoLossCategoricalArgs {
  PpoLossCommon<S> common;
  const S* logits;
  const int64_t* action;
  const int64_t* nvec;  // [G], host memory
  S* grad_logits;       // or null
  int64_t G, width;     // width = sum of nvec
};

template <typename S>
struct PpoLossGaussianArgs {
  PpoLossCommon<S> common;
  const S *mean, *log_std, *action;
  S *grad_mean, *grad_log_std;  // or null; shapes of mean and log_std
  int64_t A, log_std_rows;
};

enum class Activation { kNone, kTanh, kSilu, kElu, kRelu };

// A multilayer perceptron of L layers: weights[l] [sizes[l+1], sizes[l]], biases[l] [sizes[l+1]]; x [M, sizes[0]].
// hidden: the activations of layers 0 to L-2, [M, width] each, one after another. slopes: the derivatives of layers
// with SiLU, likewise, the output's last; null if no gradient is wanted.
template <typename S>
struct MlpArgs {
  const S* x;
  const S* const* weights;
  const S* const* biases;
  const int64_t* sizes;
  S *y, *hidden, *slopes;
  S* packed;  // scratch: mlp_workspace elements
  int64_t M, L;
  Activation activation, output_activation;
};

// y: the forward's result, not read where output_activation is kNone. grad_weights, grad_biases: null if unwanted.
template <typename S>
struct MlpBackwardArgs {
  const S *grad_y, *x, *y, *hidden, *slopes;
  const S* const* weights;
  const int64_t* sizes;
  S* grad_x;
  S* const* grad_weights;
  S* const* grad_biases;
  S *packed, *grad_z;  // scratch: mlp_backward_workspace elements, and M·(sum of all widths but x's)
  int64_t M, L;
  Activation activation, output_activation;
};

// One step of Adam with a clipped global norm, in place, all of [P]; norm [1]. max_grad_norm < 0 does not clip.
template <typename S>
struct AdamArgs {
  S* param;
  const S* grad;
  S *exp_avg, *exp_avg_sq, *norm;
  int64_t P, step;
  double lr, beta1, beta2, eps, max_grad_norm;
};

// Random numbers by counting, out [T, N, slots]: element (t, n, s) takes word s % 4 of the counter (n, offset + t,
// stream, s / 4), see math/philox.h. Uniform in [0, 1), or standard normal.
template <typename S>
struct PhiloxArgs {
  S* out;
  int64_t T, N, slots;
  uint64_t seed;
  int64_t offset, stream;
  bool normal;
};

constexpr int64_t kMaxClasses = 256;  // that an index of one byte can tell apart
constexpr int64_t kMaxBins = 1023;    // a table of them fits into a CUDA block's shared memory

// M groups of K <= kMaxClasses classes: logits, stoch [M, K]; uniform, index [M].
template <typename S>
struct CategoricalSampleArgs {
  const S *logits, *uniform;
  S* stoch;
  uint8_t* index;
  int64_t M, K;
  double unimix;
};

template <typename S>
struct CategoricalSampleBackwardArgs {
  const S *grad, *logits;
  S* grad_logits;
  int64_t M, K;
  double unimix;
};

// M rows of G groups of K <= kMaxClasses classes: posterior, prior [M, G, K]; outputs [M].
template <typename S>
struct KlBalanceArgs {
  const S *posterior, *prior;
  S *dynamics, *representation, *kl;
  int64_t M, G, K;
  double unimix, free_nats;
};

template <typename S>
struct KlBalanceBackwardArgs {
  const S *grad_dynamics, *grad_representation, *posterior, *prior, *kl;
  S *grad_posterior, *grad_prior;
  int64_t M, G, K;
  double unimix, free_nats;
};

// Two-hot over B bins, symexp of evenly spaced numbers, B odd, 3 <= B <= kMaxBins: logits [M, B], the rest [M].
template <typename S>
struct SymexpTwohotLossArgs {
  const S *logits, *target;
  S* loss;
  int64_t M, B;
};

template <typename S>
struct SymexpTwohotLossBackwardArgs {
  const S *grad, *logits, *target;
  S* grad_logits;
  int64_t M, B;
};

template <typename S>
struct SymexpTwohotMeanArgs {
  const S* logits;
  S* mean;
  int64_t M, B;
};

template <typename S>
struct SymexpTwohotMeanBackwardArgs {
  const S *grad, *logits, *mean;
  S* grad_logits;
  int64_t M, B;
};

// All of [P]. std = softplus(raw_std) + min_std, or with `sigmoid2` 2·sigmoid(raw_std / 2) + min_std.
template <typename S>
struct GaussianSampleArgs {
  const S *mean, *raw_std, *noise;
  S *sample, *std;
  int64_t P;
  S min_std;
  bool sigmoid2;
};

template <typename S>
struct GaussianSampleBackwardArgs {
  const S *grad_sample, *grad_std, *raw_std, *noise;
  S *grad_mean, *grad_raw_std;
  int64_t P;
  bool sigmoid2;
};

// KL(q || p) of diagonal Gaussians, all of [M, Z], summed over Z: kl [M].
template <typename S>
struct GaussianKlArgs {
  const S *mean_q, *std_q, *mean_p, *std_p;
  S* kl;
  int64_t M, Z;
};

template <typename S>
struct GaussianKlBackwardArgs {
  const S *grad, *mean_q, *std_q, *mean_p, *std_p;
  S *grad_mean_q, *grad_std_q, *grad_mean_p, *grad_std_p;
  int64_t M, Z;
};

namespace cpu {

template <typename S>
void gae(const GaeArgs<S>&);
template <typename S>
void gae_backward(const GaeBackwardArgs<S>&);
template <typename S>
void lambda_return(const LambdaReturnArgs<S>&);
template <typename S>
void lambda_return_backward(const LambdaReturnBackwardArgs<S>&);
template <typename S>
void discounted_return(const DiscountedReturnArgs<S>&);
template <typename S>
void discounted_return_backward(const DiscountedReturnBackwardArgs<S>&);
template <typename S>
void vtrace(const VtraceArgs<S>&);
template <typename S>
void vtrace_backward(const VtraceBackwardArgs<S>&);
template <typename S>
void ppo_loss_categorical(const PpoLossCategoricalArgs<S>&);
template <typename S>
void ppo_loss_gaussian(const PpoLossGaussianArgs<S>&);
template <typename S>
void mlp(const MlpArgs<S>&);
template <typename S>
void mlp_backward(const MlpBackwardArgs<S>&);
template <typename S>
int64_t mlp_workspace(const int64_t* sizes, int64_t L);
template <typename S>
int64_t mlp_backward_workspace(const int64_t* sizes, int64_t L);
template <typename S>
void adam_step(const AdamArgs<S>&);
template <typename S>
void philox(const PhiloxArgs<S>&);
template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>&);
template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>&);
template <typename S>
void kl_balance(const KlBalanceArgs<S>&);
template <typename S>
void kl_balance_backward(const KlBalanceBackwardArgs<S>&);
template <typename S>
void symexp_twohot_loss(const SymexpTwohotLossArgs<S>&);
template <typename S>
void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>&);
template <typename S>
void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>&);
template <typename S>
void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>&);
template <typename S>
void gaussian_sample(const GaussianSampleArgs<S>&);
template <typename S>
void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>&);
template <typename S>
void gaussian_kl(const GaussianKlArgs<S>&);
template <typename S>
void gaussian_kl_backward(const GaussianKlBackwardArgs<S>&);

}  // namespace cpu

namespace cuda {

template <typename S>
void gae(const GaeArgs<S>&, Stream);
template <typename S>
void gae_backward(const GaeBackwardArgs<S>&, Stream);
template <typename S>
void lambda_return(const LambdaReturnArgs<S>&, Stream);
template <typename S>
void lambda_return_backward(const LambdaReturnBackwardArgs<S>&, Stream);
template <typename S>
void discounted_return(const DiscountedReturnArgs<S>&, Stream);
template <typename S>
void discounted_return_backward(const DiscountedReturnBackwardArgs<S>&, Stream);
template <typename S>
void ppo_loss_categorical(const PpoLossCategoricalArgs<S>&, Stream);
template <typename S>
void ppo_loss_gaussian(const PpoLossGaussianArgs<S>&, Stream);
// Doubles of scratch that a call needs: M rows, `columns` of log_std whose gradient is summed over rows (else 0).
int64_t ppo_loss_workspace(int64_t M, int64_t columns);
template <typename S>
void philox(const PhiloxArgs<S>&, Stream);
template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>&, Stream);
template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>&, Stream);
template <typename S>
void kl_balance(const KlBalanceArgs<S>&, Stream);
template <typename S>
void kl_balance_backward(const KlBalanceBackwardArgs<S>&, Stream);
template <typename S>
void symexp_twohot_loss(const SymexpTwohotLossArgs<S>&, Stream);
template <typename S>
void symexp_twohot_loss_backward(const SymexpTwohotLossBackwardArgs<S>&, Stream);
template <typename S>
void symexp_twohot_mean(const SymexpTwohotMeanArgs<S>&, Stream);
template <typename S>
void symexp_twohot_mean_backward(const SymexpTwohotMeanBackwardArgs<S>&, Stream);
template <typename S>
void gaussian_sample(const GaussianSampleArgs<S>&, Stream);
template <typename S>
void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>&, Stream);
template <typename S>
void gaussian_kl(const GaussianKlArgs<S>&, Stream);
template <typename S>
void gaussian_kl_backward(const GaussianKlBackwardArgs<S>&, Stream);

int device_count();
const char* status();  // why device_count() is 0, or "no error"
int current_device();
void set_device(int device);

}  // namespace cuda

}  // namespace pywm
