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

#include "macros.h"

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

// A perceptron of L layers: weights[l] [sizes[l + 1], sizes[l]], biases[l] [sizes[l + 1]]; behind each of the first
// `norms`, L or L - 1, a root mean square norm with scales[l] [sizes[l + 1]], and SiLU. Of M rows. The first layer
// takes inputs() numbers, then `groups` one-hot vectors of `classes`, which may be none. See pywm/ops/norm_mlp.py.
struct NormMlpForm {
  const int64_t* sizes;
  int64_t M, L, norms, groups, classes;
  int64_t inputs() const { return sizes[0] - groups * classes; }
};
constexpr int64_t kMostNormMlpLayers = 16;

// x [M, inputs()], index [M, groups] or null. hidden: z of the layers with a norm, [M, width] one after another, or
// null.
template <typename S>
struct NormMlpArgs {
  NormMlpForm form;
  const S* x;
  const uint8_t* index;
  const S* const* weights;
  const S* const* biases;
  const S* const* scales;
  S *y, *hidden;
  S* scratch;  // norm_mlp_workspace elements
  int64_t members;
  S eps;
};

// grad_x may be null; so may the gradients of the parameters, all together.
template <typename S>
struct NormMlpBackwardArgs {
  NormMlpForm form;
  const S *grad_y, *x;
  const uint8_t* index;
  const S* hidden;
  const S* const* weights;
  const S* const* scales;
  S* grad_x;
  S* const* grad_weights;
  S* const* grad_biases;
  S* const* grad_scales;
  S* scratch;  // norm_mlp_backward_workspace elements
  int64_t members;
  S eps;
};

// Rows of D numbers, normalised (RMS, or LayerNorm with `layer`), scaled, shifted (shift may be null) and activated.
// scale, shift [turns, D]: row m has number m % turns, so that layers side by side are one call. See
// pywm/ops/norm_act.py.
template <typename S>
struct NormActArgs {
  const S *x, *scale, *shift;
  S* y;
  int64_t M, D;
  S eps;
  Activation activation;
  bool layer;
  int64_t turns = 1;
};

template <typename S>
struct NormActBackwardArgs {
  const S *grad, *x, *scale, *shift;
  S *grad_x, *grad_scale, *grad_shift;
  S* partial;  // scratch: norm_act_workspace(M, D) elements; null if neither scale's nor shift's gradient is wanted
  int64_t M, D;
  S eps;
  Activation activation;
  bool layer;
  int64_t turns = 1;  // only 1 where scale's or shift's gradient is wanted
};

// Gates of recurrent cells, M rows of D. See pywm/ops/gru_gates.py. gates [M, 3D]: reset, candidate, update. A block of
// a block-diagonal cell is a row here.
template <typename S>
struct BlockGruGatesArgs {
  const S *gates, *deter;
  S* y;
  int64_t M, D;
};

template <typename S>
struct BlockGruGatesBackwardArgs {
  const S *grad, *gates, *deter;
  S *grad_gates, *grad_deter;
  int64_t M, D;
};

// pre [M, 3D], normalised over all 3D before it is split; scale, shift [3D].
template <typename S>
struct LayernormGruGatesArgs {
  const S *pre, *scale, *shift, *deter;
  S* y;
  int64_t M, D;
  S eps;
};

template <typename S>
struct LayernormGruGatesBackwardArgs {
  const S *grad, *pre, *scale, *shift, *deter;
  S *grad_pre, *grad_scale, *grad_shift, *grad_deter;
  S* partial;  // scratch: norm_act_workspace(M, 3D) elements; null if neither scale's nor shift's gradient is wanted
  int64_t M, D;
  S eps;
};

// input, hidden [M, 3D]: reset, keep, candidate.
template <typename S>
struct GruGatesArgs {
  const S *input, *hidden, *deter;
  S* y;
  int64_t M, D;
};

template <typename S>
struct GruGatesBackwardArgs {
  const S *grad, *input, *hidden, *deter;
  S *grad_input, *grad_hidden, *grad_deter;
  int64_t M, D;
};

// gates [M, 2D]: reset, update; candidate [M, D].
template <typename S>
struct GruBlockResetArgs {
  const S *gates, *deter;
  S* y;
  int64_t M, D;
};

template <typename S>
struct GruBlockResetBackwardArgs {
  const S *grad, *gates, *deter;
  S *grad_gates, *grad_deter;
  int64_t M, D;
};

template <typename S>
struct GruBlockUpdateArgs {
  const S *gates, *candidate, *deter;
  S* y;
  int64_t M, D;
};

template <typename S>
struct GruBlockUpdateBackwardArgs {
  const S *grad, *gates, *candidate, *deter;
  S *grad_gates, *grad_candidate, *grad_deter;
  int64_t M, D;
};

// y[m] = bias + the sum over s of column s·K + index[m, s] of weight [U, groups·classes]; index [M, groups], bias [U]
// or null. See pywm/ops/one_hot_linear.py.
template <typename S>
struct OneHotLinearArgs {
  const S *weight, *bias;
  const uint8_t* index;
  S* y;
  S* packed;  // CPU only, scratch: one_hot_linear_workspace elements
  int64_t M, U, groups, classes;
};

template <typename S>
struct OneHotLinearBackwardArgs {
  const S* grad;
  const uint8_t* index;
  S *grad_weight, *grad_bias;
  S* packed;  // CPU only, scratch: one_hot_linear_workspace elements
  int64_t M, U, groups, classes;
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

// One step of LaProp with adaptive gradient clipping, in place, all of [P]; norm [1]. Tensor s of the network lies in
// [offsets[s], offsets[s + 1]), offsets [segments + 1] ascending from 0 to P. clip < 0 does not clip. `slow`
// [followed], or null, follows the last parameters; `rounded` [P], or null, gets all of them as bfloat16 numbers.
template <typename S>
struct LaPropArgs {
  S* param;
  const S* grad;
  S *exp_avg, *exp_avg_sq, *norm, *slow;
  uint16_t* rounded;
  const int64_t* offsets;
  double* workspace;  // CUDA only, scratch: laprop_workspace elements
  int64_t P, segments, step, followed;
  double lr, beta1, beta2, eps, clip, min_norm, slow_rate;
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
  const S *logits, *target, *other;  // other: a second target, or null
  S* loss;
  int64_t M, B;
  S other_scale;
};

template <typename S>
struct SymexpTwohotLossBackwardArgs {
  const S *grad, *logits, *target, *other;
  S* grad_logits;
  int64_t M, B;
  S other_scale;
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

// Rows of K <= kMaxClasses logits [M, K], whose classes are bytes: target, loss [M]. loss = max(0, CE - cutoff).
template <typename S>
struct PixelCrossEntropyArgs {
  const S* logits;
  const uint8_t* target;
  S* loss;
  int64_t M, K;
  S cutoff;
};

template <typename S>
struct PixelCrossEntropyBackwardArgs {
  const S *grad, *logits, *loss;
  const uint8_t* target;
  S* grad_logits;
  int64_t M, K;
  S cutoff;
};

// Stacks out of frames [R, C, pixels]: out, and noise, which may be null, [B, stack, C, pixels]; index, first [B]. S
// may be uint8_t, for the bytes as they are: no noise, not standardised.
template <typename S>
struct StackFramesArgs {
  const uint8_t* frames;
  const int64_t *index, *first;
  const S* noise;
  S* out;
  int64_t R, B, C, pixels, stack, stride;
  double scale;
  bool standardize;
};

constexpr int64_t kMaxSide = 32767;  // pixels of a picture's side

// frames [M, h, w], out [M, h2, w2], h2 <= h and w2 <= w.
struct ResizeAreaArgs {
  const uint8_t* frames;
  uint8_t* out;
  int64_t M, h, w, h2, w2;
};

// Of rows [T, N]; is_last and valid may be null.
struct StartMasks {
  const uint8_t *is_first, *is_last, *valid;
  int64_t T, N, stack;
};

// uniform, row, env, first [B]. `beginning`: the first of them begins an episode. -1 where there is nothing to draw.
template <typename S>
struct SampleStartsArgs {
  StartMasks masks;
  const S* uniform;
  int64_t *row, *env, *first;
  int64_t B;
  bool beginning;
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

// What a step of a scan begins with, N rows: h [N, D] = deter, zeroed where is_first; u (rows `u_stride` apart) = add
// [N, H] (rows `add_stride` apart, 0 for one row for all) + stoch_in's product with the sample before, also zeroed
// there: the sum of the rows of `packed` [groups·classes, H] that index [N, groups] chooses, or stoch_proj [N, H]
// where that is not null.
template <typename S>
struct RssmEnterArgs {
  const S *deter, *add, *stoch_proj, *packed;
  const uint8_t* index;
  const bool* is_first;
  S *h, *u;
  int64_t N, D, H, groups, classes, add_stride, u_stride;
};

// What a step of the reverse scan begins with: grad_logits [N, groups, classes] = what comes from outside (or null) +
// the straight-through gradient of the sample's, which is the sum of that from outside (or null) and that of the step
// behind; grad_h [N, D] = likewise. The step behind sends nothing (null, or where its is_first is set).
template <typename S>
struct RssmLeaveArgs {
  const S *logits, *outer_logits, *outer_stoch, *outer_deter, *carry_stoch, *carry_deter;
  const bool* is_first_behind;
  S *grad_logits, *grad_h;
  int64_t N, D, groups, classes;
  double unimix;
};

enum class RssmCell { kBlockGru, kLayerNormGru, kGru, kGruBlock };
enum class Norm { kNone, kRms, kLayer };

// The form of a recurrent state-space model, and its sizes: deter D, hidden layers H, stoch `groups` of `classes`
// (Gaussian: classes is 0), blocks of the block-diagonal layers.
struct RssmForm {
  RssmCell cell;
  Norm norm;              // of the hidden layers
  Activation activation;  // likewise
  int64_t D, H, groups, classes, blocks;
  double unimix, eps, cell_eps, min_std;
  bool sigmoid_std;  // std = 2·sigmoid(x / 2) + min_std instead of softplus(x) + min_std
  bool bfloat16;     // the operands of a scan's products are rounded to it; float only

  PYWM_HD bool gaussian() const { return classes == 0; }
  PYWM_HD int64_t stoch() const { return gaussian() ? groups : groups * classes; }      // width of a sample
  PYWM_HD int64_t stats() const { return gaussian() ? 2 * groups : groups * classes; }  // and of what it is drawn from
};

// weight [out, in], `ld` elements a row; null where a layer has none of the others.
template <typename S>
struct RssmLayer {
  const S* weight;
  int64_t ld;
  const S *bias, *scale, *shift;
};

// What a step of the scan reads; the hidden layers of the cell take x = [deter_in, stoch_in] (block_gru) or stoch_in.
//   block_gru      hidden [G, D/G, D/G + 2H ..], its bias in action_proj; gates [G, 3D/G, D/G]
//   layernorm_gru  gates [3D, H + D] with scale and shift
//   gru            gates [3D, H] of x, candidate [3D, D] of deter, both with bias
//   gru_block      gates [2D, H + D], candidate [D, H + D]
template <typename S>
struct RssmWeights {
  RssmLayer<S> deter_in, stoch_in, hidden, gates, candidate, head, out;
};

// One window of T rows for N sequences. What does not depend on the recurrence comes in as products:
// token_proj [T, N, H] = embed·W + b of the head, action_proj [T, N, D] (block_gru: into `hidden`) or [T, N, H] (into
// stoch_in), stoch_proj [N, H] = the initial stoch times stoch_in. noise [T, N, groups]: uniforms, or normals.
// Kept for the backward pass, or null: u [T, N, 2H or H], the pre-activations of x; cell1, cell2: those of the cell
// (block_gru: hidden [D] and gates [3D]; layernorm_gru: gates [3D]; gru: gates and candidate [3D]; gru_block: [2D] and
// [D]); o [T, N, H] of the head.
template <typename S>
struct RssmObserveArgs {
  RssmForm form;
  RssmWeights<S> w;
  const S *token_proj, *action_proj, *deter0, *stoch_proj, *noise;
  const uint8_t *is_first, *force_index;
  const uint8_t* action_class;  // [T, N]: which row of action_proj is each step's; null: they have theirs, [T, N, ...]
  const S* force_stoch;
  S *deter, *stats, *stoch;
  uint8_t* index;
  S *u, *cell1, *cell2, *o;
  S* scratch;  // rssm_observe_workspace elements
  int64_t T, N;
};

// Gradients that come in: of deter, stats, stoch (null: zero). Out: of the initial deter [N, D] and of stoch_proj
// [N, H], and of every pre-activation as named above. The inputs of the products come along: x [T, N, 2H or H],
// y [T, N, D] (block_gru: of gates; gru_block: reset deter, of the candidate), head [T, N, H].
// norms: gradients of all scales and shifts, one after another: deter_in, stoch_in, hidden or gates, head.
template <typename S>
struct RssmObserveBackwardArgs {
  RssmForm form;
  RssmWeights<S> w;
  const S *grad_deter, *grad_stats, *grad_stoch;
  const S *deter0, *deter, *stats, *noise;
  const uint8_t* is_first;
  const S *u, *cell1, *cell2, *o;
  S *grad_deter0, *grad_stoch_proj, *grad_stats_total, *grad_o, *grad_cell1, *grad_cell2, *grad_u;
  S *x, *y, *head, *norms;
  S* scratch;             // rssm_observe_backward_workspace elements
  int64_t T, N, members;  // members: threads that the workspace is for
};

// How a policy's outputs become an action: classes one-hot, each group by inverse CDF with a share of the uniform
// distribution mixed in; a normal with tanh mean and std between bounds (DreamerV3); or tanh of a normal (V1).
enum class PolicyKind { kCategorical, kNormal, kTanhNormal };

template <typename S>
struct PolicyNetwork {
  const RssmLayer<S>* layers;  // hidden ones [U, D + stoch], [U, U] ..., then the output
  int64_t count, U, outputs;
  Norm norm;
  Activation activation;
  double eps;
  PolicyKind kind;
  const int64_t* classes;  // of each group, `groups` of them
  int64_t groups;
  double unimix, min_std, max_std;
};

// Imagination from N starts: deter [H+1, N, D], stoch and index likewise, whose row 0 the caller has filled;
// action [H, N, A], prior [H, N, stats], policy_stats [H, N, outputs]. stoch_proj [N, H] and policy_proj [N, U]: the
// initial stoch times stoch_in and the policy's first layer. noise [H, N, groups], action_noise [H, N, A or groups].
// Kept for the backward pass, or null: policy_pre [hidden layers of the policy, H, N, U], their pre-activations.
template <typename S>
struct RssmImagineArgs {
  RssmForm form;
  RssmWeights<S> w;  // no head
  RssmLayer<S> action_in;
  const RssmLayer<S>* prior;
  int64_t prior_layers;
  PolicyNetwork<S> policy;
  const S *stoch_proj, *policy_proj, *noise, *action_noise;
  const uint8_t* force_index;
  const S *force_stoch, *force_action;
  S *deter, *stoch, *action, *prior_stats, *policy_stats;
  uint8_t* index;
  S* policy_pre;
  S* scratch;  // rssm_imagine_workspace elements
  int64_t horizon, N, A, members;
};

// Gradients that come in: of deter and stoch [H+1, N, ...] and of the prior's statistics [H, N, stats] (null: zero).
// The states of RssmImagineArgs come along, and what does not depend on the recurrence: action_proj [H, N, D]
// (block_gru: into `hidden`, with its bias) or [H, N, H] (into stoch_in), stoch_proj [N, H]. noise [H, N, groups]: of
// Gaussian latents. Out: the gradients of the start, and of every pre-activation as in RssmObserveBackwardArgs; those
// of the prior's hidden layers, grad_prior [prior_layers - 1, H, N, H], and what they give, prior_x. norms: deter_in,
// stoch_in, hidden or gates, the prior's hidden layers.
template <typename S>
struct RssmImagineBackwardArgs {
  RssmForm form;
  RssmWeights<S> w;  // no head
  const RssmLayer<S>* prior;
  int64_t prior_layers;
  const S *grad_deter, *grad_stoch, *grad_stats;
  const S *action_proj, *stoch_proj, *deter, *stoch, *stats, *noise;
  const uint8_t* index;
  S *grad_deter0, *grad_stoch0, *grad_stats_total, *grad_prior, *grad_cell1, *grad_cell2, *grad_u;
  S *x, *y, *prior_x, *norms;
  S* scratch;  // rssm_imagine_backward_workspace elements
  int64_t horizon, N, members;
};

// One step for N states: the posterior's head if `embed` [N, E] is there, else the prior's, `head_layers` of which the
// last gives the logits. The sample before: floats [N, stoch] or stoch_index [N, groups]. is_first and force_index may
// be null; noise [N, groups] is read where nothing is forced.
template <typename S>
struct RssmActArgs {
  RssmForm form;
  RssmWeights<S> w;  // no head; the bias of `hidden` is read
  RssmLayer<S> action_in;
  const RssmLayer<S>* head;
  int64_t head_layers;
  const S *deter, *stoch, *action, *embed, *noise;
  const uint8_t *stoch_index, *is_first, *force_index;
  S *deter_out, *stats, *stoch_out;
  uint8_t* index;
  S* scratch;  // rssm_act_workspace elements
  int64_t N, A, E, members;
};

// About the multiply-adds of one step of N states.
inline int64_t rssm_act_work(const RssmForm& f, int64_t N) { return N * (f.D / f.blocks * f.D * 4 + 3 * f.H * f.D); }

namespace cpu {

template <typename S>
int64_t rssm_act_workspace(const RssmActArgs<S>&);
template <typename S>
void rssm_act(const RssmActArgs<S>&);
template <typename S>
int64_t rssm_imagine_workspace(const RssmImagineArgs<S>&);
template <typename S>
void rssm_imagine(const RssmImagineArgs<S>&);
template <typename S>
int64_t rssm_imagine_backward_workspace(const RssmImagineBackwardArgs<S>&);
template <typename S>
void rssm_imagine_backward(const RssmImagineBackwardArgs<S>&);
template <typename S>
int64_t rssm_observe_workspace(const RssmForm& form, int64_t N, bool keep);
template <typename S>
void rssm_observe(const RssmObserveArgs<S>&);
template <typename S>
int64_t rssm_observe_backward_workspace(const RssmForm& form, int64_t N, int64_t members);
template <typename S>
void rssm_observe_backward(const RssmObserveBackwardArgs<S>&);

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
void norm_mlp(const NormMlpArgs<S>&);
template <typename S>
void norm_mlp_backward(const NormMlpBackwardArgs<S>&);
int64_t norm_mlp_members(const NormMlpForm&);  // threads that it is worth
template <typename S>
int64_t norm_mlp_workspace(const NormMlpForm&, int64_t members);
template <typename S>
int64_t norm_mlp_backward_workspace(const NormMlpForm&, int64_t members);
template <typename S>
int64_t mlp_workspace(const int64_t* sizes, int64_t L);
template <typename S>
int64_t mlp_backward_workspace(const int64_t* sizes, int64_t L);
template <typename S>
void norm_act(const NormActArgs<S>&);
template <typename S>
void norm_act_backward(const NormActBackwardArgs<S>&);
template <typename S>
void block_gru_gates(const BlockGruGatesArgs<S>&);
template <typename S>
void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>&);
template <typename S>
void layernorm_gru_gates(const LayernormGruGatesArgs<S>&);
template <typename S>
void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>&);
template <typename S>
void gru_gates(const GruGatesArgs<S>&);
template <typename S>
void gru_gates_backward(const GruGatesBackwardArgs<S>&);
template <typename S>
void gru_block_reset(const GruBlockResetArgs<S>&);
template <typename S>
void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>&);
template <typename S>
void gru_block_update(const GruBlockUpdateArgs<S>&);
template <typename S>
void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>&);
template <typename S>
void one_hot_linear(const OneHotLinearArgs<S>&);
template <typename S>
void one_hot_linear_backward(const OneHotLinearBackwardArgs<S>&);
// Elements of scratch.
int64_t norm_act_workspace(int64_t M, int64_t D);
template <typename S>
int64_t one_hot_linear_workspace(int64_t U, int64_t columns);
template <typename S>
void adam_step(const AdamArgs<S>&);
template <typename S>
void laprop_step(const LaPropArgs<S>&);
template <typename S>
void philox(const PhiloxArgs<S>&);
template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>&);
template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>&);
template <typename S>
void rssm_enter(const RssmEnterArgs<S>&);
template <typename S>
void rssm_leave(const RssmLeaveArgs<S>&);
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
void pixel_cross_entropy(const PixelCrossEntropyArgs<S>&);
template <typename S>
void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<S>&);
template <typename S>
void stack_frames(const StackFramesArgs<S>&);
void resize_area(const ResizeAreaArgs&);
template <typename S>
void sample_starts(const SampleStartsArgs<S>&);
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
void laprop_step(const LaPropArgs<S>&, Stream);
int64_t laprop_workspace(int64_t P, int64_t segments);
template <typename S>
void philox(const PhiloxArgs<S>&, Stream);
template <typename S>
void categorical_sample(const CategoricalSampleArgs<S>&, Stream);
template <typename S>
void categorical_sample_backward(const CategoricalSampleBackwardArgs<S>&, Stream);
template <typename S>
void rssm_enter(const RssmEnterArgs<S>&, Stream);
template <typename S>
void rssm_leave(const RssmLeaveArgs<S>&, Stream);
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
void pixel_cross_entropy(const PixelCrossEntropyArgs<S>&, Stream);
template <typename S>
void pixel_cross_entropy_backward(const PixelCrossEntropyBackwardArgs<S>&, Stream);
template <typename S>
void stack_frames(const StackFramesArgs<S>&, Stream);
void resize_area(const ResizeAreaArgs&, Stream);
template <typename S>
void sample_starts(const SampleStartsArgs<S>&, Stream);
template <typename S>
void gaussian_sample(const GaussianSampleArgs<S>&, Stream);
template <typename S>
void gaussian_sample_backward(const GaussianSampleBackwardArgs<S>&, Stream);
template <typename S>
void gaussian_kl(const GaussianKlArgs<S>&, Stream);
template <typename S>
void gaussian_kl_backward(const GaussianKlBackwardArgs<S>&, Stream);
template <typename S>
void norm_act(const NormActArgs<S>&, Stream);
template <typename S>
void norm_act_backward(const NormActBackwardArgs<S>&, Stream);
template <typename S>
void block_gru_gates(const BlockGruGatesArgs<S>&, Stream);
template <typename S>
void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>&, Stream);
template <typename S>
void layernorm_gru_gates(const LayernormGruGatesArgs<S>&, Stream);
template <typename S>
void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>&, Stream);
template <typename S>
void gru_gates(const GruGatesArgs<S>&, Stream);
template <typename S>
void gru_gates_backward(const GruGatesBackwardArgs<S>&, Stream);
template <typename S>
void gru_block_reset(const GruBlockResetArgs<S>&, Stream);
template <typename S>
void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>&, Stream);
template <typename S>
void gru_block_update(const GruBlockUpdateArgs<S>&, Stream);
template <typename S>
void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>&, Stream);
template <typename S>
void one_hot_linear(const OneHotLinearArgs<S>&, Stream);
template <typename S>
void one_hot_linear_backward(const OneHotLinearBackwardArgs<S>&, Stream);
int64_t norm_act_workspace(int64_t M, int64_t D);

int device_count();
const char* status();  // why device_count() is 0, or "no error"
int current_device();
void set_device(int device);

}  // namespace cuda

}  // namespace pywm
