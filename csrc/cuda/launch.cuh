// Shared by all .cu files: how a kernel is launched, and the check behind every launch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

// PYWM_LAUNCH((kernel<float, 8>), grid, block, dynamic shared bytes, stream, arguments...). Through a macro, because
// the emulator of tests/cuda_on_cpu runs the same source. PYWM_LAUNCH_COOP: all blocks are resident together and may
// call grid.sync.
#if defined(PYWM_EMULATED)
#define PYWM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  EMULATOR_LAUNCH(kernel, false, grid, block, shared_bytes, stream, __VA_ARGS__)
#define PYWM_LAUNCH_COOP(kernel, grid, block, shared_bytes, stream, ...) \
  EMULATOR_LAUNCH(kernel, true, grid, block, shared_bytes, stream, __VA_ARGS__)
#else
// clang-format off
#define PYWM_UNPACK(...) __VA_ARGS__
#define PYWM_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (PYWM_UNPACK kernel)<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#define PYWM_LAUNCH_COOP(kernel, grid, block, shared_bytes, stream, ...) \
  ::pywm::cuda::launch_cooperative((PYWM_UNPACK kernel), grid, block, shared_bytes, \
                                   static_cast<cudaStream_t>(stream), __VA_ARGS__)
// clang-format on
#endif

namespace pywm::cuda {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Call after every launch: reports a bad one here rather than at some later synchronisation.
inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaErrorNoKernelImageForDevice)
    throw std::runtime_error(std::string(op) +
                             ": the kernels were not built for this GPU; pywm.backend(x) tells for which");
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": CUDA launch failed: " + cudaGetErrorString(error));
}

#if !defined(PYWM_EMULATED)
// The arguments are converted to the kernel's own parameter types, whose addresses the runtime reads.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                        Arguments... arguments) {
  const auto launch = [&](Parameters... parameters) {
    void* addresses[] = {const_cast<void*>(static_cast<const void*>(&parameters))...};
    cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared_bytes, stream);
  };
  launch(arguments...);
}
#endif

}  // namespace pywm::cuda
