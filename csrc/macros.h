// Compiler portability. The only header every other header may include.
#pragma once

#if defined(__CUDACC__)
#define PYWM_HD __host__ __device__ __forceinline__
#else
#define PYWM_HD inline __attribute__((always_inline))
#endif
