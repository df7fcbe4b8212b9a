// Do the wrappers of csrc/cuda/device.cuh do what their comments say? The same source answers for a GPU and for the
// emulator, whose idea of the hardware was taken from the PTX manual and must be held against it:
//
//   nvcc -std=c++20 -arch=native -I csrc tests/cuda_on_cpu/conformance.cu -o conformance && ./conformance
//
// Operands are small integers, so every expectation is exact, computed here in plain C++. Prints PASS or FAIL for each
// wrapper; exit code 0: all pass, 1: some fail, 2: no device.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace {

using namespace pywm::cuda;

void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// An array on the device, filled from one on the host and read back into one.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(const std::vector<T>& host) : size_(host.size()) {
    require(cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(T)), "cudaMalloc");
    require(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  T* data() { return data_; }
  std::vector<T> read() const {
    std::vector<T> host(size_);
    require(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
    return host;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// Waits for the device: a fault inside a kernel shows here.
void finish(const char* kernel) {
  require(cudaGetLastError(), kernel);
  require(cudaDeviceSynchronize(), kernel);
}

int small_integer(unsigned i) {
  const unsigned scattered = (i * 2654435761u) >> 16;
  return static_cast<int>(scattered % 15) - 7;
}

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

template <typename T>
void expect_equal(const std::vector<T>& got, const std::function<double(size_t)>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    const double value = static_cast<double>(got[i]);
    expect(value == expected(i),
           "element " + std::to_string(i) + " is " + std::to_string(value) + ", not " + std::to_string(expected(i)));
  }
}

// ---- cp.async -----------------------------------------------------------------------------------------------------

constexpr int kGroups = 3, kCopyThreads = 64;

// Three groups under way, waited for one after the other; every thread reads what another one copied.
__global__ void cp_async_kernel(const float* in, float* out) {
  PYWM_SHARED(float4, tiles, [kGroups][kCopyThreads]);
  const int i = threadIdx.x;
  for (int group = 0; group < kGroups; ++group) {
    cp_async16(&tiles[group][i], in + (group * kCopyThreads + i) * 4);
    cp_async_commit();
  }
  for (int group = 0; group < kGroups; ++group) {
    if (group == 0) cp_async_wait<2>();
    if (group == 1) cp_async_wait<1>();
    if (group == 2) cp_async_wait<0>();
    __syncthreads();
    const float4 v = tiles[group][kCopyThreads - 1 - i];
    float* to = out + (group * kCopyThreads + i) * 4;
    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
  }
}

void cp_async() {
  const size_t size = size_t{kGroups} * kCopyThreads * 4;
  std::vector<float> host(size);
  for (size_t i = 0; i < size; ++i) host[i] = static_cast<float>(i);
  DeviceArray<float> in(host), out(std::vector<float>(size, -1.f));
  PYWM_LAUNCH((cp_async_kernel), dim3(1), dim3(kCopyThreads), 0, nullptr, in.data(), out.data());
  finish("cp_async_kernel");
  expect_equal(out.read(), [](size_t i) {
    const size_t group = i / (4 * kCopyThreads), thread = i / 4 % kCopyThreads;
    return static_cast<double>((group * kCopyThreads + kCopyThreads - 1 - thread) * 4 + i % 4);
  });
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

constexpr int kTileRows = 32, kTileStride = 24;  // rows of 8 elements, 48 bytes apart: aligned to 16, not to 32

template <bool kTransposed>
__global__ void ldmatrix_kernel(uint32_t* out) {
  PYWM_SHARED(uint4, aligned, [kTileRows * kTileStride / 8]);
  uint16_t* rows = reinterpret_cast<uint16_t*>(aligned);
  for (int column = 0; column < 8; ++column) {
    rows[threadIdx.x * kTileStride + column] = static_cast<uint16_t>(threadIdx.x * 8 + column);
  }
  __syncwarp();
  uint32_t registers[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_transposed(registers, rows + threadIdx.x * kTileStride);
  } else {
    ldmatrix_x4(registers, rows + threadIdx.x * kTileStride);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = registers[i];
}

template <bool kTransposed>
void ldmatrix() {
  DeviceArray<uint32_t> out(std::vector<uint32_t>(32 * 4, 0xffffffffu));
  PYWM_LAUNCH((ldmatrix_kernel<kTransposed>), dim3(1), dim3(32), 0, nullptr, out.data());
  finish("ldmatrix_kernel");
  expect_equal(out.read(), [](size_t i) {
    const size_t lane = i / 4, tile = i % 4;
    const auto element = [&](size_t k) {
      const size_t row = kTransposed ? 2 * (lane % 4) + k : lane / 4;
      const size_t column = kTransposed ? lane / 4 : 2 * (lane % 4) + k;
      return (tile * 8 + row) * 8 + column;
    };
    return static_cast<double>(element(0) | element(1) << 16);
  });
}

// ---- mma ----------------------------------------------------------------------------------------------------------

constexpr int kM = 16, kN = 8, kK = 16;

__device__ uint32_t pair(const __nv_bfloat16* low, const __nv_bfloat16* high) {
  uint16_t bits[2];
  memcpy(&bits[0], low, 2);
  memcpy(&bits[1], high, 2);
  return static_cast<uint32_t>(bits[0]) | static_cast<uint32_t>(bits[1]) << 16;
}

// Fragments gathered by hand, as the comment of mma_m16n8k16 says. b is [K, N], row-major.
__global__ void mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  const int group = threadIdx.x / 4, member = threadIdx.x % 4;
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat16* at = a + (group + i % 2 * 8) * kK + 2 * member + i / 2 * 8;
    of_a[i] = pair(at, at + 1);
  }
  for (int i = 0; i < 2; ++i) {
    const __nv_bfloat16* at = b + (2 * member + i * 8) * kN + group;
    of_b[i] = pair(at, at + kN);
  }
  float of_c[4];
  const auto address = [&](int i) { return c + (group + i / 2 * 8) * kN + 2 * member + i % 2; };
  for (int i = 0; i < 4; ++i) of_c[i] = *address(i);
  mma_m16n8k16(of_c, of_a, of_b);
  for (int i = 0; i < 4; ++i) *address(i) = of_c[i];
}

// Fragments by ldmatrix: a from row-major [M, K]; b from [N, K], or from [K, N] transposed on the way.
template <bool kTransposedB>
__global__ void ldmatrix_mma_kernel(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
  constexpr int kStride = 24;
  PYWM_SHARED(uint4, shared_a, [kM * kStride / 8]);
  PYWM_SHARED(uint4, shared_b, [kK * kStride / 8]);
  __nv_bfloat16* rows_a = reinterpret_cast<__nv_bfloat16*>(shared_a);
  __nv_bfloat16* rows_b = reinterpret_cast<__nv_bfloat16*>(shared_b);
  const int lane = threadIdx.x;
  for (int i = lane; i < kM * kK; i += 32) rows_a[i / kK * kStride + i % kK] = a[i];
  for (int i = lane; i < kK * kN; i += 32) {
    const int k = i / kN, n = i % kN;
    rows_b[kTransposedB ? k * kStride + n : n * kStride + k] = b[i];
  }
  __syncwarp();
  uint32_t of_a[4], of_b[4];
  ldmatrix_x4(of_a, rows_a + lane % 16 * kStride + lane / 16 * 8);
  // Two tiles are enough for b; the other lanes point at the same rows again.
  if constexpr (kTransposedB) {
    ldmatrix_x4_transposed(of_b, rows_b + lane % 16 * kStride);
  } else {
    ldmatrix_x4(of_b, rows_b + lane % 8 * kStride + lane / 8 % 2 * 8);
  }
  const uint32_t both[2] = {of_b[0], of_b[1]};
  const int group = lane / 4, member = lane % 4;
  float of_c[4];
  const auto address = [&](int i) { return c + (group + i / 2 * 8) * kN + 2 * member + i % 2; };
  for (int i = 0; i < 4; ++i) of_c[i] = *address(i);
  mma_m16n8k16(of_c, of_a, both);
  for (int i = 0; i < 4; ++i) *address(i) = of_c[i];
}

void mma(const std::function<void(const __nv_bfloat16*, const __nv_bfloat16*, float*)>& launch) {
  for (unsigned seed = 0; seed < 4; ++seed) {
    std::vector<__nv_bfloat16> a(kM * kK), b(kK * kN);
    std::vector<float> c(kM * kN);
    const auto value_a = [=](size_t i) { return small_integer(static_cast<unsigned>(1000 * seed + i)); };
    const auto value_b = [=](size_t i) { return small_integer(static_cast<unsigned>(7777 + 1000 * seed + i)); };
    for (size_t i = 0; i < a.size(); ++i) a[i] = __float2bfloat16(static_cast<float>(value_a(i)));
    for (size_t i = 0; i < b.size(); ++i) b[i] = __float2bfloat16(static_cast<float>(value_b(i)));
    for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
    DeviceArray<__nv_bfloat16> device_a(a), device_b(b);
    DeviceArray<float> device_c(c);
    launch(device_a.data(), device_b.data(), device_c.data());
    finish("mma");
    expect_equal(device_c.read(), [&](size_t i) {
      const size_t row = i / kN, column = i % kN;
      int sum = static_cast<int>(i);
      for (size_t k = 0; k < kK; ++k) sum += value_a(row * kK + k) * value_b(k * kN + column);
      return static_cast<double>(sum);
    });
  }
}

void mma_by_hand() {
  mma([](const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    PYWM_LAUNCH((mma_kernel), dim3(1), dim3(32), 0, nullptr, a, b, c);
  });
}

template <bool kTransposedB>
void mma_from_ldmatrix() {
  mma([](const __nv_bfloat16* a, const __nv_bfloat16* b, float* c) {
    PYWM_LAUNCH((ldmatrix_mma_kernel<kTransposedB>), dim3(1), dim3(32), 0, nullptr, a, b, c);
  });
}

// ---- Warps and blocks ---------------------------------------------------------------------------------------------

constexpr int kReduceThreads = 128;

template <typename S>
__global__ void reduce_kernel(const S* in, S* warp_sums, S* group_sums, S* group_maxima, double* block_sums) {
  const int i = threadIdx.x;
  warp_sums[i] = warp_sum(in[i]);
  group_sums[i] = group_sum<8>(in[i]);
  group_maxima[i] = group_max<8>(in[i]);
  for (int round = 0; round < 2; ++round) {  // twice: the second call must not disturb the first one's readers
    double values[2] = {static_cast<double>(in[i]), static_cast<double>(round)};
    block_sum<kReduceThreads>(values);
    block_sums[2 * i + round] = values[round];
  }
}

template <typename S>
void reductions() {
  std::vector<S> host(kReduceThreads);
  for (size_t i = 0; i < host.size(); ++i) host[i] = static_cast<S>(small_integer(static_cast<unsigned>(i)));
  const std::vector<S> unset(kReduceThreads, S(-1000));
  DeviceArray<S> in(host), warp_sums(unset), group_sums(unset), group_maxima(unset);
  DeviceArray<double> block_sums(std::vector<double>(2 * kReduceThreads, -1000.0));
  PYWM_LAUNCH((reduce_kernel<S>), dim3(1), dim3(kReduceThreads), 0, nullptr, in.data(), warp_sums.data(),
              group_sums.data(), group_maxima.data(), block_sums.data());
  finish("reduce_kernel");
  const auto sum = [&](size_t first, size_t count) {
    double total = 0;
    for (size_t i = first; i < first + count; ++i) total += static_cast<double>(host[i]);
    return total;
  };
  expect_equal(warp_sums.read(), [&](size_t i) { return sum(i / 32 * 32, 32); });
  expect_equal(group_sums.read(), [&](size_t i) { return sum(i / 8 * 8, 8); });
  expect_equal(group_maxima.read(), [&](size_t i) {
    return static_cast<double>(*std::max_element(host.begin() + static_cast<std::ptrdiff_t>(i / 8 * 8),
                                                 host.begin() + static_cast<std::ptrdiff_t>(i / 8 * 8 + 8)));
  });
  expect_equal(block_sums.read(), [&](size_t i) { return i % 2 ? kReduceThreads : sum(0, kReduceThreads); });
}

constexpr int kShuffles = 7;

__global__ void shuffle_kernel(int* out) {
  const int i = threadIdx.x;
  int* mine = out + i * kShuffles;
  mine[0] = __shfl_sync(kAllLanes, i, 5);
  mine[1] = __shfl_sync(kAllLanes, i, 5, 8);
  mine[2] = __shfl_up_sync(kAllLanes, i, 3);
  mine[3] = __shfl_down_sync(kAllLanes, i, 3, 16);
  mine[4] = __shfl_xor_sync(kAllLanes, i, 9);
  mine[5] = static_cast<int>(__ballot_sync(kAllLanes, i % 3 == 0));
  mine[6] = __syncthreads_count(i % 2);
}

void shuffles() {
  DeviceArray<int> out(std::vector<int>(32 * kShuffles, -1));
  PYWM_LAUNCH((shuffle_kernel), dim3(1), dim3(32), 0, nullptr, out.data());
  finish("shuffle_kernel");
  expect_equal(out.read(), [](size_t i) {
    const int lane = static_cast<int>(i) / kShuffles;
    const double expected[kShuffles] = {
        5.0,
        lane / 8 * 8 + 5.0,
        lane < 3 ? lane : lane - 3.0,
        lane % 16 + 3 < 16 ? lane + 3.0 : lane,
        static_cast<double>(lane ^ 9),
        static_cast<double>(static_cast<int>(0x49249249u)),
        16.0,
    };
    return expected[i % kShuffles];
  });
}

// ---- Grids and shared memory --------------------------------------------------------------------------------------

// Every block passes its number on to its neighbour, round after round. The thread that passes on is not the one that
// waits for the grid: what the waiting thread acquires must be visible to its whole block.
template <bool kByHand>
__global__ void pass_on_kernel(float* cells, unsigned* arrived, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const float* from = cells + round % 2 * gridDim.x;
    float* to = cells + (round + 1) % 2 * gridDim.x;
    if (threadIdx.x == 33) to[blockIdx.x] = from[(blockIdx.x + 1) % gridDim.x] + 1.f;
    if constexpr (kByHand) {
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(arrived, 1u);
        while (load_acquire(arrived) < (round + 1) * gridDim.x) {
        }
      }
      __syncthreads();
    } else {
      cooperative_groups::this_grid().sync();
    }
  }
}

template <bool kByHand>
void grid_barrier() {
  constexpr int kBlocks = 16, kRounds = 50;
  std::vector<float> host(2 * kBlocks, 0.f);
  for (int i = 0; i < kBlocks; ++i) host[i] = static_cast<float>(100 * i);
  DeviceArray<float> cells(host);
  DeviceArray<unsigned> arrived(std::vector<unsigned>(1, 0));
  PYWM_LAUNCH_COOP((pass_on_kernel<kByHand>), dim3(kBlocks), dim3(64), 0, nullptr, cells.data(), arrived.data(),
                   kRounds);
  finish("pass_on_kernel");
  const std::vector<float> got = cells.read();
  expect_equal(std::vector<float>(got.begin(), got.begin() + kBlocks),
               [](size_t i) { return 100.0 * static_cast<double>((i + kRounds) % kBlocks) + kRounds; });
}

__global__ void dynamic_shared_kernel(int* out, int n) {
  PYWM_DYN_SHARED(bytes);
  int* row = reinterpret_cast<int*>(bytes);
  for (int i = threadIdx.x; i < n; i += blockDim.x) row[i] = i;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = row[n - 1 - i];
}

void much_dynamic_shared() {
  constexpr int kInts = 96 * 1024 / 4;
  DeviceArray<int> out(std::vector<int>(kInts, -1));
  require(cudaFuncSetAttribute(dynamic_shared_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kInts * 4),
          "cudaFuncSetAttribute");
  PYWM_LAUNCH((dynamic_shared_kernel), dim3(1), dim3(128), kInts * 4, nullptr, out.data(), kInts);
  finish("dynamic_shared_kernel");
  expect_equal(out.read(), [](size_t i) { return kInts - 1.0 - static_cast<double>(i); });
}

struct Check {
  const char* name;
  void (*run)();
};

const Check kChecks[] = {
    {"cp_async16, cp_async_commit, cp_async_wait", cp_async},
    {"ldmatrix_x4", ldmatrix<false>},
    {"ldmatrix_x4_transposed", ldmatrix<true>},
    {"mma_m16n8k16", mma_by_hand},
    {"mma_m16n8k16 from ldmatrix_x4", mma_from_ldmatrix<false>},
    {"mma_m16n8k16 from ldmatrix_x4_transposed", mma_from_ldmatrix<true>},
    {"warp_sum, group_sum, group_max, block_sum (float)", reductions<float>},
    {"warp_sum, group_sum, group_max, block_sum (double)", reductions<double>},
    {"shuffles, ballot, count", shuffles},
    {"grid.sync in PYWM_LAUNCH_COOP", grid_barrier<false>},
    {"load_acquire in a grid barrier", grid_barrier<true>},
    {"PYWM_DYN_SHARED of 96 KB", much_dynamic_shared},
};

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 2;
  }
  int failures = 0;
  for (const Check& check : kChecks) {
    try {
      check.run();
      std::printf("PASS %s\n", check.name);
    } catch (const std::exception& error) {
      std::printf("FAIL %s: %s\n", check.name, error.what());
      ++failures;
    }
  }
  return failures == 0 ? 0 : 1;
}
