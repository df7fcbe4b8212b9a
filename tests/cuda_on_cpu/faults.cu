// Small kernels with planted faults, and the same kernels done right: what the emulator must catch, and what it must
// not report. Driven by test_emulator.py:
//
//   faults NAME ORDER SEED RESIDENT   runs one kernel under one schedule
//   faults --list                     names all of them
//
// prints "ok", "wrong: ..." or "caught: ..." (a broken rule, found by the scheduler); the sanitizers report on stderr.
// Every faulty line carries the mark FAULT, which the test compares with the lines that the reports name.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace {

using pywm::cuda::kAllLanes;

constexpr int kThreads = 64;

// A device buffer of exactly its size.
template <typename T>
class Buffer {
 public:
  Buffer(size_t size, T value) : size_(size) {
    cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T));
    std::fill(data_, data_ + size, value);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  size_t size() const { return size_; }
  T operator[](size_t i) const { return data_[i]; }

 private:
  T* data_;
  size_t size_;
};

// "" where every element is as expected. A NaN differs from everything.
template <typename T>
std::string compare(const Buffer<T>& got, const std::function<double(size_t)>& expected) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (!(static_cast<double>(got[i]) == expected(i))) {
      return "element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " + std::to_string(expected(i));
    }
  }
  return "";
}

// ---- Barriers in a block ------------------------------------------------------------------------------------------

// Reverses 64 numbers through shared memory.
template <bool kBarrier>
__global__ void reverse_kernel(float* out) {
  PYWM_SHARED(float, row, [kThreads]);
  const int i = threadIdx.x;
  row[i] = static_cast<float>(i);
  if constexpr (kBarrier) __syncthreads();
  out[i] = row[kThreads - 1 - i];  // FAULT missing_syncthreads
}

template <bool kBarrier>
std::string reverse() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((reverse_kernel<kBarrier>), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return kThreads - 1.0 - static_cast<double>(i); });
}

// A tile that is used again: the barrier at the end of the loop protects what slower threads still read.
template <bool kBarrier>
__global__ void reuse_kernel(float* out) {
  PYWM_SHARED(float, row, [kThreads]);
  const int i = threadIdx.x;
  float sum = 0.f;
  for (int round = 0; round < 3; ++round) {
    row[i] = static_cast<float>(round * 100 + i);  // FAULT missing_second_syncthreads
    __syncthreads();
    sum += row[(i + 33) % kThreads];  // FAULT second_syncthreads_read
    if constexpr (kBarrier) __syncthreads();
  }
  out[i] = sum;
}

template <bool kBarrier>
std::string reuse() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((reuse_kernel<kBarrier>), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return 300.0 + 3.0 * static_cast<double>((i + 33) % kThreads); });
}

__global__ void uninitialised_shared_kernel(float* out) {
  PYWM_SHARED(float, row, [kThreads]);
  if (threadIdx.x > 0) row[threadIdx.x] = 1.f;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];  // FAULT uninitialised_shared
}

std::string uninitialised_shared() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((uninitialised_shared_kernel), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t) { return 1.0; });
}

__global__ void divergent_barrier_kernel(float* out) {
  if (threadIdx.x < 40) {
    __syncthreads();  // FAULT barrier_divergence
    out[threadIdx.x] = 1.f;
  } else {
    __syncthreads();
    out[threadIdx.x] = 1.f;
  }
}

std::string divergent_barrier() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((divergent_barrier_kernel), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t) { return 1.0; });
}

// One lane waits for the block while the others of its warp wait for it.
__global__ void deadlock_kernel(float* out) {
  if (threadIdx.x == 5) {
    __syncthreads();  // FAULT deadlock
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1.f;
}

std::string deadlock() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((deadlock_kernel), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t) { return 1.0; });
}

// Threads that leave early do not take part in later barriers.
__global__ void early_exit_kernel(float* out) {
  out[threadIdx.x] = 1.f;
  if (threadIdx.x >= 10) return;
  const int count = __syncthreads_count(threadIdx.x % 2);
  out[threadIdx.x] = static_cast<float>(count);
}

std::string early_exit() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((early_exit_kernel), dim3(1), dim3(kThreads), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return i < 10 ? 5.0 : 1.0; });
}

// ---- Bounds -------------------------------------------------------------------------------------------------------

template <bool kGuard>
__global__ void global_bounds_kernel(float* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (kGuard && i >= n) return;
  out[i] = 1.f;  // FAULT global_out_of_bounds
}

template <bool kGuard>
std::string global_bounds() {
  Buffer<float> out(100, -1.f);
  PYWM_LAUNCH((global_bounds_kernel<kGuard>), dim3(2), dim3(kThreads), 0, nullptr, out.data(), 100);
  return compare(out, [](size_t) { return 1.0; });
}

__global__ void static_shared_bounds_kernel(float* out, int n) {
  PYWM_SHARED(float, row, [kThreads]);
  for (int i = threadIdx.x; i < n; i += kThreads) row[i] = 1.f;  // FAULT static_shared_out_of_bounds
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

std::string static_shared_bounds() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((static_shared_bounds_kernel), dim3(1), dim3(kThreads), 0, nullptr, out.data(), kThreads + 1);
  return compare(out, [](size_t) { return 1.0; });
}

__global__ void dynamic_shared_bounds_kernel(float* out, int n) {
  PYWM_DYN_SHARED(bytes);
  float* row = reinterpret_cast<float*>(bytes);
  for (int i = threadIdx.x; i < n; i += kThreads) row[i] = 1.f;  // FAULT dynamic_shared_out_of_bounds
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}

template <int kElements>
std::string dynamic_shared_bounds() {
  Buffer<float> out(kThreads, -1.f);
  PYWM_LAUNCH((dynamic_shared_bounds_kernel), dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr, out.data(),
              kElements);
  return compare(out, [](size_t) { return 1.0; });
}

// Rows of an odd length: every second row starts where a 16-byte load may not.
__global__ void misaligned_vector_kernel(const float* in, float* out, int row_length) {
  const float4 v = *reinterpret_cast<const float4*>(in + row_length * threadIdx.x);  // FAULT misaligned_vector_load
  out[threadIdx.x] = v.x + v.y + v.z + v.w;
}

std::string misaligned_vector() {
  Buffer<float> in(64, 1.f);
  Buffer<float> out(2, -1.f);
  PYWM_LAUNCH((misaligned_vector_kernel), dim3(1), dim3(2), 0, nullptr, in.data(), out.data(), 7);
  return compare(out, [](size_t) { return 4.0; });
}

// A flat index in 32 bits, for sizes that a test would never allocate.
__global__ void int_overflow_kernel(const int* sizes, int64_t* out) {
  const int rows = sizes[0], columns = sizes[1];
  out[0] = rows * columns;  // FAULT int_overflow
}

std::string int_overflow() {
  Buffer<int> sizes(2, 65536);
  Buffer<int64_t> out(1, -1);
  PYWM_LAUNCH((int_overflow_kernel), dim3(1), dim3(1), 0, nullptr, sizes.data(), out.data());
  return compare(out, [](size_t) { return 65536.0 * 65536.0; });
}

// ---- Asynchronous copies ------------------------------------------------------------------------------------------

enum class CopyFault { kNone, kNoCommit, kNoWait, kNoBarrier, kWaitKeepsTooMany };

// Two tiles in two groups, each read by other threads than those that copied it.
template <CopyFault kFault>
__global__ void cp_async_kernel(const float* in, float* out) {
  PYWM_SHARED(float, tiles, [2][4 * kThreads]);
  const int i = threadIdx.x;
  for (int tile = 0; tile < 2; ++tile) {
    pywm::cuda::cp_async16(&tiles[tile][4 * i], in + (tile * kThreads + i) * 4);
    if constexpr (kFault != CopyFault::kNoCommit) pywm::cuda::cp_async_commit();
  }
  for (int tile = 0; tile < 2; ++tile) {
    if constexpr (kFault == CopyFault::kWaitKeepsTooMany)
      pywm::cuda::cp_async_wait<1>();
    else if constexpr (kFault != CopyFault::kNoWait)
      tile == 0 ? pywm::cuda::cp_async_wait<1>() : pywm::cuda::cp_async_wait<0>();
    if constexpr (kFault != CopyFault::kNoBarrier) __syncthreads();
    for (int k = 0; k < 4; ++k)
      out[(tile * kThreads + i) * 4 + k] = tiles[tile][4 * (kThreads - 1 - i) + k];  // FAULT cp_async
  }
}

template <CopyFault kFault>
std::string cp_async() {
  Buffer<float> in(8 * kThreads, 0.f);
  for (size_t i = 0; i < in.size(); ++i) in.data()[i] = static_cast<float>(i);
  Buffer<float> out(8 * kThreads, -1.f);
  PYWM_LAUNCH((cp_async_kernel<kFault>), dim3(1), dim3(kThreads), 0, nullptr, in.data(), out.data());
  return compare(out, [](size_t i) {
    const size_t tile = i / (4 * kThreads), thread = i / 4 % kThreads;
    return static_cast<double>((tile * kThreads + kThreads - 1 - thread) * 4 + i % 4);
  });
}

__global__ void misaligned_cp_async_kernel(const float* in, float* out) {
  PYWM_SHARED(float, tile, [8]);
  pywm::cuda::cp_async16(tile, in + 1);  // FAULT misaligned_cp_async
  pywm::cuda::cp_async_commit();
  pywm::cuda::cp_async_wait<0>();
  out[0] = tile[0];
}

std::string misaligned_cp_async() {
  Buffer<float> in(8, 1.f);
  Buffer<float> out(1, -1.f);
  PYWM_LAUNCH((misaligned_cp_async_kernel), dim3(1), dim3(1), 0, nullptr, in.data(), out.data());
  return compare(out, [](size_t) { return 1.0; });
}

__global__ void misaligned_ldmatrix_kernel(unsigned* out) {
  PYWM_SHARED(uint16_t, tile, [32 * 9]);  // rows of 9 elements: 18 bytes
  for (int i = threadIdx.x; i < 32 * 9; i += 32) tile[i] = 0;
  __syncwarp();
  uint32_t registers[4];
  pywm::cuda::ldmatrix_x4(registers, tile + 9 * threadIdx.x);  // FAULT misaligned_ldmatrix
  out[threadIdx.x] = registers[0];
}

std::string misaligned_ldmatrix() {
  Buffer<unsigned> out(32, 7);
  PYWM_LAUNCH((misaligned_ldmatrix_kernel), dim3(1), dim3(32), 0, nullptr, out.data());
  return compare(out, [](size_t) { return 0.0; });
}

// ---- Warps --------------------------------------------------------------------------------------------------------

// The lanes of a warp share memory too: a shuffle between them orders their registers, not their memory.
template <bool kSync>
__global__ void warp_exchange_kernel(float* out) {
  PYWM_SHARED(float, row, [32]);
  const int i = threadIdx.x;
  row[i] = static_cast<float>(i);
  const float one = __shfl_xor_sync(kAllLanes, 1.f, 1);
  if constexpr (kSync) __syncwarp();
  out[i] = row[i ^ 1] * one;  // FAULT missing_syncwarp
}

template <bool kSync>
std::string warp_exchange() {
  Buffer<float> out(32, -1.f);
  PYWM_LAUNCH((warp_exchange_kernel<kSync>), dim3(1), dim3(32), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return static_cast<double>(i ^ 1); });
}

__global__ void divergent_shuffle_kernel(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_xor_sync(kAllLanes, value, 1);  // FAULT shuffle_in_divergent_branch
  out[threadIdx.x] = value;
}

std::string divergent_shuffle() {
  Buffer<float> out(32, -1.f);
  PYWM_LAUNCH((divergent_shuffle_kernel), dim3(1), dim3(32), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return static_cast<double>(i < 16 ? i ^ 1 : i); });
}

__global__ void two_shuffles_kernel(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) {
    value = __shfl_xor_sync(kAllLanes, value, 1);  // FAULT lanes_at_different_shuffles
  } else {
    value = __shfl_xor_sync(kAllLanes, value, 1);
  }
  out[threadIdx.x] = value;
}

std::string two_shuffles() {
  Buffer<float> out(32, -1.f);
  PYWM_LAUNCH((two_shuffles_kernel), dim3(1), dim3(32), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return static_cast<double>(i ^ 1); });
}

__global__ void outside_mask_kernel(float* out) {
  float value = static_cast<float>(threadIdx.x);
  if (threadIdx.x < 16) value = __shfl_down_sync(0x0000ffffu, value, 8);  // FAULT shuffle_outside_mask
  out[threadIdx.x] = value;
}

std::string outside_mask() {
  Buffer<float> out(32, -1.f);
  PYWM_LAUNCH((outside_mask_kernel), dim3(1), dim3(32), 0, nullptr, out.data());
  return compare(out, [](size_t i) { return static_cast<double>(i < 16 ? i + 8 : i); });
}

// ---- Between blocks -----------------------------------------------------------------------------------------------

template <bool kAtomic>
__global__ void accumulate_kernel(float* sum) {
  if constexpr (kAtomic) {
    atomicAdd(sum + threadIdx.x, 1.f);
  } else {
    sum[threadIdx.x] += 1.f;  // FAULT block_race
  }
}

template <bool kAtomic>
std::string accumulate() {
  Buffer<float> sum(kThreads, 0.f);
  PYWM_LAUNCH((accumulate_kernel<kAtomic>), dim3(3), dim3(kThreads), 0, nullptr, sum.data());
  return compare(sum, [](size_t) { return 3.0; });
}

enum class GridBarrier { kGrid, kBlock, kByHand, kByHandWithoutFence };

// Every block passes its number on to its neighbour, round after round.
template <GridBarrier kBarrier>
__global__ void pass_on_kernel(float* cells, unsigned* arrived, int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const float* from = cells + round % 2 * gridDim.x;
    float* to = cells + (round + 1) % 2 * gridDim.x;
    if (threadIdx.x == 0) to[blockIdx.x] = from[(blockIdx.x + 1) % gridDim.x] + 1.f;  // FAULT grid_barrier
    if constexpr (kBarrier == GridBarrier::kGrid) {
      cooperative_groups::this_grid().sync();
    } else if constexpr (kBarrier == GridBarrier::kBlock) {
      __syncthreads();
    } else {
      if (threadIdx.x == 0) {
        if constexpr (kBarrier == GridBarrier::kByHand) __threadfence();
        atomicAdd(arrived, 1u);
        while (pywm::cuda::load_acquire(arrived) < (round + 1) * gridDim.x) {
        }
      }
      __syncthreads();
    }
  }
}

template <GridBarrier kBarrier, bool kCooperative = true>
std::string pass_on() {
  constexpr int kBlocks = 4, kRounds = 4;
  Buffer<float> cells(2 * kBlocks, 0.f);
  Buffer<unsigned> arrived(1, 0);
  if (kCooperative) {
    PYWM_LAUNCH_COOP((pass_on_kernel<kBarrier>), dim3(kBlocks), dim3(32), 0, nullptr, cells.data(), arrived.data(),
                     kRounds);
  } else {
    PYWM_LAUNCH((pass_on_kernel<kBarrier>), dim3(kBlocks), dim3(32), 0, nullptr, cells.data(), arrived.data(), kRounds);
  }
  return compare(cells, [](size_t i) { return i < kBlocks ? kRounds : kRounds - 1.0; });
}

// The block that arrives last adds up what all of them left in global memory.
template <bool kFence>
__global__ void last_block_sum_kernel(float* partial, unsigned* arrived, float* out) {
  PYWM_SHARED(bool, is_last, [1]);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<float>(blockIdx.x + 1);
    if constexpr (kFence) __threadfence();
    is_last[0] = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last[0]) return;
  if (threadIdx.x == 0) {
    float sum = 0.f;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];  // FAULT missing_fence
    out[0] = sum;
  }
}

template <bool kFence>
std::string last_block_sum() {
  Buffer<float> partial(5, 0.f), out(1, -1.f);
  Buffer<unsigned> arrived(1, 0);
  PYWM_LAUNCH((last_block_sum_kernel<kFence>), dim3(5), dim3(32), 0, nullptr, partial.data(), arrived.data(),
              out.data());
  return compare(out, [](size_t) { return 15.0; });
}

__global__ void spin_kernel(const unsigned* flag) {
  while (pywm::cuda::load_acquire(flag) == 0) {  // FAULT livelock
  }
}

std::string spin() {
  Buffer<unsigned> flag(1, 0);
  PYWM_LAUNCH((spin_kernel), dim3(1), dim3(32), 0, nullptr, flag.data());
  return "";
}

// ---- Launches -----------------------------------------------------------------------------------------------------

__global__ void nothing_kernel(int) {}

std::string too_many_threads() {
  PYWM_LAUNCH((nothing_kernel), dim3(1), dim3(64, 32), 0, nullptr, 0);
  return "";
}

std::string no_blocks() {
  PYWM_LAUNCH((nothing_kernel), dim3(0), dim3(32), 0, nullptr, 0);
  return "";
}

template <bool kAsked>
std::string much_shared() {
  constexpr int kBytes = 64 * 1024;
  if (kAsked) cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  PYWM_LAUNCH((nothing_kernel), dim3(1), dim3(32), kBytes, nullptr, 0);
  return "";
}

const std::map<std::string, std::function<std::string()>> kKernels = {
    // Planted faults.
    {"missing_syncthreads", reverse<false>},
    {"missing_second_syncthreads", reuse<false>},
    {"uninitialised_shared", uninitialised_shared},
    {"barrier_divergence", divergent_barrier},
    {"deadlock", deadlock},
    {"livelock", spin},
    {"global_out_of_bounds", global_bounds<false>},
    {"static_shared_out_of_bounds", static_shared_bounds},
    {"dynamic_shared_out_of_bounds", dynamic_shared_bounds<kThreads + 1>},
    {"misaligned_vector_load", misaligned_vector},
    {"int_overflow", int_overflow},
    {"cp_async_without_commit", cp_async<CopyFault::kNoCommit>},
    {"cp_async_without_wait", cp_async<CopyFault::kNoWait>},
    {"cp_async_wait_keeps_too_many", cp_async<CopyFault::kWaitKeepsTooMany>},
    {"cp_async_without_barrier", cp_async<CopyFault::kNoBarrier>},
    {"misaligned_cp_async", misaligned_cp_async},
    {"misaligned_ldmatrix", misaligned_ldmatrix},
    {"missing_syncwarp", warp_exchange<false>},
    {"shuffle_in_divergent_branch", divergent_shuffle},
    {"lanes_at_different_shuffles", two_shuffles},
    {"shuffle_outside_mask", outside_mask},
    {"block_race", accumulate<false>},
    {"grid_sync_replaced_by_syncthreads", pass_on<GridBarrier::kBlock>},
    {"grid_sync_without_cooperative_launch", pass_on<GridBarrier::kGrid, false>},
    {"hand_barrier_without_fence", pass_on<GridBarrier::kByHandWithoutFence>},
    {"last_block_without_fence", last_block_sum<false>},
    {"too_many_threads", too_many_threads},
    {"no_blocks", no_blocks},
    {"much_shared_unasked", much_shared<false>},
    // The same done right.
    {"clean_syncthreads", reverse<true>},
    {"clean_second_syncthreads", reuse<true>},
    {"clean_early_exit", early_exit},
    {"clean_global_bounds", global_bounds<true>},
    {"clean_dynamic_shared", dynamic_shared_bounds<kThreads>},
    {"clean_cp_async", cp_async<CopyFault::kNone>},
    {"clean_syncwarp", warp_exchange<true>},
    {"clean_atomics", accumulate<true>},
    {"clean_grid_sync", pass_on<GridBarrier::kGrid>},
    {"clean_hand_barrier", pass_on<GridBarrier::kByHand>},
    {"clean_last_block", last_block_sum<true>},
    {"clean_much_shared", much_shared<true>},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string(argv[1]) == "--list") {
    for (const auto& [name, run] : kKernels) std::printf("%s\n", name.c_str());
    return 0;
  }
  if (argc != 5 || kKernels.count(argv[1]) == 0) {
    std::fprintf(stderr, "usage: faults NAME ORDER SEED RESIDENT, with a NAME of faults --list\n");
    return 2;
  }
  emulator::set_schedule(static_cast<emulator::Order>(std::atoi(argv[2])), std::strtoull(argv[3], nullptr, 10),
                         std::atoi(argv[4]));
  try {
    const std::string difference = kKernels.at(argv[1])();
    std::printf("%s%s\n", difference.empty() ? "ok" : "wrong: ", difference.c_str());
  } catch (const std::exception& error) {
    std::printf("caught: %s\n", error.what());
  }
  return 0;
}
