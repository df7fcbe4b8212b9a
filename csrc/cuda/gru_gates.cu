// Gates of recurrent cells on CUDA. See pywm/ops/gru_gates.py.
//
// What:     The next state from the gates' pre-activations and the state; backward, the gradients of all of them.
// Layout:   M rows; the gates of a row lie side by side, D each. For the block-diagonal cell a block is a row.
// Mapping:  A warp a row below kWideRow numbers, from there on blocks, several of them where rows are few; a thread an
//           element of the state. With LayerNorm as norm_act.cu: one block a row. Predictions, not measured yet.
// Cost:     Every array is read and written once; with LayerNorm again from the caches.
// Numerics: math/gru.h and math/norm.h in S; no atomics, the same result in every run.
// Source:   Hafner et al. 2021, 2025; Cho et al. 2014.

#include "../math/gru.h"
#include "../ops.h"
#include "rows.cuh"

namespace pywm::cuda {
namespace {

constexpr int64_t kMaxRowPieces = 64;

// op(m, i) for every element of the state.
template <int kTeam, typename Op>
__global__ void __launch_bounds__(kRowThreads, 4) gates_kernel(Op op) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kTeam + threadIdx.x % kTeam;
  const int64_t step = static_cast<int64_t>(gridDim.y) * kTeam;
  for (int64_t m = first_row<kTeam>(); m < op.a.M; m += row_step<kTeam>())
    for (int64_t i = first; i < op.a.D; i += step) op(m, i);
}

template <typename Op>
void launch_gates(const char* name, const Op& op, Stream stream) {
  with_team(op.a.D, [&]<int kTeam>() {
    const int64_t pieces = ceil_div(op.a.D, kTeam);
    const dim3 grid(static_cast<unsigned>(row_blocks(op.a.M, kTeam, kMaxRowBlocks)),
                    static_cast<unsigned>(pieces < kMaxRowPieces ? pieces : kMaxRowPieces));
    PYWM_LAUNCH((gates_kernel<kTeam, Op>), grid, dim3(kRowThreads), 0, stream, op);
    check_launch(name);
  });
}

// ---- Dreamer's ------------------------------------------------------------------------------------------------------

template <typename S>
struct BlockForward {
  BlockGruGatesArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const S* gates = a.gates + m * 3 * a.D;
    a.y[m * a.D + i] =
        math::gru_step(math::GruGates<S>{gates[i], gates[a.D + i], gates[2 * a.D + i]}, a.deter[m * a.D + i]);
  }
};

template <typename S>
struct BlockBackward {
  BlockGruGatesBackwardArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i, wide = m * 3 * a.D + i;
    const auto g = math::gru_grad(
        a.grad[at], math::GruGates<S>{a.gates[wide], a.gates[wide + a.D], a.gates[wide + 2 * a.D]}, a.deter[at]);
    if (a.grad_gates) {
      a.grad_gates[wide] = g.gates.reset;
      a.grad_gates[wide + a.D] = g.gates.candidate;
      a.grad_gates[wide + 2 * a.D] = g.gates.update;
    }
    if (a.grad_deter) a.grad_deter[at] = g.deter;
  }
};

// A gate of the row `pre` after the normalisation.
template <typename S>
__device__ __forceinline__ S normalised(const S* pre, const S* scale, const S* shift, math::NormRow<S> row, int64_t i) {
  return scale[i] * math::norm_hat(pre[i], row) + shift[i];
}

template <typename S, int kTeam>
__global__ void __launch_bounds__(kRowThreads, 4) layernorm_kernel(LayernormGruGatesArgs<S> a) {
  const int64_t D = a.D;
  for (int64_t m = first_row<kTeam>(); m < a.M; m += row_step<kTeam>()) {
    const S* pre = a.pre + m * 3 * D;
    const math::NormRow<S> row = norm_row<kTeam>(pre, 3 * D, true, a.eps);
    for (int64_t i = threadIdx.x % kTeam; i < D; i += kTeam) {
      const math::GruGates<S> gates{normalised(pre, a.scale, a.shift, row, i),
                                    normalised(pre, a.scale, a.shift, row, D + i),
                                    normalised(pre, a.scale, a.shift, row, 2 * D + i)};
      a.y[m * D + i] = math::gru_step(gates, a.deter[m * D + i]);
    }
  }
}

template <typename S, int kTeam>
__global__ void __launch_bounds__(kRowThreads, 2) layernorm_backward_kernel(LayernormGruGatesBackwardArgs<S> a) {
  const int lane = threadIdx.x % kTeam;
  const int64_t D = a.D, W = 3 * D;
  S* sums = a.partial ? a.partial + first_row<kTeam>() * 2 * W : nullptr;
  for (int64_t i = lane; i < (sums ? D : 0); i += kTeam)
    for (int64_t j = i; j < 2 * W; j += D) sums[j] = S(0);
  for (int64_t m = first_row<kTeam>(); m < a.M; m += row_step<kTeam>()) {
    const S* pre = a.pre + m * W;
    const math::NormRow<S> row = norm_row<kTeam>(pre, W, true, a.eps);
    const auto gradient = [&](int64_t i) {
      const math::GruGates<S> gates{normalised(pre, a.scale, a.shift, row, i),
                                    normalised(pre, a.scale, a.shift, row, D + i),
                                    normalised(pre, a.scale, a.shift, row, 2 * D + i)};
      return math::gru_grad(a.grad[m * D + i], gates, a.deter[m * D + i]);
    };
    S means[2] = {S(0), S(0)};
    for (int64_t i = lane; i < D; i += kTeam) {
      const auto g = gradient(i);
      const S of_gates[3] = {g.gates.reset, g.gates.candidate, g.gates.update};
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int64_t j = k * D + i;
        const S hat = math::norm_hat(pre[j], row), d = a.scale[j] * of_gates[k];
        means[0] += d;
        means[1] += d * hat;
        if (sums) {
          sums[j] += of_gates[k] * hat;
          sums[W + j] += of_gates[k];
        }
      }
      if (a.grad_deter) a.grad_deter[m * D + i] = g.deter;
    }
    if (!a.grad_pre) continue;
    team_sum<kTeam>(means);
    const S mean_d = means[0] / S(W), mean_d_hat = means[1] / S(W);
    for (int64_t i = lane; i < D; i += kTeam) {
      const auto g = gradient(i);
      const S of_gates[3] = {g.gates.reset, g.gates.candidate, g.gates.update};
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int64_t j = k * D + i;
        a.grad_pre[m * W + j] =
            math::norm_grad(a.scale[j] * of_gates[k], math::norm_hat(pre[j], row), mean_d, mean_d_hat, row.inverse_std);
      }
    }
  }
}

// ---- Keras' reset_after ---------------------------------------------------------------------------------------------

template <typename S>
__device__ __forceinline__ math::ResetAfterGates<S> reset_after_gates(const S* gates, int64_t D, int64_t i) {
  return {gates[i], gates[D + i], gates[2 * D + i]};
}

template <typename S>
struct ResetAfterForward {
  GruGatesArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i, wide = m * 3 * a.D;
    a.y[at] = math::reset_after_step(reset_after_gates(a.input + wide, a.D, i),
                                     reset_after_gates(a.hidden + wide, a.D, i), a.deter[at]);
  }
};

template <typename S>
struct ResetAfterBackward {
  GruGatesBackwardArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i, wide = m * 3 * a.D;
    const auto g = math::reset_after_grad(a.grad[at], reset_after_gates(a.input + wide, a.D, i),
                                          reset_after_gates(a.hidden + wide, a.D, i), a.deter[at]);
    if (a.grad_input) {
      a.grad_input[wide + i] = g.input.reset;
      a.grad_input[wide + a.D + i] = g.input.keep;
      a.grad_input[wide + 2 * a.D + i] = g.input.candidate;
    }
    if (a.grad_hidden) {
      a.grad_hidden[wide + i] = g.input.reset;
      a.grad_hidden[wide + a.D + i] = g.input.keep;
      a.grad_hidden[wide + 2 * a.D + i] = g.hidden_candidate;
    }
    if (a.grad_deter) a.grad_deter[at] = g.deter;
  }
};

// ---- PlaNet's -------------------------------------------------------------------------------------------------------

template <typename S>
struct ResetForward {
  GruBlockResetArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    a.y[m * a.D + i] = math::reset_before_reset(a.gates[m * 2 * a.D + i], a.deter[m * a.D + i]);
  }
};

template <typename S>
struct ResetBackward {
  GruBlockResetBackwardArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i, wide = m * 2 * a.D + i;
    const auto g = math::reset_before_reset_grad(a.grad[at], a.gates[wide], a.deter[at]);
    if (a.grad_gates) {
      a.grad_gates[wide] = g.reset;
      a.grad_gates[wide + a.D] = S(0);
    }
    if (a.grad_deter) a.grad_deter[at] = g.deter;
  }
};

template <typename S>
struct UpdateForward {
  GruBlockUpdateArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i;
    a.y[at] = math::reset_before_update(a.gates[m * 2 * a.D + a.D + i], a.candidate[at], a.deter[at]);
  }
};

template <typename S>
struct UpdateBackward {
  GruBlockUpdateBackwardArgs<S> a;

  __device__ __forceinline__ void operator()(int64_t m, int64_t i) const {
    const int64_t at = m * a.D + i, wide = m * 2 * a.D + i;
    const auto g = math::reset_before_update_grad(a.grad[at], a.gates[wide + a.D], a.candidate[at], a.deter[at]);
    if (a.grad_gates) {
      a.grad_gates[wide] = S(0);
      a.grad_gates[wide + a.D] = g.update;
    }
    if (a.grad_candidate) a.grad_candidate[at] = g.candidate;
    if (a.grad_deter) a.grad_deter[at] = g.deter;
  }
};

}  // namespace

template <typename S>
void block_gru_gates(const BlockGruGatesArgs<S>& a, Stream stream) {
  launch_gates("block_gru_gates", BlockForward<S>{a}, stream);
}
template <typename S>
void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>& a, Stream stream) {
  launch_gates("block_gru_gates_backward", BlockBackward<S>{a}, stream);
}
template <typename S>
void layernorm_gru_gates(const LayernormGruGatesArgs<S>& a, Stream stream) {
  with_team(3 * a.D, [&]<int kTeam>() {
    const dim3 grid(static_cast<unsigned>(row_blocks(a.M, kTeam, kMaxRowBlocks)));
    PYWM_LAUNCH((layernorm_kernel<S, kTeam>), grid, dim3(kRowThreads), 0, stream, a);
    check_launch("layernorm_gru_gates");
  });
}
template <typename S>
void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>& a, Stream stream) {
  const char* op = "layernorm_gru_gates_backward";
  const int64_t W = 3 * a.D;
  with_team(W, [&]<int kTeam>() {
    const int64_t most = a.partial ? kMaxSummingBlocks : kMaxRowBlocks;
    const dim3 grid(static_cast<unsigned>(row_blocks(a.M, kTeam, most)));
    PYWM_LAUNCH((layernorm_backward_kernel<S, kTeam>), grid, dim3(kRowThreads), 0, stream, a);
    check_launch(op);
  });
  const int64_t teams = summing_teams(a.M, W);
  if (a.grad_scale) launch_column_sums(op, a.partial, teams, 2 * W, W, a.grad_scale, stream);
  if (a.grad_shift) launch_column_sums(op, a.partial + W, teams, 2 * W, W, a.grad_shift, stream);
}
template <typename S>
void gru_gates(const GruGatesArgs<S>& a, Stream stream) {
  launch_gates("gru_gates", ResetAfterForward<S>{a}, stream);
}
template <typename S>
void gru_gates_backward(const GruGatesBackwardArgs<S>& a, Stream stream) {
  launch_gates("gru_gates_backward", ResetAfterBackward<S>{a}, stream);
}
template <typename S>
void gru_block_reset(const GruBlockResetArgs<S>& a, Stream stream) {
  launch_gates("gru_block_reset", ResetForward<S>{a}, stream);
}
template <typename S>
void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>& a, Stream stream) {
  launch_gates("gru_block_reset_backward", ResetBackward<S>{a}, stream);
}
template <typename S>
void gru_block_update(const GruBlockUpdateArgs<S>& a, Stream stream) {
  launch_gates("gru_block_update", UpdateForward<S>{a}, stream);
}
template <typename S>
void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>& a, Stream stream) {
  launch_gates("gru_block_update_backward", UpdateBackward<S>{a}, stream);
}

#define PYWM_INSTANTIATE(S)                                                                    \
  template void block_gru_gates(const BlockGruGatesArgs<S>&, Stream);                          \
  template void block_gru_gates_backward(const BlockGruGatesBackwardArgs<S>&, Stream);         \
  template void layernorm_gru_gates(const LayernormGruGatesArgs<S>&, Stream);                  \
  template void layernorm_gru_gates_backward(const LayernormGruGatesBackwardArgs<S>&, Stream); \
  template void gru_gates(const GruGatesArgs<S>&, Stream);                                     \
  template void gru_gates_backward(const GruGatesBackwardArgs<S>&, Stream);                    \
  template void gru_block_reset(const GruBlockResetArgs<S>&, Stream);                          \
  template void gru_block_reset_backward(const GruBlockResetBackwardArgs<S>&, Stream);         \
  template void gru_block_update(const GruBlockUpdateArgs<S>&, Stream);                        \
  template void gru_block_update_backward(const GruBlockUpdateBackwardArgs<S>&, Stream);
PYWM_INSTANTIATE(float)
PYWM_INSTANTIATE(double)

}  // namespace pywm::cuda
