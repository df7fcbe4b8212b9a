// Stacks of frames from a storage of bytes on the CPU. See pywm/ops/stack_frames.py.
//
// What: each stack's frames, scaled or standardised, plus noise where there is some.
// Layout: frames [R, C, pixels], out [B, stack, C, pixels], contiguous.
// Mapping: threads share the frames of the stacks.
// Cost: a pixel takes a conversion and one to four flops; reads 1 byte (standardised: twice, the second time from a
//   cache) and writes a number: bound by memory. Bytes as they are: a copy, in dispatch.cpp.
// Numerics: sums of bytes are integers, mean and deviation float64, the rest S.
// Source: Mnih et al. (2015); Kaiser et al. (2020).

#include "../math/pixels.h"
#include "kernels.h"

namespace pywm::cpu::PYWM_ISA {
namespace {

constexpr int64_t kRun = 1 << 15;  // pixels whose squares 32 bits can add up

template <typename S>
math::Standard<S> standard_of(const uint8_t* __restrict x, int64_t n) {
  double sum = 0, squares = 0;
  for (int64_t first = 0; first < n; first += kRun) {
    const int64_t end = first + kRun < n ? first + kRun : n;
    uint32_t of_run = 0, squares_of_run = 0;
    for (int64_t i = first; i < end; ++i) {
      const uint32_t v = x[i];
      of_run += v;
      squares_of_run += v * v;
    }
    sum += of_run;
    squares += squares_of_run;
  }
  return {sum, squares, static_cast<double>(n)};
}

// Frames b·stack + j of the stacks.
template <typename S>
void stack_frames(const StackFramesArgs<S>& a, int64_t begin, int64_t end) {
  const S scale = static_cast<S>(a.scale);
  const int64_t size = a.C * a.pixels;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t b = i / a.stack, back = (a.stack - 1 - i % a.stack) * a.stride;
    const uint8_t* __restrict x = a.frames + math::stack_row(a.index[b], a.first[b], back, a.R) * size;
    S* __restrict y = a.out + i * size;
    if (a.standardize) {
      for (int64_t c = 0; c < size; c += a.pixels) {
        const auto standard = standard_of<S>(x + c, a.pixels);
        for (int64_t p = c; p < c + a.pixels; ++p) y[p] = standard(x[p]);
      }
    } else {
      for (int64_t p = 0; p < size; ++p) y[p] = static_cast<S>(x[p]) * scale;
    }
    if (a.noise) {
      const S* __restrict noise = a.noise + i * size;
      for (int64_t p = 0; p < size; ++p) y[p] += noise[p];
    }
  }
}

}  // namespace

void fill_stack_frames(Kernels& table) {
  table.f32.stack_frames = stack_frames<float>;
  table.f64.stack_frames = stack_frames<double>;
}

}  // namespace pywm::cpu::PYWM_ISA
