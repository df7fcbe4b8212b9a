// Normalisation with an activation.

#include "bindings.h"

namespace pywm::bindings {
namespace {

struct NormActTensors {
  const void *x, *scale, *shift;
  pywm::Activation activation;
  bool layer;
  double eps;
  int64_t M = 1, D = 0;

  bool read(Call& call, py::handle x_, py::handle scale_, py::handle shift_, py::handle norm, py::handle act,
            py::handle eps_) {
    x = call.first(x_, -1);
    if (!call.ok() || call.first().ndim < 1) return false;
    const int rank = call.first().ndim - 1;
    D = call.size(rank);
    for (int i = 0; i < rank; ++i) M *= call.size(i);
    View v;
    scale = call.floats(scale_, {D}, v);
    shift = shift_.is_none() ? nullptr : call.floats(shift_, {D}, v);
    eps = call.number(eps_, 0, Call::kFinite);
    if (!call.ok() || D < 1 || eps == 0 || !activation_of(act, activation) || !PyUnicode_Check(norm.ptr()))
      return false;
    layer = PyUnicode_CompareWithASCIIString(norm.ptr(), "layer") == 0;
    return layer || (PyUnicode_CompareWithASCIIString(norm.ptr(), "rms") == 0 && !shift);
  }
};

py::object norm_act(py::handle x, py::handle scale, py::handle shift, py::handle norm, py::handle act, py::handle eps,
                    bool direct) {
  Call call("norm_act", direct);
  NormActTensors t;
  if (!t.read(call, x, scale, shift, norm, act, eps)) return py::none();
  py::object answer;
  if (call.declines(answer)) return answer;
  void* y_data = nullptr;
  py::object y = call.like_first(y_data);
  if (!call.ok()) return py::none();
  if (t.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::NormActArgs<S> a{in<S>(t.x), in<S>(t.scale), in<S>(t.shift), out<S>(y_data), t.M,
                                   t.D,        S(t.eps),       t.activation,   t.layer};
      call.run([&] { pywm::cpu::norm_act(a); }, [&](void* stream) { pywm::cuda::norm_act(a, stream); });
    });
  return y;
}

py::object norm_act_backward(py::handle grad, py::handle x, py::handle scale, py::handle shift, py::handle norm,
                             py::handle act, py::handle eps, bool want_x, bool want_scale, bool want_shift) {
  Call call("norm_act_backward", true);
  NormActTensors t;
  if (!t.read(call, x, scale, shift, norm, act, eps)) return py::none();
  const void* g = call.floats(grad);
  if (!call.ok() || t.M == 0) return py::none();
  void *x_data, *scale_data = nullptr, *shift_data = nullptr, *partial_data = nullptr;
  py::object grad_x = call.wanted(want_x, x_data);
  py::object grad_scale = call.wanted(want_scale, {t.D}, scale_data);
  py::object grad_shift = call.wanted(want_shift && t.shift, {t.D}, shift_data), partial;
  if (scale_data || shift_data) partial = call.empty({norm_workspace(call, t.M, t.D)}, partial_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::NormActBackwardArgs<S> a{in<S>(g),
                                         in<S>(t.x),
                                         in<S>(t.scale),
                                         in<S>(t.shift),
                                         out<S>(x_data),
                                         out<S>(scale_data),
                                         out<S>(shift_data),
                                         out<S>(partial_data),
                                         t.M,
                                         t.D,
                                         S(t.eps),
                                         t.activation,
                                         t.layer};
    call.run([&] { pywm::cpu::norm_act_backward(a); }, [&](void* stream) { pywm::cuda::norm_act_backward(a, stream); });
  });
  return py::make_tuple(grad_x, grad_scale, grad_shift);
}

}  // namespace

int64_t norm_workspace(const Call& call, int64_t M, int64_t D) {
#if defined(PYWM_WITH_CUDA)
  if (!call.on_cpu()) return pywm::cuda::norm_act_workspace(M, D);
#endif
  (void)call;
  return pywm::cpu::norm_act_workspace(M, D);
}

void define_norm_act(py::module_& m) {
  define_fast<&norm_act>(m, "norm_act",
                         "norm_act(x: object, scale: object, shift: object, norm: object, act: object, eps: object, "
                         "direct: bool) -> object");
  m.def("norm_act_backward", &norm_act_backward, "grad"_a, "x"_a, "scale"_a, "shift"_a, "norm"_a, "act"_a, "eps"_a,
        "want_x"_a, "want_scale"_a, "want_shift"_a);
}

}  // namespace pywm::bindings
