// The optimiser step on flat parameters.

#include <cmath>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// Changes param, exp_avg and exp_avg_sq in place and returns the norm. max_grad_norm: None does not clip.
py::object adam_step_(py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq, py::handle step,
                      py::handle lr, py::handle beta1, py::handle beta2, py::handle eps, py::handle max_grad_norm,
                      bool direct) {
  Call call("adam_step_", direct);
  void* p = const_cast<void*>(call.first(param, 1));
  const void* g = call.floats(grad);
  void* m = const_cast<void*>(call.floats(exp_avg));
  void* v = const_cast<void*>(call.floats(exp_avg_sq));
  constexpr double kBelow1 = 1 - 0x1p-53;
  const double k = PyLong_Check(step.ptr()) ? call.number(step, 1, 0x1p53) : NAN;
  const double rate = call.number(lr, 0, Call::kFinite), b1 = call.number(beta1, 0, kBelow1),
               b2 = call.number(beta2, 0, kBelow1), e = call.number(eps, 0, Call::kFinite);
  const double c = max_grad_norm.is_none() ? -1 : call.number(max_grad_norm, 0, INFINITY);
  py::object answer;
  if (call.ok() && (std::isnan(k) || call.numel() == 0 || call.first().device.type != abi::kCPU)) call.refuse();
  if (call.declines(answer)) return py::none();
  void* norm_data = nullptr;
  py::object norm = call.empty({}, norm_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::AdamArgs<S> a{
        out<S>(p), in<S>(g), out<S>(m), out<S>(v), out<S>(norm_data), call.numel(), static_cast<int64_t>(k), rate,
        b1,        b2,       e,         c};
    call.run([&] { pywm::cpu::adam_step(a); }, [&](void*) { no_cuda_kernel("adam_step_"); });
  });
  return norm;
}

}  // namespace

void define_adam_step(py::module_& m) {
  define_fast<&adam_step_>(
      m, "adam_step_",
      "adam_step_(param: object, grad: object, exp_avg: object, exp_avg_sq: object, step: object, lr: "
      "object, beta1: object, beta2: object, eps: object, max_grad_norm: object, direct: bool) -> object");
}

}  // namespace pywm::bindings
