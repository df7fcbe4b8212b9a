// Multilayer perceptrons on the CPU: all layers in one call, forward and backward. See pywm/ops/mlp.py.
//
// What: forward, y = W_L·f(... f(W_1·x + b_1) ...) + b_L; backward, the gradients of x, of every W and of every b.
// Layout: rows of x are independent. `hidden` keeps each hidden layer's activations, [M, width] one after another;
//   `slopes` the derivatives of layers whose activation does not tell them (SiLU), likewise, the output's last.
// Mapping: forward and the chain of grad_x go through all layers with kMlpRows rows at a time, so that a row's
//   activations stay in the cache. The gradients of the weights follow: grad_W = grad_z^T·input, one panel of columns
//   at a time over all rows. Threads share blocks of rows, then panels; no sum is split, so their number does not show.
// Cost: 2·M·parameters flops forward, twice that backward, at 60 to 90 % of one core's peak for widths from 32.
// Numerics: gemm.h and math/activations.h; float32 sums over rows in blocks of kDepth.
// Source: the chain rule, layer by layer; from no paper. The products: gemm.h.

#include "../math/activations.h"
#include "gemm.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

// x := f(x), and f'(x) where the derivative must be kept.
template <typename S>
inline void activate(Activation f, S* __restrict x, S* __restrict slope, int64_t n) {
  switch (f) {
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) x[i] = math::tanh(x[i]);
      return;
    case Activation::kSilu:
      if (slope) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
          const S z = x[i];
          slope[i] = math::silu_slope(z);
          x[i] = math::silu(z);
        }
        return;
      }
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) x[i] = math::silu(x[i]);
      return;
    case Activation::kElu:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) x[i] = math::elu(x[i]);
      return;
    case Activation::kRelu:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) x[i] = math::relu(x[i]);
      return;
  }
}

// out := grad·f'(x), from y = f(x) or the slope that was kept. `out` may be `grad`.
template <typename S>
inline void through_activation(Activation f, const S* grad, const S* __restrict y, const S* __restrict slope, S* out,
                               int64_t n) {
  switch (f) {
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = math::tanh_grad(grad[i], y[i]);
      return;
    case Activation::kSilu:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = grad[i] * slope[i];
      return;
    case Activation::kElu:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = math::elu_grad(grad[i], y[i]);
      return;
    case Activation::kRelu:
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) out[i] = math::relu_grad(grad[i], y[i]);
      return;
  }
}

template <typename S>
void pack(const MlpArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = Simd<S>::kCols;
  S* packed = a.packed;
  int64_t first = 0;  // number of the layer's first panel
  for (int64_t l = 0; l < a.L; ++l) {
    const int64_t K = a.sizes[l], N = a.sizes[l + 1], count = panels<S>(N);
    for (int64_t p = begin > first ? begin - first : 0; p < min(count, end - first); ++p)
      pack_panel_transposed(a.weights[l] + p * kCols * K, K, K, min(kCols, N - p * kCols), packed + p * kCols * K);
    packed += count * kCols * K;
    first += count;
  }
}

template <typename S>
void forward(const MlpArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = Simd<S>::kCols;
  for (int64_t row = begin; row < end; row += kMlpRows) {
    const int64_t rows = min(kMlpRows, end - row);
    const S *in = a.x + row * a.sizes[0], *packed = a.packed;
    S *plane = a.hidden, *slopes = a.slopes;
    for (int64_t l = 0; l < a.L; ++l) {
      const int64_t K = a.sizes[l], N = a.sizes[l + 1];
      const bool last = l == a.L - 1;
      const Activation f = last ? a.output_activation : a.activation;
      S* out = (last ? a.y : plane) + row * N;
      gemm(MatrixView<S>{in, K, 1}, packed, a.biases[l], out, N, rows, N, K, Start::kBias);
      const bool keep = slopes && f == Activation::kSilu;
      activate(f, out, keep ? slopes + row * N : nullptr, rows * N);
      if (keep) slopes += a.M * N;
      plane += a.M * N;
      packed += panels<S>(N) * kCols * K;
      in = out;
    }
  }
}

template <typename S>
void backward_pack(const MlpBackwardArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = Simd<S>::kCols;
  S* packed = a.packed;
  int64_t first = 0;
  for (int64_t l = a.grad_x ? 0 : 1; l < a.L; ++l) {
    const int64_t K = a.sizes[l + 1], N = a.sizes[l], count = panels<S>(N);
    for (int64_t p = begin > first ? begin - first : 0; p < min(count, end - first); ++p)
      pack_panel(a.weights[l] + p * kCols, N, K, min(kCols, N - p * kCols), packed + p * kCols * K);
    packed += count * kCols * K;
    first += count;
  }
}

// Where layer l's gradients with respect to its pre-activations are.
template <typename S>
const S* grad_z(const MlpBackwardArgs<S>& a, int64_t l) {
  if (l == a.L - 1 && a.output_activation == Activation::kNone) return a.grad_y;
  const S* plane = a.grad_z;
  for (int64_t i = 0; i < l; ++i) plane += a.M * a.sizes[i + 1];
  return plane;
}

template <typename S>
void backward(const MlpBackwardArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const int64_t L = a.L, O = a.sizes[L];
  // Ends of the arrays that the loop walks from the last layer to the first.
  const S *packed_end = a.packed, *hidden_end = a.hidden, *slopes_end = a.slopes;
  S* grad_end = a.grad_z;
  for (int64_t l = a.grad_x ? 0 : 1; l < L; ++l) packed_end += panels<S>(a.sizes[l]) * kCols * a.sizes[l + 1];
  for (int64_t l = 0; l < L - 1; ++l) {
    const int64_t n = a.M * a.sizes[l + 1];
    hidden_end += n;
    grad_end += n;
    if (a.activation == Activation::kSilu) slopes_end += n;
  }
  for (int64_t row = begin; row < end; row += kMlpRows) {
    const int64_t rows = min(kMlpRows, end - row);
    const S* grad = a.grad_y + row * O;
    if (a.output_activation != Activation::kNone) {
      S* out = grad_end + row * O;
      through_activation(a.output_activation, grad, a.y + row * O, slopes_end ? slopes_end + row * O : nullptr, out,
                         rows * O);
      grad = out;
    }
    const S *packed = packed_end, *hidden = hidden_end, *slopes = slopes_end;
    S* plane = grad_end;
    for (int64_t l = L - 1; l >= (a.grad_x ? 0 : 1); --l) {
      const int64_t K = a.sizes[l + 1], N = a.sizes[l];
      packed -= panels<S>(N) * kCols * K;
      if (l > 0) {
        plane -= a.M * N;
        hidden -= a.M * N;
        if (a.activation == Activation::kSilu) slopes -= a.M * N;
      }
      S* out = (l > 0 ? plane : a.grad_x) + row * N;
      gemm(MatrixView<S>{grad, K, 1}, packed, static_cast<const S*>(nullptr), out, N, rows, N, K, Start::kZero);
      if (l > 0)
        through_activation(a.activation, out, hidden + row * N, slopes ? slopes + row * N : nullptr, out, rows * N);
      grad = out;
    }
  }
}

// out [N] := the sum of the rows of x [M, N].
template <typename S>
inline void sum_rows(const S* x, int64_t M, int64_t N, S* out) {
  constexpr int64_t kStep = 4 * Simd<S>::kLanes;
  for (int64_t first = 0; first < N; first += kStep) {
    const int64_t n = min(kStep, N - first);
    S sum[kStep] = {};
    if (n == kStep)
      for (int64_t m = 0; m < M; ++m)
        for (int64_t j = 0; j < kStep; ++j) sum[j] += x[m * N + first + j];
    else
      for (int64_t m = 0; m < M; ++m)
        for (int64_t j = 0; j < n; ++j) sum[j] += x[m * N + first + j];
    for (int64_t j = 0; j < n; ++j) out[first + j] = sum[j];
  }
}

// grad_w [O, I] := grad_z [M, O]^T·in [M, I] for a few inputs, which would leave most of a tile's columns empty: the
// transpose is computed, a panel of grad_z's columns at a time.
template <typename S>
inline void grad_weight_of_few_inputs(const S* grad_z, const S* in, int64_t M, int64_t O, int64_t I, S* grad_w) {
  constexpr int64_t kCols = Simd<S>::kCols;
  alignas(kVectorBytes) S transposed[kCols / 2 * kCols];
  for (int64_t first = 0; first < O; first += kCols) {
    const int64_t columns = min(kCols, O - first);
    gemm_panel(MatrixView<S>{in, 1, I}, grad_z + first, O, transposed, kCols, I, columns, M);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = 0; i < I; ++i) grad_w[(first + j) * I + i] = transposed[i * kCols + j];
  }
}

// Every layer has a unit of work for each panel of its weight's columns, and one for its bias.
template <typename S>
void backward_weights(const MlpBackwardArgs<S>& a, int64_t begin, int64_t end) {
  constexpr int64_t kCols = Simd<S>::kCols;
  const S* in = a.x;
  int64_t first = 0, plane = 0;
  for (int64_t l = 0; l < a.L; ++l) {
    const int64_t I = a.sizes[l], O = a.sizes[l + 1], count = panels<S>(I);
    const S* grad = grad_z(a, l);
    for (int64_t p = begin > first ? begin - first : 0; p < min(count + 1, end - first); ++p) {
      if (p == count) {
        sum_rows(grad, a.M, O, a.grad_biases[l]);
        continue;
      }
      if (I <= kCols / 2 && O >= kCols) {
        grad_weight_of_few_inputs(grad, in, a.M, O, I, a.grad_weights[l]);
        continue;
      }
      gemm_panel(MatrixView<S>{grad, 1, O}, in + p * kCols, I, a.grad_weights[l] + p * kCols, I, O,
                 min(kCols, I - p * kCols), a.M);
    }
    first += count + 1;
    in = a.hidden + plane;
    plane += a.M * O;
  }
}

template <typename S>
void fill(KernelsOf<S>& table) {
  table.tile_columns = Simd<S>::kCols;
  table.mlp_pack = pack<S>;
  table.mlp = forward<S>;
  table.mlp_backward_pack = backward_pack<S>;
  table.mlp_backward = backward<S>;
  table.mlp_backward_weights = backward_weights<S>;
}

}  // namespace

void fill_mlp(Kernels& table) {
  fill(table.f32);
  fill(table.f64);
}

}  // namespace pywm::cpu::PYWM_ISA
