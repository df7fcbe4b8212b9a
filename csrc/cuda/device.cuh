// What the CUDA kernels need of the hardware: shared memory, asynchronous copies, tensor cores, acquire loads, warp
// reductions. The only PTX of the project, all of it for sm_80 and later.
//
// The same kernels run on the CPU in tests/cuda_on_cpu, which defines PYWM_EMULATED: that is why shared arrays are
// declared through macros, and why every wrapper has a second body.
// tests/cuda_on_cpu/conformance.cu compares the two bodies; run it on every new kind of device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

// PYWM_SHARED(float, tile, [8][33]) declares a static shared array; PYWM_DYN_SHARED(bytes) the dynamic one.
#if defined(PYWM_EMULATED)
#define PYWM_SHARED(type, name, dims) EMULATOR_SHARED(type, name, dims)
#define PYWM_DYN_SHARED(name) EMULATOR_DYN_SHARED(name)
#else
#define PYWM_SHARED(type, name, dims) __shared__ type name dims
#define PYWM_DYN_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace pywm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- Asynchronous copies from global to shared memory --------------------------------------------------------------

#if !defined(PYWM_EMULATED)
__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
#endif

// 16 bytes, both addresses aligned to 16. Visible to this thread after the wait for its group, to the block after the
// __syncthreads that follows it.
__device__ __forceinline__ void cp_async16(void* shared, const void* global) {
#if defined(PYWM_EMULATED)
  emulator::cp_async(shared, global, 16, emulator::copy_bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;\n" ::"r"(shared_address(shared)), "l"(global) : "memory");
#endif
}

// Closes the group of copies begun since the last commit.
__device__ __forceinline__ void cp_async_commit() {
#if defined(PYWM_EMULATED)
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most the `kKeep` youngest committed groups are still under way.
template <int kKeep>
__device__ __forceinline__ void cp_async_wait() {
#if defined(PYWM_EMULATED)
  emulator::cp_async_wait(kKeep);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kKeep) : "memory");
#endif
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------------

// Four 8 x 8 tiles of 16-bit elements. Lane l passes the 16-byte aligned address of row l % 8 of tile l / 8; it gets
// from tile i, in registers[i], elements 2·(l % 4) and 2·(l % 4) + 1 of row l / 4.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&registers)[4], const void* row) {
#if defined(PYWM_EMULATED)
  emulator::ldmatrix_x4(registers, row, false, EMULATOR_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same with every tile transposed: elements 2·(l % 4) and 2·(l % 4) + 1 of column l / 4.
__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&registers)[4], const void* row) {
#if defined(PYWM_EMULATED)
  emulator::ldmatrix_x4(registers, row, true, EMULATOR_HERE);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// c += a·b in float32 for bfloat16 a [16, 16] (row-major) and b [16, 8] (column-major). With g = lane / 4, q = lane %
// 4:
//   a[0], a[1], a[2], a[3]  a(g, 2q..), a(g + 8, 2q..), a(g, 2q + 8..), a(g + 8, 2q + 8..), two elements each
//   b[0], b[1]              b(2q.., g), b(2q + 8.., g), two elements each
//   c[0], c[1], c[2], c[3]  c(g, 2q), c(g, 2q + 1), c(g + 8, 2q), c(g + 8, 2q + 1)
// ldmatrix_x4 delivers a from the tiles (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(PYWM_EMULATED)
  emulator::mma_m16n8k16(c, a, b, EMULATOR_HERE);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// ---- Memory order ---------------------------------------------------------------------------------------------------

// What other blocks wrote before the atomic (behind a __threadfence) that stored this value is visible afterwards.
__device__ __forceinline__ unsigned load_acquire(const unsigned* address) {
#if defined(PYWM_EMULATED)
  return emulator::load_acquire(address);
#else
  unsigned value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];\n" : "=r"(value) : "l"(address) : "memory");
  return value;
#endif
}

// ---- Warp reductions ------------------------------------------------------------------------------------------------

// Every lane gets the sum, added up in the same tree in every run.
template <typename S>
__device__ __forceinline__ S warp_sum(S value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += __shfl_xor_sync(kAllLanes, value, lanes);
  return value;
}

}  // namespace pywm::cuda
