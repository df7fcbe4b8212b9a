// How long a grid-wide barrier takes on this GPU, by hand and cooperative groups': what a persistent scan would pay
// after each phase. One that takes more than 2 us with an empty phase is not worth building on.
//
//   nvcc -std=c++20 -O2 -arch=native -I csrc benchmarks/barrier.cu -o barrier && ./barrier
//
// Prints a line of JSON: microseconds a barrier for blocks of 256 threads, one on each multiprocessor, the median of
// kRuns launches of kBarriers barriers; and whether the counter says that every block came to every barrier. Exit code
// 0: measured, 1: a barrier let somebody through too early, 2: no device.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.cuh"

namespace {

using namespace pywm::cuda;

constexpr int kThreads = 256, kBarriers = 1000, kRuns = 21;

// One thread of a block counts it in and waits for all; the count only grows, so that nobody has to reset it.
__device__ __forceinline__ void wait_for_all(unsigned* count, unsigned target) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(count, 1u);
    while (load_acquire(count) < target) {
    }
    __threadfence();
  }
  __syncthreads();
}

// Block b says in `round` how far it is; after a barrier its neighbour must have said as much.
__global__ void by_hand(unsigned* count, unsigned* round, unsigned* early) {
  const unsigned neighbour = (blockIdx.x + 1) % gridDim.x;
  for (unsigned i = 1; i <= kBarriers; ++i) {
    if (threadIdx.x == 0) atomicExch(round + blockIdx.x, i);
    wait_for_all(count, i * gridDim.x);
    if (threadIdx.x == 0 && load_acquire(round + neighbour) < i) atomicAdd(early, 1u);
  }
}

__global__ void by_groups(unsigned* round, unsigned* early) {
  const auto grid = cooperative_groups::this_grid();
  const unsigned neighbour = (blockIdx.x + 1) % gridDim.x;
  for (unsigned i = 1; i <= kBarriers; ++i) {
    if (threadIdx.x == 0) atomicExch(round + blockIdx.x, i);
    grid.sync();
    if (threadIdx.x == 0 && load_acquire(round + neighbour) < i) atomicAdd(early, 1u);
  }
}

// What the loop costs without a barrier.
__global__ void without(unsigned* round, unsigned* early) {
  const unsigned neighbour = (blockIdx.x + 1) % gridDim.x;
  for (unsigned i = 1; i <= kBarriers; ++i) {
    if (threadIdx.x == 0) atomicExch(round + blockIdx.x, i);
    __syncthreads();
    if (threadIdx.x == 0 && load_acquire(round + neighbour) == ~0u) atomicAdd(early, 1u);
  }
}

template <typename Launch>
double microseconds(const Launch& launch) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start);
  cudaEventCreate(&stop);
  std::vector<float> times;
  for (int run = 0; run < kRuns; ++run) {
    launch.reset();
    cudaEventRecord(start);
    launch();
    cudaEventRecord(stop);
    cudaEventSynchronize(stop);
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    times.push_back(ms);
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2] * 1e3 / kBarriers;
}

template <typename Reset, typename Run>
struct Launch {
  Reset reset;
  Run run;
  void operator()() const { run(); }
};

}  // namespace

int main() {
  int device = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&device) != cudaSuccess || cudaGetDeviceProperties(&properties, device) != cudaSuccess) {
    std::fprintf(stderr, "no device\n");
    return 2;
  }
  const dim3 grid(static_cast<unsigned>(properties.multiProcessorCount)), block(kThreads);
  unsigned *count = nullptr, *round = nullptr, *early = nullptr;
  cudaMalloc(reinterpret_cast<void**>(&count), sizeof(unsigned));
  cudaMalloc(reinterpret_cast<void**>(&round), grid.x * sizeof(unsigned));
  cudaMalloc(reinterpret_cast<void**>(&early), sizeof(unsigned));
  cudaMemset(early, 0, sizeof(unsigned));
  const auto reset = [&] {
    cudaMemset(count, 0, sizeof(unsigned));
    cudaMemset(round, 0, grid.x * sizeof(unsigned));
  };
  const auto time = [&](auto run) { return microseconds(Launch<decltype(reset), decltype(run)>{reset, run}); };
  const double hand = time([&] { PYWM_LAUNCH_COOP((by_hand), grid, block, 0, nullptr, count, round, early); });
  const double groups = time([&] { PYWM_LAUNCH_COOP((by_groups), grid, block, 0, nullptr, round, early); });
  const double empty = time([&] { PYWM_LAUNCH((without), grid, block, 0, nullptr, round, early); });
  unsigned too_early = 0;
  cudaMemcpy(&too_early, early, sizeof(unsigned), cudaMemcpyDeviceToHost);
  const cudaError_t error = cudaDeviceSynchronize();
  std::printf(
      "{\"device\": \"%s\", \"blocks\": %u, \"barrier_by_hand_us\": %.3f, \"grid_sync_us\": %.3f, \"no_barrier_us\": "
      "%.3f, \"too_early\": %u, \"error\": \"%s\"}\n",
      properties.name, grid.x, hand, groups, empty, too_early, cudaGetErrorString(error));
  return too_early == 0 && error == cudaSuccess ? 0 : 1;
}
