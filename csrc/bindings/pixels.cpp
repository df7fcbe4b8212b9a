// Pixels: their cross-entropy, stacks of frames, smaller pictures, and where rollouts start.

#include "bindings.h"

namespace pywm::bindings {
namespace {

// ---- pixel_cross_entropy -------------------------------------------------------------------------------------------

// Rows of the first tensor, if it is logits of classes that a byte can tell apart.
bool is_pixels(Call& call, int64_t& M) {
  if (!call.ok() || call.first().ndim < 1) return false;
  const int last = call.first().ndim - 1;
  M = 1;
  for (int i = 0; i < last; ++i) M *= call.size(i);
  return call.size(last) >= 1 && call.size(last) <= kMaxClasses;
}

py::object pixel_cross_entropy(py::handle logits, py::handle target, py::handle cutoff, bool direct) {
  Call call("pixel_cross_entropy", direct);
  const void* l = call.first(logits, -1);
  int64_t M;
  if (!is_pixels(call, M)) return py::none();
  const int rank = call.first().ndim - 1;
  const uint8_t* t = call.bytes(target, call.first(), rank, -1);
  const double nats = call.number(cutoff, 0, Call::kFinite);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* loss_data;
  py::object loss = call.empty(call.first().shape, rank, loss_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::PixelCrossEntropyArgs<S> a{in<S>(l), t, out<S>(loss_data), M, call.size(rank), static_cast<S>(nats)};
      named([&] {
        call.run([&] { pywm::cpu::pixel_cross_entropy(a); },
                 [&](void* stream) { pywm::cuda::pixel_cross_entropy(a, stream); });
      });
    });
  return loss;
}

py::object pixel_cross_entropy_backward(py::handle grad, py::handle logits, py::handle target, py::handle loss,
                                        double cutoff) {
  Call call("pixel_cross_entropy_backward", true);
  const void* l = call.first(logits, -1);
  int64_t M;
  if (!is_pixels(call, M)) return py::none();
  const int rank = call.first().ndim - 1;
  const void* g = call.floats(grad, call.first(), rank);
  const uint8_t* t = call.bytes(target, call.first(), rank, -1);
  const void* of_row = call.floats(loss, call.first(), rank);
  void* grad_data;
  py::object grad_logits = call.like_first(grad_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::PixelCrossEntropyBackwardArgs<S> a{
          in<S>(g), in<S>(l), in<S>(of_row), t, out<S>(grad_data), M, call.size(rank), static_cast<S>(cutoff)};
      named([&] {
        call.run([&] { pywm::cpu::pixel_cross_entropy_backward(a); },
                 [&](void* stream) { pywm::cuda::pixel_cross_entropy_backward(a, stream); });
      });
    });
  return grad_logits;
}

// ---- stack_frames --------------------------------------------------------------------------------------------------

// The output, [B, stack * C, height, width] of bytes or floats, comes along and says which.
py::object stack_frames(py::handle out_, py::handle frames, py::handle index, py::handle first, py::handle noise,
                        int64_t stack, int64_t stride, double scale, bool standardize) {
  Call call("stack_frames", true);
  const uint8_t* x = call.first_bytes(frames, 4);
  View rows, begins, y, e;
  const int64_t* i = call.indices(index, rows);
  const int64_t* f = call.indices(first, begins);
  if (!call.ok() || !view_of(out_, y) || y.ndim != 4 || y.shape[0] != rows.shape[0] ||
      begins.shape[0] != rows.shape[0] || y.shape[1] != stack * call.size(1) || y.shape[2] != call.size(2) ||
      y.shape[3] != call.size(3) || !abi::same_device(y, call.first()) || !abi::is_contiguous(y))
    return py::none();
  if (!noise.is_none() && (!view_of(noise, e) || e.dtype.code != y.dtype.code || e.dtype.bits != y.dtype.bits ||
                           abi::numel(e) != abi::numel(y) || !abi::is_contiguous(e)))
    return py::none();
  const auto fill = [&]<typename S>() {
    const pywm::StackFramesArgs<S> a{x,
                                     i,
                                     f,
                                     noise.is_none() ? nullptr : in<S>(Call::data(e)),
                                     out<S>(Call::data(y)),
                                     call.size(0),
                                     rows.shape[0],
                                     call.size(1),
                                     call.size(2) * call.size(3),
                                     stack,
                                     stride,
                                     scale,
                                     standardize};
    if (abi::numel(y) > 0)
      call.run([&] { pywm::cpu::stack_frames(a); }, [&](void* stream) { pywm::cuda::stack_frames(a, stream); });
  };
  if (abi::is_bytes(y))
    fill.template operator()<uint8_t>();
  else if (abi::is_type<float>(y))
    fill.template operator()<float>();
  else if (abi::is_type<double>(y))
    fill.template operator()<double>();
  else
    return py::none();
  return py::bool_(true);
}

// ---- resize_area ---------------------------------------------------------------------------------------------------

// out [..., h2, w2], whose last two sizes say what is wanted.
py::object resize_area(py::handle out_, py::handle frames) {
  Call call("resize_area", true);
  const uint8_t* x = call.first_bytes(frames, -1);
  View y;
  if (!call.ok() || !view_of(out_, y) || !abi::is_bytes(y) || !abi::is_contiguous(y) ||
      !abi::same_device(y, call.first()) || y.ndim != call.first().ndim || y.ndim < 2)
    return py::none();
  int64_t M = 1;
  for (int i = 0; i < y.ndim - 2; ++i) {
    if (y.shape[i] != call.size(i)) return py::none();
    M *= y.shape[i];
  }
  const pywm::ResizeAreaArgs a{x,
                               out<uint8_t>(Call::data(y)),
                               M,
                               call.size(y.ndim - 2),
                               call.size(y.ndim - 1),
                               y.shape[y.ndim - 2],
                               y.shape[y.ndim - 1]};
  if (a.h > pywm::kMaxSide || a.w > pywm::kMaxSide || a.h2 < 1 || a.w2 < 1 || a.h2 > a.h || a.w2 > a.w)
    return py::none();
  if (M > 0) call.run([&] { pywm::cpu::resize_area(a); }, [&](void* stream) { pywm::cuda::resize_area(a, stream); });
  return py::bool_(true);
}

// ---- sample_starts -------------------------------------------------------------------------------------------------

py::object sample_starts(py::handle row, py::handle env, py::handle first, py::handle uniform, py::handle is_first,
                         py::handle is_last, py::handle valid, int64_t stack, bool beginning) {
  Call call("sample_starts", true);
  const void* u = call.first(uniform, 1);
  View f, y;
  if (!call.ok() || !view_of(is_first, f) || f.ndim != 2) return py::none();
  const uint8_t* firsts = call.mask(is_first, f, 2);
  const uint8_t* lasts = is_last.is_none() ? nullptr : call.mask(is_last, f, 2);
  const uint8_t* valids = valid.is_none() ? nullptr : call.mask(valid, f, 2);
  int64_t* outputs[3];
  const py::handle given[3] = {row, env, first};
  for (int i = 0; i < 3; ++i) {
    outputs[i] = const_cast<int64_t*>(call.indices(given[i], y));
    if (!call.ok() || y.shape[0] != call.size(0)) return py::none();
  }
  if (abi::numel(f) < 1 || stack < 1) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::SampleStartsArgs<S> a{{firsts, lasts, valids, f.shape[0], f.shape[1], stack},
                                        in<S>(u),
                                        outputs[0],
                                        outputs[1],
                                        outputs[2],
                                        call.size(0),
                                        beginning};
      call.run([&] { pywm::cpu::sample_starts(a); }, [&](void* stream) { pywm::cuda::sample_starts(a, stream); });
    });
  return py::bool_(true);
}

}  // namespace

void define_pixels(py::module_& m) {
  define_fast<&pixel_cross_entropy>(
      m, "pixel_cross_entropy",
      "pixel_cross_entropy(logits: object, target: object, cutoff: object, direct: bool) -> object");
  m.def("pixel_cross_entropy_backward", &pixel_cross_entropy_backward, "grad"_a, "logits"_a, "target"_a, "loss"_a,
        "cutoff"_a);
  m.def("stack_frames", &stack_frames, "out"_a, "frames"_a, "index"_a, "first"_a, "noise"_a, "stack"_a, "stride"_a,
        "scale"_a, "standardize"_a);
  m.def("resize_area", &resize_area, "out"_a, "frames"_a);
  m.def("sample_starts", &sample_starts, "row"_a, "env"_a, "first"_a, "uniform"_a, "is_first"_a, "is_last"_a, "valid"_a,
        "stack"_a, "beginning"_a);
}

}  // namespace pywm::bindings
