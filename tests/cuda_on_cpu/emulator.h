// CUDA C++ executed on the CPU, for tests: every CUDA thread is a fiber of one operating system thread.
//
//   g++ -std=c++20 -DPYWM_EMULATED -I csrc -I tests/cuda_on_cpu/include -x c++ kernel.cu emulator.cpp
//
// Built plainly it finds wrong results under several thread orders, divergent barriers and deadlocks; with
// -fsanitize=address,undefined also accesses out of bounds; with -fsanitize=thread also races between the CUDA threads.
// It says nothing about speed, bank conflicts or occupancy, and it is never a backend. See README.md beside this file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>

#if !defined(PYWM_EMULATED)
#error "emulator.h is for builds with -DPYWM_EMULATED"
#endif

// Bookkeeping of the emulator, which ThreadSanitizer must not take for the kernel's own memory accesses.
#if defined(__SANITIZE_THREAD__)
#define EMULATOR_UNTRACKED __attribute__((no_sanitize_thread, noinline))
#else
#define EMULATOR_UNTRACKED
#endif

// ---- The language -----------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// __shared__ stays undefined on purpose: kernels write PYWM_SHARED or PYWM_DYN_SHARED (csrc/cuda/device.cuh).

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---- What the kernel's code asks of the scheduler (emulator.cpp) --------------------------------------------------

namespace emulator {

struct SourceLine {
  const char* file;
  int line;
};

struct Indices {
  uint3 thread{0, 0, 0}, block{0, 0, 0};
  dim3 block_dim, grid_dim;
};
extern Indices current;  // of the fiber that runs now

struct Launch {
  dim3 grid, block;
  size_t dynamic_shared_bytes;
  bool cooperative;
  const char* name;
  const void* kernel;
};

// The order in which runnable threads take turns. Two opposite orders expose most order-dependent results.
enum class Order { kForward, kReverse, kRandom };
void set_schedule(Order order, uint64_t seed, int resident_blocks);

// Runs the grid to its end. Throws std::runtime_error where the kernel breaks a rule.
void launch(const Launch& launch, const std::function<void()>& body);
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
void allow_dynamic_shared(const void* kernel, size_t bytes);

unsigned lane();
void yield();
void sync_threads(SourceLine where);
int sync_threads_count(int predicate, SourceLine where);
void grid_sync(SourceLine where);
void* shared_static(const void* key, size_t bytes);
void* shared_dynamic();

// A fence makes the thread's next atomic a release and acquire; without one, atomics order nothing.
void set_fence();
bool take_fence();

// All lanes of `mask` arrive, each with at most kSlotBytes of its own; returns the table of what they brought, one slot
// a lane. Only with `orders_memory` does it order the lanes' memory accesses: a shuffle does not, __syncwarp does.
constexpr unsigned kSlotBytes = 64;
enum class WarpOp { kSync, kShuffle, kBallot, kReduce, kLdmatrix, kMma };
struct Collective {
  unsigned mask;
  WarpOp op;
  unsigned bytes;
  bool orders_memory;
  SourceLine where;
};
const unsigned char* meet(const Collective& collective, const void* mine);

// The copy itself is compiled with the kernel, so that the sanitizers see it.
using CopyFunction = void (*)(void* to, const void* from, unsigned bytes);
void cp_async(void* to, const void* from, unsigned bytes, CopyFunction copy);
void cp_async_commit();
void cp_async_wait(unsigned keep);

EMULATOR_UNTRACKED inline uint3 thread_index() { return current.thread; }
EMULATOR_UNTRACKED inline uint3 block_index() { return current.block; }
EMULATOR_UNTRACKED inline dim3 block_dim() { return current.block_dim; }
EMULATOR_UNTRACKED inline dim3 grid_dim() { return current.grid_dim; }

template <typename T>
EMULATOR_UNTRACKED inline T from_slot(const unsigned char* table, unsigned lane) {
  T value;
  std::memcpy(&value, table + lane * kSlotBytes, sizeof(T));
  return value;
}

inline bool has_lane(unsigned mask, unsigned lane) { return (mask >> lane) & 1u; }

}  // namespace emulator

#define EMULATOR_HERE (::emulator::SourceLine{__FILE__, __LINE__})

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_dim())
#define gridDim (::emulator::grid_dim())
#define warpSize 32

// The array keeps its type, so that UBSan's bounds check works, and is a heap block of its own, for ASan's.
#define EMULATOR_SHARED(type, name, dims)                                           \
  using name##_shared_t = type dims;                                                \
  name##_shared_t& name = *static_cast<name##_shared_t*>(::emulator::shared_static( \
      []() -> const void* {                                                         \
        static char key;                                                            \
        return &key;                                                                \
      }(),                                                                          \
      sizeof(name##_shared_t)))
#define EMULATOR_DYN_SHARED(name) unsigned char* name = static_cast<unsigned char*>(::emulator::shared_dynamic())

// `kernel` is in parentheses, so that its template arguments may hold commas; `is_cooperative` is true or false.
#define EMULATOR_UNPACK(...) __VA_ARGS__
#define EMULATOR_LAUNCH(kernel, is_cooperative, grid_size, block_size, shared_bytes, stream, ...)                  \
  (static_cast<void>(stream),                                                                                      \
   ::emulator::launch(::emulator::Launch{grid_size, block_size, static_cast<size_t>(shared_bytes), is_cooperative, \
                                         #kernel, reinterpret_cast<const void*>(EMULATOR_UNPACK kernel)},          \
                      [&] { (EMULATOR_UNPACK kernel)(__VA_ARGS__); }))

// ---- Barriers and warp collectives --------------------------------------------------------------------------------

#define __syncthreads() ::emulator::sync_threads(EMULATOR_HERE)
#define __syncthreads_count(p) ::emulator::sync_threads_count((p), EMULATOR_HERE)
#define __syncthreads_or(p) (::emulator::sync_threads_count(!!(p), EMULATOR_HERE) != 0)

namespace emulator {

inline void sync_warp(unsigned mask, SourceLine where) {
  const char nothing = 0;
  meet({mask, WarpOp::kSync, 1, true, where}, &nothing);
}

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
inline T shuffle(Shuffle kind, unsigned mask, T value, int argument, int width, SourceLine where) {
  const int me = static_cast<int>(lane());
  const int first = me & ~(width - 1);
  int source = me;
  if (kind == Shuffle::kIndex) source = first + (argument & (width - 1));
  if (kind == Shuffle::kUp && me - argument >= first) source = me - argument;
  if (kind == Shuffle::kDown && me + argument < first + width) source = me + argument;
  if (kind == Shuffle::kXor && (me ^ argument) < first + width) source = me ^ argument;
  const unsigned char* table = meet({mask, WarpOp::kShuffle, sizeof(T), false, where}, &value);
  if (!has_lane(mask, source)) {
    fail("%s:%d: shuffle reads lane %d, which is not in mask %08x", where.file, where.line, source, mask);
  }
  return from_slot<T>(table, source);
}

inline unsigned ballot(unsigned mask, int predicate, SourceLine where) {
  const unsigned char* table = meet({mask, WarpOp::kBallot, sizeof predicate, false, where}, &predicate);
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (has_lane(mask, i) && from_slot<int>(table, i)) votes |= 1u << i;
  }
  return votes;
}

template <typename T, typename F>
inline T reduce(unsigned mask, T value, F combine, SourceLine where) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "__reduce_*_sync takes 32-bit integers");
  const unsigned char* table = meet({mask, WarpOp::kReduce, sizeof(T), false, where}, &value);
  unsigned i = 0;
  while (!has_lane(mask, i)) ++i;
  T result = from_slot<T>(table, i);
  for (++i; i < 32; ++i) {
    if (has_lane(mask, i)) result = combine(result, from_slot<T>(table, i));
  }
  return result;
}

}  // namespace emulator

#define EMULATOR_SYNC_WARP(mask, ...) ::emulator::sync_warp((mask), EMULATOR_HERE)
#define __syncwarp(...) EMULATOR_SYNC_WARP(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu)
// The width is the fourth argument if there is one, else 32.
#define EMULATOR_SHUFFLE(kind, mask, value, argument, width, ...) \
  ::emulator::shuffle(::emulator::Shuffle::kind, (mask), (value), static_cast<int>(argument), (width), EMULATOR_HERE)
#define __shfl_sync(mask, value, source, ...) \
  EMULATOR_SHUFFLE(kIndex, mask, value, source, __VA_ARGS__ __VA_OPT__(, ) 32, 0)
#define __shfl_up_sync(mask, value, delta, ...) \
  EMULATOR_SHUFFLE(kUp, mask, value, delta, __VA_ARGS__ __VA_OPT__(, ) 32, 0)
#define __shfl_down_sync(mask, value, delta, ...) \
  EMULATOR_SHUFFLE(kDown, mask, value, delta, __VA_ARGS__ __VA_OPT__(, ) 32, 0)
#define __shfl_xor_sync(mask, value, lanes, ...) \
  EMULATOR_SHUFFLE(kXor, mask, value, lanes, __VA_ARGS__ __VA_OPT__(, ) 32, 0)
#define __ballot_sync(mask, p) ::emulator::ballot((mask), (p) ? 1 : 0, EMULATOR_HERE)
#define __any_sync(mask, p) (__ballot_sync(mask, p) != 0)
#define __all_sync(mask, p) (__ballot_sync(mask, p) == (mask))
#define EMULATOR_REDUCE(mask, value, expression)                                                           \
  ::emulator::reduce((mask), (value), [](auto a, auto b) { return static_cast<decltype(a)>(expression); }, \
                     EMULATOR_HERE)
#define __reduce_add_sync(mask, value) EMULATOR_REDUCE(mask, value, a + b)
#define __reduce_max_sync(mask, value) EMULATOR_REDUCE(mask, value, std::max(a, b))
#define __reduce_min_sync(mask, value) EMULATOR_REDUCE(mask, value, std::min(a, b))

// ---- Tensor cores and asynchronous copies: what csrc/cuda/device.cuh stands on ------------------------------------

namespace emulator {

inline void copy_bytes(void* to, const void* from, unsigned bytes) {
  // Byte by byte and volatile: the compiler would make one access out of it, which ASan checks less closely.
  auto* target = static_cast<volatile char*>(to);
  const auto* source = static_cast<const volatile char*>(from);
  for (unsigned i = 0; i < bytes; ++i) target[i] = source[i];
}

// Lane l passes the address of row l of four 8 x 8 tiles of 16-bit elements, one tile after the other, and gets from
// each tile the pair of elements 2·(l % 4) of row l / 4. Transposed: of column l / 4.
inline void ldmatrix_x4(uint32_t (&registers)[4], const void* row, bool transposed, SourceLine where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("%s:%d: ldmatrix row is not 16-byte aligned", where.file, where.line);
  const unsigned char* table = meet({0xffffffffu, WarpOp::kLdmatrix, sizeof row, false, where}, &row);
  const unsigned group = lane() / 4, member = lane() % 4;
  for (unsigned tile = 0; tile < 4; ++tile) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned tile_row = transposed ? 2 * member + i : group;
      const unsigned tile_column = transposed ? group : 2 * member + i;
      pair[i] = static_cast<const uint16_t*>(from_slot<const void*>(table, tile * 8 + tile_row))[tile_column];
    }
    registers[tile] = static_cast<uint32_t>(pair[0]) | static_cast<uint32_t>(pair[1]) << 16;
  }
}

// c += a·b for a [16, 16], b [16, 8], c [16, 8]; the spread of the elements over lanes and registers is that of the
// PTX manual, "Matrix fragments for mma.m16n8k16". The order of the sum is the emulator's own.
inline void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SourceLine where) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::copy(std::begin(a), std::end(a), mine.a);
  std::copy(std::begin(b), std::end(b), mine.b);
  static_assert(sizeof mine <= kSlotBytes);
  const unsigned char* table = meet({0xffffffffu, WarpOp::kMma, sizeof mine, false, where}, &mine);
  const auto element = [](uint32_t pair, unsigned index) {
    const uint32_t bits = index % 2 ? pair & 0xffff0000u : pair << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + (i >= 2 ? 8 : 0);
    const unsigned column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const auto of_row = from_slot<Fragments>(table, row % 8 * 4 + k % 8 / 2);
      const auto of_column = from_slot<Fragments>(table, column * 4 + k % 8 / 2);
      c[i] += element(of_row.a[(row >= 8 ? 1 : 0) + (k >= 8 ? 2 : 0)], k) * element(of_column.b[k >= 8 ? 1 : 0], k);
    }
  }
}

// ---- Atomics: real ones, so that ThreadSanitizer knows them; each is a point where another thread may take over
// ------

template <typename T>
inline T load_acquire(const T* address) {
  yield();
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

template <typename T, typename F>
inline T read_modify_write(T* address, F update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 32 or 64 bits");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  yield();
  const bool ordered = take_fence();
  auto* word = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(word, __ATOMIC_RELAXED);
  for (;;) {
    T old_value;
    std::memcpy(&old_value, &old_bits, sizeof(T));
    const T new_value = update(old_value);
    Bits new_bits;
    std::memcpy(&new_bits, &new_value, sizeof(T));
    // The memory orders are constants at each call, as ThreadSanitizer wants them.
    const bool done =
        ordered ? __atomic_compare_exchange_n(word, &old_bits, new_bits, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)
                : __atomic_compare_exchange_n(word, &old_bits, new_bits, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    if (done) return old_value;
  }
}

}  // namespace emulator

template <typename T>
inline T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
inline T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T old) { return std::max(old, value); });
}
template <typename T>
inline T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T old) { return std::min(old, value); });
}
template <typename T>
inline T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T) { return value; });
}
template <typename T>
inline T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulator::read_modify_write(address, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { emulator::set_fence(); }

// ---- Memory and arithmetic intrinsics -----------------------------------------------------------------------------

template <typename T>
inline T __ldg(const T* address) {
  return *address;
}
template <typename T>
inline T __ldcs(const T* address) {
  return *address;
}
template <typename T>
inline void __stcs(T* address, T value) {
  *address = value;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
using std::isnan;
using std::max;
using std::min;

// ---- The host's side of the runtime -------------------------------------------------------------------------------

using cudaError_t = int;
using cudaStream_t = void*;
enum : int { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** address, size_t bytes) {
  *address = std::malloc(bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* address) {
  std::free(address);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
template <typename F>
inline cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute, int bytes) {
  emulator::allow_dynamic_shared(reinterpret_cast<const void*>(kernel), static_cast<size_t>(bytes));
  return cudaSuccess;
}
