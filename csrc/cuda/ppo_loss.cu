// PPO's loss, statistics and gradients on CUDA. See pywm/ops/ppo_loss.py for the definition.
//
// What:     Three kernels. Moments: number of valid rows, mean and squared deviations of the advantage, a partial
//           result a block (left out where nothing needs them). Rows: the loss of every row and its gradients, and
//           partial sums of the statistics. Finish: adds the partial sums up.
// Layout:   M rows, contiguous: logits [M, width] in G groups, or mean, action and log_std [M, A].
// Mapping:  Rows: 1, 8 or 32 lanes share a row, by the number of classes or action parts; a block takes 256 / lanes
//           rows at a time, at most kMaxBlocks blocks share all rows. Predictions, not measured yet.
// Cost:     Reads every input once from memory (logits up to four times, from L1) and writes the gradients: bandwidth-
//           bound above some 10^5 rows, below that the three launches.
// Numerics: Formulas of math/ in S; sums over rows in double, in a fixed order for a given M: no atomics, the same
//           result in every run. An action that is no class gives NaN, for no error can be raised without waiting for
//           the device.
// Source:   Schulman et al. 2017, eq. 7 and 9.

#include "../math/distributions.h"
#include "../math/ppo.h"
#include "../ops.h"
#include "device.cuh"
#include "launch.cuh"
#include "reduce.cuh"

namespace pywm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;
constexpr int kMomentBlocks = kWarp;  // one lane combines one partial result
constexpr int64_t kMomentRows = 1024;
constexpr int kMaxLanes = kWarp;

// Workspace, in doubles: [3][kMomentBlocks] partial moments, then [kSums + columns][blocks] partial sums.
enum Sum { kPolicy, kValue, kEntropy, kClipped, kKl, kSums };
constexpr int64_t kMomentDoubles = 3 * kMomentBlocks;

struct PartialMoments {
  const double* data;  // null where all M rows are valid and nothing is normalised
  int blocks;
};

int64_t row_blocks(int64_t M, int lanes) {
  const int64_t blocks = ceil_div(M, kThreads / lanes);
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

__device__ __forceinline__ bool is_valid(const uint8_t* valid, int64_t m) { return valid == nullptr || valid[m] != 0; }

// ---- Moments of the advantage -------------------------------------------------------------------------------------

// Two passes over the block's own rows, the second from L2: the deviations are taken from the mean, not the squares.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    moments_kernel(const S* __restrict__ advantage, const uint8_t* __restrict__ valid, int64_t M, double* partial) {
  const int64_t rows = ceil_div(M, gridDim.x);
  const int64_t begin = blockIdx.x * rows;
  const int64_t end = begin + rows < M ? begin + rows : M;
  double sums[2] = {0, 0};
  for (int64_t m = begin + threadIdx.x; m < end; m += kThreads) {
    if (!is_valid(valid, m)) continue;
    sums[0] += 1;
    sums[1] += static_cast<double>(advantage[m]);
  }
  block_sum<kThreads>(sums);
  const double mean = sums[0] > 0 ? sums[1] / sums[0] : 0.0;
  double squares[1] = {0};
  for (int64_t m = begin + threadIdx.x; m < end; m += kThreads) {
    if (!is_valid(valid, m)) continue;
    const double deviation = static_cast<double>(advantage[m]) - mean;
    squares[0] += deviation * deviation;
  }
  block_sum<kThreads>(squares);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sums[0];
    partial[kMomentBlocks + blockIdx.x] = mean;
    partial[2 * kMomentBlocks + blockIdx.x] = squares[0];
  }
}

struct Moments {
  double mean, scale, inverse_count;
};

// Every warp combines the partial results for itself; all its lanes must call.
__device__ __forceinline__ Moments combine(PartialMoments partial, int64_t M, bool normalize) {
  if (partial.data == nullptr) return {0.0, 1.0, 1.0 / static_cast<double>(M)};
  const int lane = threadIdx.x % kWarp;
  const bool mine = lane < partial.blocks;
  const double block_count = mine ? partial.data[lane] : 0.0;
  const double block_mean = mine ? partial.data[kMomentBlocks + lane] : 0.0;
  const double block_squares = mine ? partial.data[2 * kMomentBlocks + lane] : 0.0;
  const double count = warp_sum(block_count);
  const double inverse_count = count > 0 ? 1.0 / count : 0.0;
  const double mean = warp_sum(block_count * block_mean) * inverse_count;
  const double offset = block_mean - mean;
  const double squares = warp_sum(block_squares + block_count * offset * offset);
  if (!normalize || count < 2) return {0.0, 1.0, inverse_count};
  return {mean, 1.0 / (sqrt(squares / (count - 1)) + 1e-8), inverse_count};
}

// ---- Rows ---------------------------------------------------------------------------------------------------------

// The part of a valid row that no distribution enters: adds to the sums where `counts`, writes the value's gradient,
// and returns the weight of d(log_prob), 1 / count included.
template <typename S>
__device__ __forceinline__ S common_row(const PpoLossCommon<S>& a, const Moments& moments, int64_t m, S log_prob,
                                        S entropy, bool counts, double (&sums)[kSums]) {
  const S advantage = (a.advantage[m] - S(moments.mean)) * S(moments.scale);
  const auto policy = math::ppo_policy_row(log_prob, a.old_log_prob[m], advantage, S(a.options.clip));
  if (counts) {
    const auto value = a.options.value_clip >= 0 ? math::ppo_value_row_clipped(a.value[m], a.returns[m], a.old_value[m],
                                                                               S(a.options.value_clip))
                                                 : math::ppo_value_row(a.value[m], a.returns[m]);
    sums[kPolicy] += static_cast<double>(policy.loss);
    sums[kValue] += static_cast<double>(value.loss);
    sums[kEntropy] += static_cast<double>(entropy);
    sums[kClipped] += policy.clipped ? 1.0 : 0.0;
    sums[kKl] += static_cast<double>(policy.kl);
    if (a.grad_value) a.grad_value[m] = S(a.options.value_coef * moments.inverse_count) * value.grad_value;
  }
  return policy.grad_log_prob * S(moments.inverse_count);
}

__device__ __forceinline__ void write_sums(double (&sums)[kSums], double* partial) {
  block_sum<kThreads>(sums);
  if (threadIdx.x != 0) return;
  for (int i = 0; i < kSums; ++i) partial[static_cast<int64_t>(i) * gridDim.x + blockIdx.x] = sums[i];
}

struct Groups {
  int count;
  int64_t begin[kMaxGroups + 1];
};

template <typename S>
struct GroupStatistics {
  math::LogTotal<S> log_total;
  S entropy;
};

// Of `classes` logits shared by kLanes lanes; with no classes, nothing that may be used.
template <int kLanes, typename S>
__device__ __forceinline__ GroupStatistics<S> group_statistics(const S* logits, int64_t classes, int lane) {
  S top = -S(INFINITY);
  for (int64_t j = lane; j < classes; j += kLanes) top = logits[j] > top ? logits[j] : top;
  top = group_max<kLanes>(top);
  S total = S(0);
  for (int64_t j = lane; j < classes; j += kLanes) total += math::exp(logits[j] - top);
  const math::LogTotal<S> log_total{top, math::log(group_sum<kLanes>(total))};
  S entropy = S(0);
  for (int64_t j = lane; j < classes; j += kLanes) {
    const S log_prob = math::categorical_log_prob(logits[j], log_total);
    entropy -= math::plogp(math::exp(log_prob), log_prob);
  }
  return {log_total, group_sum<kLanes>(entropy)};
}

template <typename S, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    categorical_kernel(PpoLossCategoricalArgs<S> a, Groups groups, PartialMoments partial_moments, double* partial) {
  constexpr int kRows = kThreads / kLanes;
  const PpoLossCommon<S>& common = a.common;
  const Moments moments = combine(partial_moments, common.M, common.options.normalize_advantage);
  const S entropy_weight = S(-common.options.entropy_coef * moments.inverse_count);
  const int lane = threadIdx.x % kLanes;
  double sums[kSums] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < common.M;
       first += gridDim.x * int64_t{kRows}) {
    // Lanes without a row take part in the shuffles all the same, with no classes.
    const int64_t m = first + threadIdx.x / kLanes;
    const bool inside = m < common.M;
    const bool valid = inside && is_valid(common.valid, m);
    const S* logits = a.logits + m * a.width;
    const int64_t* action = a.action + m * groups.count;
    GroupStatistics<S> statistics{};
    S log_prob = S(0), entropy = S(0);
    for (int g = 0; g < groups.count; ++g) {
      const int64_t begin = groups.begin[g], classes = groups.begin[g + 1] - begin;
      statistics = group_statistics<kLanes>(logits + begin, valid ? classes : 0, lane);
      if (!valid) continue;
      const int64_t chosen = action[g];
      const bool is_class = chosen >= 0 && chosen < classes;
      log_prob += is_class ? math::categorical_log_prob(logits[begin + chosen], statistics.log_total) : S(NAN);
      entropy += statistics.entropy;
    }
    if (inside && !valid && lane == 0 && common.grad_value) common.grad_value[m] = S(0);
    const S weight = valid ? common_row(common, moments, m, log_prob, entropy, lane == 0, sums) : S(0);
    if (a.grad_logits == nullptr) continue;
    S* grad = a.grad_logits + m * a.width;
    for (int g = 0; g < groups.count; ++g) {
      const int64_t begin = groups.begin[g], classes = groups.begin[g + 1] - begin;
      // The only group's statistics are still there.
      if (groups.count > 1) statistics = group_statistics<kLanes>(logits + begin, valid ? classes : 0, lane);
      if (!inside) continue;
      for (int64_t j = lane; j < classes; j += kLanes) {
        S gradient = S(0);
        if (valid) {
          const S class_log_prob = math::categorical_log_prob(logits[begin + j], statistics.log_total);
          const S prob = math::exp(class_log_prob);
          gradient = weight * math::categorical_grad_log_prob(prob, j == action[g]) +
                     entropy_weight * math::categorical_grad_entropy(prob, class_log_prob, statistics.entropy);
        }
        grad[begin + j] = gradient;
      }
    }
  }
  write_sums(sums, partial);
}

// `columns`: A where the gradient of a shared log_std is wanted, which is summed over the rows; else 0.
template <typename S, int kLanes>
__global__ void __launch_bounds__(kThreads, 2)
    gaussian_kernel(PpoLossGaussianArgs<S> a, int64_t columns, PartialMoments partial_moments, double* partial) {
  constexpr int kRows = kThreads / kLanes;
  PYWM_SHARED(S, row_weight, [kRows]);
  PYWM_SHARED(bool, row_valid, [kRows]);
  const PpoLossCommon<S>& common = a.common;
  const Moments moments = combine(partial_moments, common.M, common.options.normalize_advantage);
  const S entropy_weight = S(-common.options.entropy_coef * moments.inverse_count);
  const int64_t log_std_stride = a.log_std_rows == 1 ? 0 : a.A;
  const int lane = threadIdx.x % kLanes, row = threadIdx.x / kLanes;
  double sums[kSums] = {};
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < common.M;
       first += gridDim.x * int64_t{kRows}) {
    const int64_t m = first + row;
    const bool inside = m < common.M;
    const bool valid = inside && is_valid(common.valid, m);
    const S* action = a.action + m * a.A;
    const S* mean = a.mean + m * a.A;
    const S* log_std = a.log_std + m * log_std_stride;
    S log_prob = S(0), entropy = S(0);
    for (int64_t j = lane; j < (valid ? a.A : 0); j += kLanes) {
      const auto part = math::gaussian_part(action[j], mean[j], log_std[j]);
      log_prob += part.log_prob;
      entropy += part.entropy;
    }
    log_prob = group_sum<kLanes>(log_prob);
    entropy = group_sum<kLanes>(entropy);
    if (inside && !valid && lane == 0 && common.grad_value) common.grad_value[m] = S(0);
    const S weight = valid ? common_row(common, moments, m, log_prob, entropy, lane == 0, sums) : S(0);
    const bool writes_log_std = a.grad_log_std && columns == 0;
    for (int64_t j = lane; j < (inside && (a.grad_mean || writes_log_std) ? a.A : 0); j += kLanes) {
      S grad_mean = S(0), grad_log_std = S(0);
      if (valid) {
        const auto part = math::gaussian_part(action[j], mean[j], log_std[j]);
        grad_mean = weight * part.grad_mean;
        grad_log_std = weight * part.grad_log_std + entropy_weight;
      }
      if (a.grad_mean) a.grad_mean[m * a.A + j] = grad_mean;
      if (writes_log_std) a.grad_log_std[m * a.A + j] = grad_log_std;
    }
    if (columns == 0) continue;

    // Now a warp a column, over the rows that the block has at hand.
    if (lane == 0) {
      row_weight[row] = weight;
      row_valid[row] = valid;
    }
    __syncthreads();
    for (int64_t j = threadIdx.x / kWarp; j < columns; j += kThreads / kWarp) {
      double sum = 0;
      for (int r = threadIdx.x % kWarp; r < kRows; r += kWarp) {
        if (!row_valid[r]) continue;
        const int64_t i = (first + r) * a.A + j;
        const auto part = math::gaussian_part(a.action[i], a.mean[i], a.log_std[j]);
        sum += static_cast<double>(row_weight[r] * part.grad_log_std + entropy_weight);
      }
      sum = warp_sum(sum);
      double& total = partial[(kSums + j) * gridDim.x + blockIdx.x];
      const bool is_first = first == static_cast<int64_t>(blockIdx.x) * kRows;
      if (threadIdx.x % kWarp == 0) total = is_first ? sum : total + sum;
    }
    __syncthreads();  // the next rows overwrite row_weight
  }
  write_sums(sums, partial);
}

// ---- Finish -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ double sum_of_blocks(const double* partial, int64_t blocks) {
  double sum = 0;
  for (int64_t i = threadIdx.x % kWarp; i < blocks; i += kWarp) sum += partial[i];
  return warp_sum(sum);
}

// Block 0: a warp a statistic. The others: a warp a column of the shared log_std.
template <typename S>
__global__ void __launch_bounds__(kThreads, 2)
    finish_kernel(PpoLossCommon<S> a, S* grad_log_std, int64_t columns, PartialMoments partial_moments,
                  const double* partial, int64_t blocks) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kSums <= kWarps);
  const int warp = threadIdx.x / kWarp;
  if (blockIdx.x > 0) {
    const int64_t j = (static_cast<int64_t>(blockIdx.x) - 1) * kWarps + warp;
    if (j >= columns) return;
    const double sum = sum_of_blocks(partial + (kSums + j) * blocks, blocks);
    if (threadIdx.x % kWarp == 0) grad_log_std[j] = S(sum);
    return;
  }
  PYWM_SHARED(double, statistics, [kSums]);
  const double inverse_count = combine(partial_moments, a.M, false).inverse_count;
  if (warp < kSums) {
    const double sum = sum_of_blocks(partial + warp * blocks, blocks);
    if (threadIdx.x % kWarp == 0) statistics[warp] = sum * inverse_count;
  }
  __syncthreads();
  if (threadIdx.x < kSums) a.stats[threadIdx.x] = S(statistics[threadIdx.x]);
  if (threadIdx.x == 0) {
    a.loss[0] = S(statistics[kPolicy] + a.options.value_coef * statistics[kValue] -
                  a.options.entropy_coef * statistics[kEntropy]);
  }
}

// ---- Launches -----------------------------------------------------------------------------------------------------

template <typename S>
PartialMoments launch_moments(const PpoLossCommon<S>& a, Stream stream) {
  if (a.valid == nullptr && !a.options.normalize_advantage) return {nullptr, 0};
  const int64_t wanted = ceil_div(a.M, kMomentRows);
  const int blocks = static_cast<int>(wanted < kMomentBlocks ? wanted : kMomentBlocks);
  PYWM_LAUNCH((moments_kernel<S>), dim3(blocks), dim3(kThreads), 0, stream, a.advantage, a.valid, a.M, a.workspace);
  check_launch("ppo_loss");
  return {a.workspace, blocks};
}

template <typename S>
void launch_finish(const PpoLossCommon<S>& a, S* grad_log_std, int64_t columns, PartialMoments moments, int64_t blocks,
                   Stream stream) {
  const dim3 grid(static_cast<unsigned>(1 + ceil_div(columns, kThreads / kWarp)));
  PYWM_LAUNCH((finish_kernel<S>), grid, dim3(kThreads), 0, stream, a, grad_log_std, columns, moments,
              a.workspace + kMomentDoubles, blocks);
  check_launch("ppo_loss");
}

// Calls launch.operator()<kLanes>() with the number of lanes that share a row of that many classes or parts.
template <typename Launch>
void with_lanes(int64_t width, const Launch& launch) {
  if (width <= 8) return launch.template operator()<1>();
  if (width <= 64) return launch.template operator()<8>();
  launch.template operator()<kMaxLanes>();
}

}  // namespace

int64_t ppo_loss_workspace(int64_t M, int64_t columns) {
  return kMomentDoubles + (kSums + columns) * row_blocks(M, kMaxLanes);
}

template <typename S>
void ppo_loss_categorical(const PpoLossCategoricalArgs<S>& a, Stream stream) {
  Groups groups{};
  groups.count = static_cast<int>(a.G);
  int64_t widest = 0;
  for (int64_t g = 0; g < a.G; ++g) {
    groups.begin[g + 1] = groups.begin[g] + a.nvec[g];
    widest = a.nvec[g] > widest ? a.nvec[g] : widest;
  }
  const PartialMoments moments = launch_moments(a.common, stream);
  with_lanes(widest, [&]<int kLanes>() {
    const int64_t blocks = row_blocks(a.common.M, kLanes);
    PYWM_LAUNCH((categorical_kernel<S, kLanes>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a,
                groups, moments, a.common.workspace + kMomentDoubles);
    check_launch("ppo_loss");
    launch_finish<S>(a.common, nullptr, 0, moments, blocks, stream);
  });
}

template <typename S>
void ppo_loss_gaussian(const PpoLossGaussianArgs<S>& a, Stream stream) {
  // One row writes its gradient directly, whichever shape log_std has.
  const int64_t columns = a.grad_log_std && a.log_std_rows == 1 && a.common.M > 1 ? a.A : 0;
  const PartialMoments moments = launch_moments(a.common, stream);
  with_lanes(a.A, [&]<int kLanes>() {
    const int64_t blocks = row_blocks(a.common.M, kLanes);
    PYWM_LAUNCH((gaussian_kernel<S, kLanes>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, a,
                columns, moments, a.common.workspace + kMomentDoubles);
    check_launch("ppo_loss");
    launch_finish(a.common, a.grad_log_std, columns, moments, blocks, stream);
  });
}

template void ppo_loss_categorical(const PpoLossCategoricalArgs<float>&, Stream);
template void ppo_loss_categorical(const PpoLossCategoricalArgs<double>&, Stream);
template void ppo_loss_gaussian(const PpoLossGaussianArgs<float>&, Stream);
template void ppo_loss_gaussian(const PpoLossGaussianArgs<double>&, Stream);

}  // namespace pywm::cuda
