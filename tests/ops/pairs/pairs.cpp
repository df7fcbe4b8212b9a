// Products of gemm.h's pairs against sums of rounded numbers in double: prints how many, and the largest difference.

#define PYWM_ISA pairs
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../../csrc/cpu/gemm.h"

using namespace pywm::cpu::pairs;

namespace {

constexpr int64_t kCols = Simd<float>::kCols;

double largest_difference(int64_t M, int64_t N, int64_t K, Start start, bool transposed) {
  const int64_t lda = K + 3, ldc = N + 2, ld = (transposed ? K : N) + 1;  // rows with gaps
  const auto random = [](int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& each : x) each = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) - 0.5f;
    return x;
  };
  const auto a = random(M * lda), w = random((transposed ? N : K) * ld), bias = random(N), before = random(M * ldc);
  std::vector<Pair> packed(static_cast<size_t>(panels<float>(N) * kCols * pairs_of(K)), 0xdeadbeefu);
  for (int64_t n = 0; n < N; n += kCols) {
    Pair* panel = packed.data() + n * pairs_of(K);
    if (transposed)
      pack_panel_transposed(w.data() + n * ld, ld, K, min(kCols, N - n), panel);
    else
      pack_panel(w.data() + n, ld, K, min(kCols, N - n), panel);
  }
  auto c = before;
  gemm_pairs(a.data(), lda, packed.data(), bias.data(), c.data(), ldc, M, N, K, start);
  double largest = 0;
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < ldc; ++n) {
      const size_t at = static_cast<size_t>(m * ldc + n);
      double want = before[at];
      if (n < N && start != Start::kAccumulate) want = start == Start::kBias ? bias[static_cast<size_t>(n)] : 0;
      for (int64_t k = 0; k < K && n < N; ++k) {
        const size_t weight = static_cast<size_t>(transposed ? n * ld + k : k * ld + n);
        want += double(rounded(a[static_cast<size_t>(m * lda + k)])) * rounded(w[weight]);
      }
      largest = std::fmax(largest, std::fabs(c[at] - want));
    }
  return largest;
}

}  // namespace

int main() {
  double largest = 0;
  int count = 0;
  for (int64_t M : {7, 49})
    for (int64_t K : {1, 2, 33, 64, 511, 1030})
      for (int64_t N : {1, 16, 33})
        for (Start start : {Start::kZero, Start::kBias, Start::kAccumulate})
          for (bool transposed : {false, true}) {
            largest = std::fmax(largest, largest_difference(M, N, K, start, transposed));
            ++count;
          }
  std::printf("%d %g\n", count, largest);
}
