// A chain along time for every column of [T, N] arrays, x ← step(row, x), backwards or forwards in time.
//
// What:     A scan is a struct of pointers and formulas, passed to the kernel by value:
//             Value, Row                 the type of x; the inputs of one element, in registers
//             kReverse                   whether the chain starts at the last row
//             load(t, i), start(n)       the row at flat index i = t·N + n; x before the first row of the chain
//             step(row, x)               the next x, affine in x
//             decay(row), cuts(row)      ∂step/∂x; whether the step ignores x altogether, NaN included
//             store(i, row, before, after)   what a row leaves behind: x before and after its step
//             finish(n, x)               x after the last row
// Layout:   [T, N] contiguous, time-major: neighbouring threads read neighbouring columns.
// Mapping:  Wide arrays: one thread a column. Narrow ones do not fill the device that way, so time is cut into chunks,
//           one thread a column and chunk. Each chunk first finds its affine map x ↦ B + A·x by running from x = 0;
//           composing the maps of the chunks before it gives each its x; then it runs again and stores. Chunks of
//           kRowsAhead rows keep them in registers between the two runs, longer ones read them again, from L1 or L2.
//           Columns and chunks of a block are chosen by scan_shape(); its constants are predictions, not measured yet.
// Cost:     Wide: bandwidth-bound, every input and output once. Narrow: the launch, twice T / chunks dependent steps,
//           and up to `chunks` multiply-adds.
// Registers: at most 128, no spills (nvcc 13.0, sm_80 to sm_120).
// Numerics: Chunked results differ from serial ones in rounding only, and not from run to run: no atomics.
// Source:   Blelloch 1990, "Prefix sums and their applications", section 1.4, on composing first-order recurrences.
#pragma once

#include "device.cuh"
#include "launch.cuh"

namespace pywm::cuda {

constexpr int kColumnThreads = 128;
constexpr int kChunkThreads = 512;

// Rows whose loads are under way together: as many as fit in the registers.
template <typename Scan>
constexpr int kRowsAhead = sizeof(typename Scan::Row) <= 16 ? 8 : 4;

struct ScanShape {
  int columns, chunks;  // of a block; a single chunk: one thread a column, blocks of kColumnThreads columns
  int64_t blocks;
};

// Enough threads to hide the latency of memory (half of what an H200 holds), but no chunk of fewer than 8 rows.
inline ScanShape scan_shape(int64_t T, int64_t N) {
  constexpr int64_t kBusy = 65536, kMinRows = 8;
  constexpr int kMaxChunks = 128;
  int chunks = 1;
  while (chunks < kMaxChunks && N * chunks < kBusy && T > kMinRows * chunks) chunks *= 2;
  if (chunks == 1) return {kColumnThreads, 1, ceil_div(N, kColumnThreads)};
  int columns = kChunkThreads / chunks < kWarp ? kChunkThreads / chunks : kWarp;
  while (columns > 1 && columns / 2 >= N) columns /= 2;
  return {columns, chunks, ceil_div(N, columns)};
}

// The rows of one column in the order in which the chain visits them.
template <typename Scan>
struct Chain {
  using S = typename Scan::Value;
  static constexpr int kRows = kRowsAhead<Scan>;
  using Rows = typename Scan::Row[kRows];

  const Scan& scan;
  int64_t T, N, column;

  __device__ __forceinline__ int64_t time(int64_t position) const {
    return Scan::kReverse ? T - 1 - position : position;
  }

  // The rows from `position` on; not `kWhole`: of which those at `end` and later stand for none.
  template <bool kWhole>
  __device__ __forceinline__ void load(Rows& rows, int64_t position, int64_t end) const {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int64_t t = time(kWhole || position + k < end ? position + k : end - 1);
      rows[k] = scan.load(t, t * N + column);
    }
  }

  template <bool kWhole>
  __device__ __forceinline__ S run(const Rows& rows, int64_t position, int64_t end, S x) const {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      if (kWhole || position + k < end) {
        const S before = x;
        x = scan.step(rows[k], before);
        scan.store(time(position + k) * N + column, rows[k], before, x);
      }
    }
    return x;
  }

  __device__ __forceinline__ S run(int64_t begin, int64_t end, S x) const {
    Rows rows;
    int64_t position = begin;
    for (; position + kRows <= end; position += kRows) {
      load<true>(rows, position, end);
      x = run<true>(rows, position, end, x);
    }
    if (position < end) {
      load<false>(rows, position, end);
      x = run<false>(rows, position, end, x);
    }
    return x;
  }
};

// Four blocks a multiprocessor: without a bound the compiler spends registers on the addresses of all rows.
template <typename Scan>
__global__ void __launch_bounds__(kColumnThreads, 4) scan_columns_kernel(Scan scan, int64_t T, int64_t N) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
  if (n >= N) return;
  const Chain<Scan> chain{scan, T, N, n};
  scan.finish(n, chain.run(0, T, scan.start(n)));
}

// The affine map of some rows, x ↦ cut ? offset : offset + factor·x.
template <typename S>
struct AffineMap {
  S factor = S(1), offset = S(0);
  bool cut = false;

  template <bool kWhole, typename Scan>
  __device__ __forceinline__ void extend(const Scan& scan, const typename Chain<Scan>::Rows& rows, int64_t count) {
#pragma unroll
    for (int k = 0; k < kRowsAhead<Scan>; ++k) {
      if (kWhole || k < count) {
        factor *= scan.decay(rows[k]);
        offset = scan.step(rows[k], offset);
        cut |= scan.cuts(rows[k]);
      }
    }
  }
};

// threadIdx.x is the column, threadIdx.y the chunk, in the order of the chain.
template <typename Scan>
__global__ void __launch_bounds__(kChunkThreads, 1) scan_chunks_kernel(Scan scan, int64_t T, int64_t N) {
  using S = typename Scan::Value;
  constexpr int kRows = kRowsAhead<Scan>;
  PYWM_SHARED(S, factor, [kChunkThreads]);
  PYWM_SHARED(S, offset, [kChunkThreads]);
  PYWM_SHARED(bool, cut, [kChunkThreads]);

  const int columns = blockDim.x, chunks = blockDim.y, chunk = threadIdx.y;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * columns + threadIdx.x;
  const int64_t chunk_rows = ceil_div(T, chunks);
  const int64_t begin = chunk * chunk_rows < T ? chunk * chunk_rows : T;
  const int64_t end = begin + chunk_rows < T ? begin + chunk_rows : T;
  const bool inside = n < N;
  const Chain<Scan> chain{scan, T, N, n};

  AffineMap<S> map;
  typename Chain<Scan>::Rows rows;
  if (inside) {
    int64_t position = begin;
    for (; position + kRows <= end; position += kRows) {
      chain.template load<true>(rows, position, end);
      map.template extend<true>(scan, rows, kRows);
    }
    if (position < end) {
      chain.template load<false>(rows, position, end);
      map.template extend<false>(scan, rows, end - position);
    }
  }
  const int mine = chunk * columns + threadIdx.x;
  factor[mine] = map.factor;
  offset[mine] = map.offset;
  cut[mine] = map.cut;
  __syncthreads();
  if (!inside) return;

  S x = scan.start(n);
  for (int i = threadIdx.x; i < mine; i += columns) x = cut[i] ? offset[i] : offset[i] + factor[i] * x;
  // A short chunk still has its rows in registers.
  x = end - begin <= kRows ? chain.template run<false>(rows, begin, end, x) : chain.run(begin, end, x);
  if (chunk == chunks - 1) scan.finish(n, x);
}

template <typename Scan>
void launch_scan(const char* op, const Scan& scan, int64_t T, int64_t N, void* stream) {
  const ScanShape shape = scan_shape(T, N);
  const dim3 grid(static_cast<unsigned>(shape.blocks));
  if (shape.chunks == 1) {
    PYWM_LAUNCH((scan_columns_kernel<Scan>), grid, dim3(kColumnThreads), 0, stream, scan, T, N);
  } else {
    const dim3 block(static_cast<unsigned>(shape.columns), static_cast<unsigned>(shape.chunks));
    PYWM_LAUNCH((scan_chunks_kernel<Scan>), grid, block, 0, stream, scan, T, N);
  }
  check_launch(op);
}

// What a scan without a last word inherits.
struct NoFinish {
  template <typename S>
  __device__ __forceinline__ void finish(int64_t, S) const {}
};

}  // namespace pywm::cuda
