// What the binding asks of the CUDA runtime besides launches.

#include <cuda_runtime.h>

#include "../ops.h"

namespace pywm::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

const char* status() {
  int count = 0;
  return cudaGetErrorString(cudaGetDeviceCount(&count));
}

int current_device() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

void set_device(int device) { cudaSetDevice(device); }

}  // namespace pywm::cuda
