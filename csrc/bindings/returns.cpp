// The reverse scans: generalised advantage, lambda and discounted returns, V-trace.

#include <cmath>
#include <string>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// A NamedTuple is a tuple: fill one without its Python-level constructor.
PyTypeObject* gae_result = &PyTuple_Type;

template <typename... Objects>
py::object named(PyTypeObject* type, Objects&&... objects) {
  PyObject* result = type->tp_alloc(type, sizeof...(Objects));
  if (!result) rethrow();
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(result, i++, objects.release().ptr()), ...);
  return py::reinterpret_steal<py::object>(result);
}

void register_result(const std::string& name, py::type type) {
  auto* pointer = reinterpret_cast<PyTypeObject*>(type.ptr());
  if (!PyType_IsSubtype(pointer, &PyTuple_Type)) throw py::type_error("register_result: a NamedTuple was expected");
  if (name != "gae") throw py::value_error("register_result: no op '" + name + "' takes a result type");
  Py_INCREF(pointer);
  gae_result = pointer;
}

py::object gae(py::handle reward, py::handle value, py::handle next_value, py::handle terminated, py::handle truncated,
               py::handle valid, py::handle discount, py::handle lam, bool direct) {
  Call call("gae", direct);
  const void* r = call.first(reward, 2);
  const void* v = call.floats(value);
  const void* nv = call.floats(next_value);
  const uint8_t* te = call.mask(terminated);
  const uint8_t* tr = call.mask(truncated);
  const uint8_t* ok = call.optional_mask(valid);
  const double g = call.number(discount, 0, 1), l = call.number(lam, 0, 1);
  py::object answer;
  if (call.ok() && call.size(0) < 1) call.refuse();
  if (call.declines(answer)) return answer;
  void *advantage_data = nullptr, *returns_data = nullptr;
  py::object advantage = call.like_first(advantage_data), returns = call.like_first(returns_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaeArgs<S> a{
          in<S>(r),     in<S>(v),     in<S>(nv), te,  tr, ok, out<S>(advantage_data), out<S>(returns_data),
          call.size(0), call.size(1), S(g),      S(l)};
      call.run([&] { pywm::cpu::gae(a); }, [&](void* stream) { pywm::cuda::gae(a, stream); });
    });
  return named(direct ? &PyTuple_Type : gae_result, advantage, returns);
}

py::object gae_backward(py::handle like, py::handle grad_advantage, py::handle grad_returns, py::handle terminated,
                        py::handle truncated, py::handle valid, double discount, double lam, bool want_reward,
                        bool want_value, bool want_next_value) {
  Call call("gae_backward", true);
  call.first(like, 2);
  const void* ga = call.optional_floats(grad_advantage);
  const void* gr = call.optional_floats(grad_returns);
  const uint8_t* te = call.mask(terminated);
  const uint8_t* tr = call.mask(truncated);
  const uint8_t* ok = call.optional_mask(valid);
  if (!call.ok()) return py::none();
  void *reward_data, *value_data, *next_data;
  py::object reward = call.wanted(want_reward, reward_data);
  py::object value = call.wanted(want_value, value_data);
  py::object next = call.wanted(want_next_value, next_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaeBackwardArgs<S> a{
          in<S>(ga),          in<S>(gr),         te,           tr,           ok,          out<S>(reward_data),
          out<S>(value_data), out<S>(next_data), call.size(0), call.size(1), S(discount), S(lam)};
      call.run([&] { pywm::cpu::gae_backward(a); }, [&](void* stream) { pywm::cuda::gae_backward(a, stream); });
    });
  return py::make_tuple(reward, value, next);
}

py::object lambda_return(py::handle reward, py::handle discount, py::handle next_value, py::handle lam_rows,
                         py::handle lam, py::handle valid, bool direct) {
  Call call("lambda_return", direct);
  const void* r = call.first(reward, 2);
  const void* d = call.floats(discount);
  const void* nv = call.floats(next_value);
  const void* rows = call.optional_floats(lam_rows);
  const uint8_t* ok = call.optional_mask(valid);
  const double l = call.number(lam, 0, 1);
  py::object answer;
  if (call.ok() && call.size(0) < 1) call.refuse();
  if (call.declines(answer)) return answer;
  void* returns_data = nullptr;
  py::object returns = call.like_first(returns_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::LambdaReturnArgs<S> a{in<S>(r),     in<S>(d),     in<S>(nv), in<S>(rows), ok, out<S>(returns_data),
                                        call.size(0), call.size(1), S(l)};
      call.run([&] { pywm::cpu::lambda_return(a); }, [&](void* stream) { pywm::cuda::lambda_return(a, stream); });
    });
  return returns;
}

py::object lambda_return_backward(py::handle grad, py::handle discount, py::handle next_value, py::handle returns,
                                  py::handle lam_rows, double lam, py::handle valid, bool want_reward,
                                  bool want_discount, bool want_next_value) {
  Call call("lambda_return_backward", true);
  const void* g = call.first(grad, 2);
  const void* d = call.floats(discount);
  const void* nv = call.floats(next_value);
  const void* ret = call.floats(returns);
  const void* rows = call.optional_floats(lam_rows);
  const uint8_t* ok = call.optional_mask(valid);
  if (!call.ok()) return py::none();
  void *reward_data, *discount_data, *next_data;
  py::object grad_reward = call.wanted(want_reward, reward_data);
  py::object grad_discount = call.wanted(want_discount, discount_data);
  py::object grad_next = call.wanted(want_next_value, next_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::LambdaReturnBackwardArgs<S> a{
          in<S>(g),          in<S>(d),     in<S>(nv),           in<S>(ret),
          in<S>(rows),       ok,           out<S>(reward_data), out<S>(discount_data),
          out<S>(next_data), call.size(0), call.size(1),        S(lam)};
      call.run([&] { pywm::cpu::lambda_return_backward(a); },
               [&](void* stream) { pywm::cuda::lambda_return_backward(a, stream); });
    });
  return py::make_tuple(grad_reward, grad_discount, grad_next);
}

py::object discounted_return(py::handle reward, py::handle discount, py::handle bootstrap, bool direct) {
  Call call("discounted_return", direct);
  const void* r = call.first(reward, 2);
  const void* d = call.floats(discount);
  const void* b = call.ok() ? call.column(bootstrap) : nullptr;
  py::object answer;
  if (call.ok() && call.size(0) < 1) call.refuse();
  if (call.declines(answer)) return answer;
  void* returns_data = nullptr;
  py::object returns = call.like_first(returns_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::DiscountedReturnArgs<S> a{in<S>(r),     in<S>(d),    in<S>(b), out<S>(returns_data),
                                            call.size(0), call.size(1)};
      call.run([&] { pywm::cpu::discounted_return(a); },
               [&](void* stream) { pywm::cuda::discounted_return(a, stream); });
    });
  return returns;
}

py::object discounted_return_backward(py::handle grad, py::handle discount, py::handle bootstrap, py::handle returns,
                                      bool want_reward, bool want_discount, bool want_bootstrap) {
  Call call("discounted_return_backward", true);
  const void* g = call.first(grad, 2);
  const void* d = call.floats(discount);
  const void* b = call.ok() ? call.column(bootstrap) : nullptr;
  const void* ret = call.floats(returns);
  if (!call.ok()) return py::none();
  void *reward_data, *discount_data, *bootstrap_data;
  py::object grad_reward = call.wanted(want_reward, reward_data);
  py::object grad_discount = call.wanted(want_discount, discount_data);
  py::object grad_bootstrap = call.empty({want_bootstrap ? call.size(1) : 0}, bootstrap_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::DiscountedReturnBackwardArgs<S> a{in<S>(g),
                                                    in<S>(d),
                                                    in<S>(b),
                                                    in<S>(ret),
                                                    out<S>(reward_data),
                                                    out<S>(discount_data),
                                                    want_bootstrap ? out<S>(bootstrap_data) : nullptr,
                                                    call.size(0),
                                                    call.size(1)};
      call.run([&] { pywm::cpu::discounted_return_backward(a); },
               [&](void* stream) { pywm::cuda::discounted_return_backward(a, stream); });
    });
  return py::make_tuple(grad_reward, grad_discount, grad_bootstrap);
}

// With `keep`, the corrections y too, which the backward pass needs.
py::object vtrace(py::handle log_ratio, py::handle reward, py::handle discount, py::handle value, py::handle next_value,
                  py::handle truncated, py::handle lam, py::handle rho_clip, py::handle c_clip, bool keep,
                  bool direct) {
  Call call("vtrace", direct);
  const void* r = call.first(reward, 2);
  const void* lr = call.floats(log_ratio);
  const void* d = call.floats(discount);
  const void* v = call.floats(value);
  const void* nv = call.floats(next_value);
  const uint8_t* tr = call.mask(truncated);
  const double l = call.number(lam, 0, 1), rho = call.number(rho_clip, 0, INFINITY),
               c = call.number(c_clip, 0, INFINITY);
  if (call.ok() && (call.size(0) < 1 || rho == 0 || c == 0 || call.first().device.type != abi::kCPU)) call.refuse();
  py::object answer;
  if (call.declines(answer)) return answer;
  void *target_data, *advantage_data, *y_data = nullptr;
  py::object target = call.like_first(target_data), advantage = call.like_first(advantage_data), y;
  if (keep) y = call.like_first(y_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::VtraceArgs<S> a{in<S>(lr),
                                  in<S>(r),
                                  in<S>(d),
                                  in<S>(v),
                                  in<S>(nv),
                                  tr,
                                  out<S>(target_data),
                                  out<S>(advantage_data),
                                  out<S>(y_data),
                                  call.size(0),
                                  call.size(1),
                                  S(l),
                                  S(rho),
                                  S(c)};
      call.run([&] { pywm::cpu::vtrace(a); }, [&](void*) { no_cuda_kernel("vtrace"); });
    });
  if (keep) return py::make_tuple(target, advantage, y);
  return py::make_tuple(target, advantage);
}

py::object vtrace_backward(py::handle grad_target, py::handle grad_advantage, py::handle log_ratio, py::handle discount,
                           py::handle next_value, py::handle y, py::handle truncated, double lam, double rho_clip,
                           double c_clip, bool want_reward, bool want_discount, bool want_value, bool want_next_value) {
  Call call("vtrace_backward", true);
  const void* lr = call.first(log_ratio, 2);
  const void* gt = call.optional_floats(grad_target);
  const void* ga = call.optional_floats(grad_advantage);
  const void* d = call.floats(discount);
  const void* nv = call.floats(next_value);
  const void* ys = call.floats(y);
  const uint8_t* tr = call.mask(truncated);
  if (!call.ok() || call.first().device.type != abi::kCPU) return py::none();
  void *reward_data, *discount_data, *value_data, *next_data;
  py::object grad_reward = call.wanted(want_reward, reward_data);
  py::object grad_discount = call.wanted(want_discount, discount_data);
  py::object grad_value = call.wanted(want_value, value_data);
  py::object grad_next = call.wanted(want_next_value, next_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::VtraceBackwardArgs<S> a{in<S>(gt),
                                          in<S>(ga),
                                          in<S>(lr),
                                          in<S>(d),
                                          in<S>(nv),
                                          in<S>(ys),
                                          tr,
                                          out<S>(reward_data),
                                          out<S>(discount_data),
                                          out<S>(value_data),
                                          out<S>(next_data),
                                          call.size(0),
                                          call.size(1),
                                          S(lam),
                                          S(rho_clip),
                                          S(c_clip)};
      call.run([&] { pywm::cpu::vtrace_backward(a); }, [&](void*) { no_cuda_kernel("vtrace_backward"); });
    });
  return py::make_tuple(grad_reward, grad_discount, grad_value, grad_next);
}

}  // namespace

void define_returns(py::module_& m) {
  m.def("register_result", &register_result, "name"_a, "type"_a);
  define_fast<&gae>(
      m, "gae",
      "gae(reward: object, value: object, next_value: object, terminated: object, truncated: object, valid: "
      "object, discount: object, lam: object, direct: bool) -> object");
  m.def("gae_backward", &gae_backward, "like"_a, "grad_advantage"_a, "grad_returns"_a, "terminated"_a, "truncated"_a,
        "valid"_a, "discount"_a, "lam"_a, "want_reward"_a, "want_value"_a, "want_next_value"_a);
  define_fast<&lambda_return>(
      m, "lambda_return",
      "lambda_return(reward: object, discount: object, next_value: object, lam_rows: object, lam: object, "
      "valid: object, direct: bool) -> object");
  m.def("lambda_return_backward", &lambda_return_backward, "grad"_a, "discount"_a, "next_value"_a, "returns"_a,
        "lam_rows"_a, "lam"_a, "valid"_a, "want_reward"_a, "want_discount"_a, "want_next_value"_a);
  define_fast<&discounted_return>(
      m, "discounted_return",
      "discounted_return(reward: object, discount: object, bootstrap: object, direct: bool) -> object");
  m.def("discounted_return_backward", &discounted_return_backward, "grad"_a, "discount"_a, "bootstrap"_a, "returns"_a,
        "want_reward"_a, "want_discount"_a, "want_bootstrap"_a);
  define_fast<&vtrace>(m, "vtrace",
                       "vtrace(log_ratio: object, reward: object, discount: object, value: object, next_value: object, "
                       "truncated: object, lam: object, rho_clip: object, c_clip: object, keep: bool, direct: bool) -> "
                       "object");
  m.def("vtrace_backward", &vtrace_backward, "grad_target"_a, "grad_advantage"_a, "log_ratio"_a, "discount"_a,
        "next_value"_a, "y"_a, "truncated"_a, "lam"_a, "rho_clip"_a, "c_clip"_a, "want_reward"_a, "want_discount"_a,
        "want_value"_a, "want_next_value"_a);
}

}  // namespace pywm::bindings
