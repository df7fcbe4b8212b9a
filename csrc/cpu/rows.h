// How the scans walk [T, N] arrays: blocks of columns whose carries stay in the first-level cache, one row at a time.
// Included by kernel sources only; everything has internal linkage (see kernels.h).
#pragma once

#include <cstdint>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace pywm::cpu::PYWM_ISA {
namespace {

// Columns of a block: 8 KB of float carries. Longer pieces of a row serve the memory better (1.5 times at 1024 x 4096
// against 512 columns), and the carries still stay in the first-level cache.
constexpr int64_t kBlock = 2048;

// Beyond this many bytes the outputs would only push inputs out of the caches: they bypass them.
constexpr int64_t kStreamBytes = 24 << 20;

// A scan goes from row to row, which hardware prefetchers do not follow beyond a page. Where the arrays come from
// memory rather than from a cache, these many columns of the next row are fetched while the same columns of this row
// are computed.
constexpr int64_t kFetch = 32;

template <typename S>
inline void fetch(const S* x) {
  for (int64_t i = 0; i < kFetch; i += static_cast<int64_t>(64 / sizeof(S))) __builtin_prefetch(x + i, 0, 3);
}

// columns(i, count, fetches) over [0, n): at once, or in pieces of constant size that fetch ahead.
template <typename Columns>
inline void over_row(int64_t n, bool fetches, const Columns& columns) {
  if (!fetches) return columns(0, n, false);
  int64_t i = 0;
  for (; i + kFetch <= n; i += kFetch) columns(i, kFetch, true);
  if (i < n) columns(i, n - i, true);
}

// Copy a finished row past the caches.
template <typename S>
inline void stream_copy(S* out, const S* row, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  constexpr int64_t kStep = 64 / sizeof(S);
  for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 64; ++i) out[i] = row[i];
  for (; i + kStep <= n; i += kStep)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(row + i));
#elif defined(__AVX__)
  constexpr int64_t kStep = 32 / sizeof(S);
  for (; i < n && reinterpret_cast<uintptr_t>(out + i) % 32; ++i) out[i] = row[i];
  for (; i + kStep <= n; i += kStep)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + i)));
#endif
  for (; i < n; ++i) out[i] = row[i];
}

inline void stream_fence() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// An output that may be unwanted (null), or too large for the caches. Rows are written to `row(...)`, then `done(...)`.
template <typename S>
struct OutRow {
  S* out;
  bool streamed;
  alignas(64) S scratch[kBlock];

  OutRow(S* out, bool stream) : out(out), streamed(stream || !out) {}
  S* row(int64_t offset) { return streamed ? scratch : out + offset; }
  void done(int64_t offset, int64_t n) {
    if (streamed && out) stream_copy(out + offset, scratch, n);
  }
};

// An input that may be absent, and then is all zeros.
template <typename S>
struct InRow {
  const S* in;
  alignas(64) S zeros[kBlock];

  explicit InRow(const S* in) : in(in) {
    if (!in)
      for (S& x : zeros) x = S(0);
  }
  const S* row(int64_t offset) const { return in ? in + offset : zeros; }
  void fetch_ahead(int64_t offset) const {
    if (in) fetch(in + offset);
  }
};

template <typename S>
inline void fill(S* x, int64_t n, S value) {
  for (int64_t i = 0; i < n; ++i) x[i] = value;
}

}  // namespace
}  // namespace pywm::cpu::PYWM_ISA
