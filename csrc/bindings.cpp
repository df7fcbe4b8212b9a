// Python <-> C++ boundary: the only file that includes pybind11.
//
// Every op has one entry. It looks at the tensors through torch's DLPack exchange API, and serves the call only if it
// is plain: ordinary tensors of one device, one kernel dtype and fitting shapes, contiguous, nothing that asks for
// gradients, nobody tracing. Otherwise it returns None, and pywm/ops explains what is wrong or finds the way that
// works. So the common call costs one crossing, and every message is written in one place, pywm/ops/_check.py.
//
// `direct` calls come from below the dispatcher, which has seen to gradients and tracing already.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <atomic>
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops.h"
#include "tensor.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using pywm::abi::View;

// ---- what is looked up in torch once
// ---------------------------------------------------------------------------------

struct Torch {
  const pywm::abi::Exchange* api = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* module = nullptr;
  PyObject* is_grad_enabled = nullptr;
  PyObject* num_dispatch_modes = nullptr;  // null in a torch that has no such function
  PyObject *s_requires_grad = nullptr, *s_is_neg = nullptr, *s_empty_like = nullptr, *s_new_empty = nullptr;
} torch;

// The newest names first; torch 2.10 spelt the attribute differently before its release.
const pywm::abi::Exchange* find_exchange_api(py::handle tensor_type) {
  for (const char* attribute : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    if (!py::hasattr(tensor_type, attribute)) continue;
    py::object capsule = tensor_type.attr(attribute);
    if (!PyCapsule_CheckExact(capsule.ptr())) continue;
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
    if (!pointer) throw py::error_already_set();
    for (auto* header = static_cast<pywm::abi::Header*>(pointer); header; header = header->prev) {
      auto* api = reinterpret_cast<const pywm::abi::Exchange*>(header);
      if (header->version.major == 1 && api->view_from_python && api->current_stream) return api;
    }
  }
  throw py::import_error("this torch offers no DLPack C exchange API of version 1; pywm's kernels need torch >= 2.10");
}

void find_torch() {
  py::module_ module = py::module_::import("torch");
  torch.api = find_exchange_api(module.attr("Tensor"));
  torch.module = module.inc_ref().ptr();
  torch.tensor = reinterpret_cast<PyTypeObject*>(module.attr("Tensor").cast<py::object>().release().ptr());
  torch.parameter =
      reinterpret_cast<PyTypeObject*>(module.attr("nn").attr("Parameter").cast<py::object>().release().ptr());
  torch.is_grad_enabled = module.attr("is_grad_enabled").cast<py::object>().release().ptr();
  py::object internals = module.attr("_C");
  if (py::hasattr(internals, "_len_torch_dispatch_stack"))
    torch.num_dispatch_modes = internals.attr("_len_torch_dispatch_stack").cast<py::object>().release().ptr();
  torch.s_requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.s_is_neg = PyUnicode_InternFromString("is_neg");
  torch.s_empty_like = PyUnicode_InternFromString("empty_like");
  torch.s_new_empty = PyUnicode_InternFromString("new_empty");
}

[[noreturn]] void rethrow() { throw py::error_already_set(); }

bool is_true(PyObject* owned) {
  if (!owned) rethrow();
  const bool result = owned == Py_True;
  Py_DECREF(owned);
  return result;
}

// Only exact tensors and parameters: a subclass may mean something else by its data. A tensor of functorch or of a
// tracer has no data to view, which is no error here.
bool view_of(py::handle object, View& view) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.api->view_from_python(object.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  return view.data || pywm::abi::numel(view) == 0;
}

// ---- how often each kernel ran: lets a test assert which backend served a call
// ---------------------------------------

struct Counter {
  const char* name;
  std::atomic<int64_t> cpu{0}, cuda{0};
};
std::array<Counter, 16> counters;

Counter& counter(const char* name) {
  for (Counter& c : counters) {
    if (!c.name) c.name = name;
    if (c.name == name || std::string(c.name) == name) return c;
  }
  throw std::logic_error("too many kernels to count");
}

// ---- one call
// --------------------------------------------------------------------------------------------------------

class Call {
 public:
  Call(const char* name, bool direct) : name_(name), direct_(direct) {
    if (!direct && torch.num_dispatch_modes) {
      PyObject* depth = PyObject_CallNoArgs(torch.num_dispatch_modes);
      if (!depth) rethrow();
      ok_ = PyLong_AsLong(depth) == 0;
      Py_DECREF(depth);
    }
  }

  bool ok() const { return ok_; }
  bool is_float() const { return first_.dtype.bits == 32; }
  const View& first() const { return first_; }
  int64_t size(int i) const { return first_.shape[i]; }
  int64_t numel() const { return pywm::abi::numel(first_); }

  // The tensor that sets dtype, device and shape.
  const void* first(py::handle object, int rank) {
    if (!ok_ || !view_of(object, first_)) return refuse();
    object_ = object;
    const bool kernel_dtype = pywm::abi::is_type<float>(first_) || pywm::abi::is_type<double>(first_);
#if defined(PYWM_WITH_CUDA)
    const bool kernel_device = first_.device.type == pywm::abi::kCPU || first_.device.type == pywm::abi::kCUDA;
#else
    const bool kernel_device = first_.device.type == pywm::abi::kCPU;
#endif
    if (!kernel_dtype || !kernel_device || (rank >= 0 && first_.ndim != rank)) return refuse();
    return plain(object, first_);
  }

  // A float tensor whose shape is the first `rank` sizes of `like`, then `extra` if it is not negative.
  const void* floats(py::handle object, const View& like, int rank, int64_t extra = -1) {
    View v;
    if (!ok_ || !view_of(object, v) || v.dtype.bits != first_.dtype.bits || v.dtype.code != first_.dtype.code ||
        !fits(v, like, rank, extra))
      return refuse();
    return plain(object, v);
  }
  const void* floats(py::handle object) { return floats(object, first_, first_.ndim); }
  // A float tensor of this shape; a negative size takes any, and `view` tells which.
  const void* floats(py::handle object, std::initializer_list<int64_t> shape, View& view) {
    if (!ok_ || !view_of(object, view) || view.dtype.bits != first_.dtype.bits ||
        view.dtype.code != first_.dtype.code || view.ndim != static_cast<int>(shape.size()) ||
        !pywm::abi::same_device(view, first_))
      return refuse();
    int i = 0;
    for (int64_t size : shape) {
      if (size >= 0 && view.shape[i] != size) return refuse();
      ++i;
    }
    return plain(object, view);
  }
  const void* optional_floats(py::handle object) { return object.is_none() ? nullptr : floats(object); }

  // [N] beside [T, N]
  const void* column(py::handle object) {
    View v;
    if (!ok_ || !view_of(object, v) || v.dtype.bits != first_.dtype.bits || v.dtype.code != first_.dtype.code ||
        v.ndim != 1 || v.shape[0] != first_.shape[1] || !pywm::abi::same_device(v, first_))
      return refuse();
    return plain(object, v);
  }

  const uint8_t* mask(py::handle object, const View& like, int rank) {
    View v;
    if (!ok_ || !view_of(object, v) || !pywm::abi::is_type<uint8_t>(v) || !fits(v, like, rank, -1) ||
        !pywm::abi::is_contiguous(v)) {
      refuse();
      return nullptr;
    }
    return static_cast<const uint8_t*>(data(v));
  }
  const uint8_t* mask(py::handle object) { return mask(object, first_, first_.ndim); }
  const uint8_t* optional_mask(py::handle object) { return object.is_none() ? nullptr : mask(object); }

  const int64_t* classes(py::handle object, const View& like, int rank, int64_t extra) {
    View v;
    if (!ok_ || !view_of(object, v) || !pywm::abi::is_type<int64_t>(v) || !fits(v, like, rank, extra) ||
        !pywm::abi::is_contiguous(v)) {
      refuse();
      return nullptr;
    }
    return static_cast<const int64_t*>(data(v));
  }

  double number(py::handle object, double low, double high) {
    double x = NAN;
    if (PyFloat_Check(object.ptr()))
      x = PyFloat_AS_DOUBLE(object.ptr());
    else if (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr()))
      x = PyLong_AsDouble(object.ptr());
    if (PyErr_Occurred()) PyErr_Clear();
    if (!(x >= low && x <= high)) refuse();
    return x;
  }

  // Whether a tensor that was looked at wants a gradient, and grad mode is on.
  bool wants_gradients() const { return wants_grad_ && is_true(PyObject_CallNoArgs(torch.is_grad_enabled)); }

  // After all inputs: what to return instead of an answer. None sends the call to the checks; NotImplemented says that
  // all is well, but that gradients are wanted.
  bool declines(py::object& answer) const {
    if (!ok_)
      answer = py::none();
    else if (!direct_ && wants_gradients())
      answer = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    else
      return false;
    return true;
  }

  // Outputs. torch.empty_like is looked up each time, so that whoever replaces it (a test that poisons) is obeyed.
  py::object like_first(void*& pointer) {
    if (!ok_) return py::none();
    PyObject* args[] = {torch.module, object_.ptr()};
    PyObject* made = PyObject_VectorcallMethod(torch.s_empty_like, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    return adopt(made, pywm::abi::numel(first_), pointer);
  }
  py::object empty(py::handle like, py::tuple shape, void*& pointer) {
    if (!ok_) return py::none();
    int64_t n = 1;
    for (py::handle size : shape) n *= size.cast<int64_t>();
    PyObject* args[] = {like.ptr(), shape.ptr()};
    PyObject* made = PyObject_VectorcallMethod(torch.s_new_empty, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
    return adopt(made, n, pointer);
  }

  // Run the launcher of the tensors' device on its current stream, without the GIL.
  template <typename Cpu, typename Cuda>
  void run(const Cpu& cpu, const Cuda& cuda) {
    Counter& count = counter(name_);
    if (first_.device.type == pywm::abi::kCPU) {
      py::gil_scoped_release release;
      cpu();
      count.cpu.fetch_add(1, std::memory_order_relaxed);
      return;
    }
#if defined(PYWM_WITH_CUDA)
    void* stream = nullptr;
    if (torch.api->current_stream(first_.device.type, first_.device.id, &stream) != 0) rethrow();
    py::gil_scoped_release release;
    const int before = pywm::cuda::current_device();
    if (before != first_.device.id) pywm::cuda::set_device(first_.device.id);
    try {
      cuda(stream);
    } catch (...) {
      if (before != first_.device.id) pywm::cuda::set_device(before);
      throw;
    }
    if (before != first_.device.id) pywm::cuda::set_device(before);
    count.cuda.fetch_add(1, std::memory_order_relaxed);
#else
    (void)cuda;
#endif
  }

  std::nullptr_t refuse() {
    ok_ = false;
    return nullptr;
  }

 private:
  static void* data(const View& v) { return static_cast<char*>(v.data) + v.byte_offset; }

  bool fits(const View& v, const View& like, int rank, int64_t extra) const {
    if (v.ndim != rank + (extra >= 0) || !pywm::abi::same_device(v, first_)) return false;
    for (int i = 0; i < rank; ++i)
      if (v.shape[i] != like.shape[i]) return false;
    return extra < 0 || v.shape[rank] == extra;
  }

  const void* plain(py::handle object, const View& v) {
    if (!pywm::abi::is_contiguous(v)) return refuse();
    if (!direct_) {
      // A view with the negative bit holds the numbers with the other sign.
      PyObject* self = object.ptr();
      PyObject* args[] = {self};
      if (is_true(PyObject_VectorcallMethod(torch.s_is_neg, args, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr)))
        return refuse();
      wants_grad_ = wants_grad_ || is_true(PyObject_GetAttr(self, torch.s_requires_grad));
    }
    // An empty array has no address; any non-null pointer tells it from a refusal.
    void* pointer = data(v);
    return pointer ? pointer : static_cast<const void*>(&torch);
  }

  py::object adopt(PyObject* made, int64_t expected, void*& pointer) {
    if (!made) rethrow();
    py::object object = py::reinterpret_steal<py::object>(made);
    View v;
    if (!view_of(object, v) || pywm::abi::numel(v) != expected || v.dtype.bits != first_.dtype.bits ||
        !pywm::abi::is_contiguous(v) || !pywm::abi::same_device(v, first_)) {
      refuse();
      return py::none();
    }
    pointer = data(v);
    return object;
  }

  const char* name_;
  bool direct_;
  bool ok_ = true;
  bool wants_grad_ = false;
  View first_{};
  py::handle object_;
};

// A NamedTuple is a tuple: fill one without its Python-level constructor.
std::map<std::string, PyTypeObject*> result_types;

template <typename... Objects>
py::object named(PyTypeObject* type, Objects&&... objects) {
  PyObject* result = type->tp_alloc(type, sizeof...(Objects));
  if (!result) rethrow();
  Py_ssize_t i = 0;
  (PyTuple_SET_ITEM(result, i++, objects.release().ptr()), ...);
  return py::reinterpret_steal<py::object>(result);
}

PyTypeObject* gae_result = &PyTuple_Type;

void register_result(const std::string& name, py::type type) {
  auto* pointer = reinterpret_cast<PyTypeObject*>(type.ptr());
  if (!PyType_IsSubtype(pointer, &PyTuple_Type)) throw py::type_error("register_result: a NamedTuple was expected");
  if (name != "gae") throw py::value_error("register_result: no op '" + name + "' takes a result type");
  Py_INCREF(pointer);
  gae_result = pointer;
}

template <typename S>
const S* in(const void* p) {
  return static_cast<const S*>(p);
}
template <typename S>
S* out(void* p) {
  return static_cast<S*>(p);
}

// Call fn<float> or fn<double>, by the dtype of the call's tensors.
template <typename Fn>
void by_dtype(const Call& call, const Fn& fn) {
  if (call.is_float())
    fn.template operator()<float>();
  else
    fn.template operator()<double>();
}

// ---- the ops
// ---------------------------------------------------------------------------------------------------------

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

// An output that is wanted, or an empty tensor in its place.
py::object wanted(Call& call, bool yes, py::handle like, void*& pointer) {
  if (yes) return call.like_first(pointer);
  void* unused = nullptr;
  py::object empty = call.empty(like, py::make_tuple(0), unused);
  pointer = nullptr;
  return empty;
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
  py::object reward = wanted(call, want_reward, like, reward_data);
  py::object value = wanted(call, want_value, like, value_data);
  py::object next = wanted(call, want_next_value, like, next_data);
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
  py::object grad_reward = wanted(call, want_reward, grad, reward_data);
  py::object grad_discount = wanted(call, want_discount, grad, discount_data);
  py::object grad_next = wanted(call, want_next_value, grad, next_data);
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
  py::object grad_reward = wanted(call, want_reward, grad, reward_data);
  py::object grad_discount = wanted(call, want_discount, grad, discount_data);
  py::object grad_bootstrap = call.empty(grad, py::make_tuple(want_bootstrap ? call.size(1) : 0), bootstrap_data);
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

void no_cuda_kernel(const char* name) {
  throw std::runtime_error(std::string(name) + ": no CUDA kernel; the reference should have served this call");
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
  if (call.ok() && (call.size(0) < 1 || rho == 0 || c == 0 || call.first().device.type != pywm::abi::kCPU))
    call.refuse();
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
  if (!call.ok() || call.first().device.type != pywm::abi::kCPU) return py::none();
  void *reward_data, *discount_data, *value_data, *next_data;
  py::object grad_reward = wanted(call, want_reward, log_ratio, reward_data);
  py::object grad_discount = wanted(call, want_discount, log_ratio, discount_data);
  py::object grad_value = wanted(call, want_value, log_ratio, value_data);
  py::object grad_next = wanted(call, want_next_value, log_ratio, next_data);
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

// The tensors that both families of the PPO loss share. `rank` leading sizes of `like` are the rows.
template <typename S>
struct PpoInputs {
  pywm::PpoLossCommon<S> common;
};

struct PpoTensors {
  const void *old_log_prob, *advantage, *value, *returns, *old_value;
  const uint8_t* valid;
  void *loss_data, *stats_data, *grad_value_data;
  py::object loss, stats, grad_value, workspace;
  double* workspace_data = nullptr;
  int64_t M = 1;
  pywm::PpoLossOptions options;

  void inputs(Call& call, py::handle old_log_prob_, py::handle advantage_, py::handle value_, py::handle returns_,
              py::handle old_value_, py::handle valid_, int rank) {
    const View& like = call.first();
    old_log_prob = call.floats(old_log_prob_, like, rank);
    advantage = call.floats(advantage_, like, rank);
    value = call.floats(value_, like, rank);
    returns = call.floats(returns_, like, rank);
    old_value = old_value_.is_none() ? nullptr : call.floats(old_value_, like, rank);
    valid = valid_.is_none() ? nullptr : call.mask(valid_, like, rank);
    if (call.ok())
      for (int i = 0; i < rank; ++i) M *= like.shape[i];
  }

  void outputs(Call& call, py::handle like, py::handle value_object, bool want_value, int64_t columns) {
    loss = call.empty(like, py::tuple(0), loss_data);
    stats = call.empty(like, py::make_tuple(5), stats_data);
    if (want_value) {
      py::tuple shape(value_object.attr("shape"));
      grad_value = call.empty(like, shape, grad_value_data);
    } else {
      void* unused;
      grad_value = call.empty(like, py::make_tuple(0), unused);
      grad_value_data = nullptr;
    }
    (void)columns;
#if defined(PYWM_WITH_CUDA)
    if (call.ok() && call.first().device.type == pywm::abi::kCUDA) {
      // Scratch from torch's allocator, which ties it to the current stream. Counted in doubles, allocated in bytes.
      const int64_t doubles = pywm::cuda::ppo_loss_workspace(M, columns);
      workspace = like.attr("new_empty")(py::make_tuple(doubles), "dtype"_a = py::handle(torch.module).attr("float64"));
      View v;
      if (view_of(workspace, v)) workspace_data = static_cast<double*>(v.data);
    }
#endif
  }

  template <typename S>
  pywm::PpoLossCommon<S> common() const {
    return {in<S>(old_log_prob),
            in<S>(advantage),
            in<S>(value),
            in<S>(returns),
            in<S>(old_value),
            valid,
            out<S>(loss_data),
            out<S>(stats_data),
            out<S>(grad_value_data),
            workspace_data,
            M,
            options};
  }
};

py::object ppo_loss_categorical(py::handle logits, const std::vector<int64_t>& nvec, py::handle action,
                                py::handle old_log_prob, py::handle advantage, py::handle value, py::handle returns,
                                py::handle old_value, py::handle valid, double clip, double value_clip,
                                double value_coef, double entropy_coef, bool normalize_advantage, bool grouped,
                                bool want_dist, bool want_value, bool direct) {
  Call call("ppo_loss_categorical", direct);
  const void* l = call.first(logits, -1);
  if (!call.ok() || call.first().ndim < 1) return py::none();
  const int rank = call.first().ndim - 1;
  int64_t width = 0;
  for (int64_t n : nvec) {
    if (n < 1 || n > call.first().shape[rank] - width) return py::none();  // sums of anything could overflow
    width += n;
  }
  const int64_t G = static_cast<int64_t>(nvec.size());
  if (width != call.first().shape[rank] || G > pywm::kMaxGroups || (!grouped && G != 1)) return py::none();
  const int64_t* act = call.classes(action, call.first(), rank, grouped ? G : -1);
  PpoTensors t;
  t.inputs(call, old_log_prob, advantage, value, returns, old_value, valid, rank);
  if (!call.ok() || t.M == 0 || (value_clip >= 0) != (t.old_value != nullptr)) return py::none();
  t.options = {clip, value_clip, value_coef, entropy_coef, normalize_advantage};
  t.outputs(call, logits, value, want_value, 0);
  void* grad_data;
  py::object grad = wanted(call, want_dist, logits, grad_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::PpoLossCategoricalArgs<S> a{t.common<S>(), in<S>(l), act, nvec.data(), out<S>(grad_data), G, width};
    call.run([&] { pywm::cpu::ppo_loss_categorical(a); },
             [&](void* stream) { pywm::cuda::ppo_loss_categorical(a, stream); });
  });
  return py::make_tuple(t.loss, t.stats, grad, t.grad_value);
}

py::object ppo_loss_gaussian(py::handle mean, py::handle log_std, py::handle action, py::handle old_log_prob,
                             py::handle advantage, py::handle value, py::handle returns, py::handle old_value,
                             py::handle valid, double clip, double value_clip, double value_coef, double entropy_coef,
                             bool normalize_advantage, bool want_dist, bool want_value, bool direct) {
  Call call("ppo_loss_gaussian", direct);
  const void* mu = call.first(mean, -1);
  if (!call.ok() || call.first().ndim < 1) return py::none();
  const int rank = call.first().ndim - 1;
  const int64_t A = call.first().shape[rank];
  if (A < 1) return py::none();
  View v;
  if (!view_of(log_std, v)) return py::none();
  const bool shared = v.ndim == 1;
  const void* ls = shared ? call.floats(log_std, call.first(), 0, A) : call.floats(log_std);
  const void* act = call.floats(action);
  PpoTensors t;
  t.inputs(call, old_log_prob, advantage, value, returns, old_value, valid, rank);
  if (!call.ok() || t.M == 0 || (value_clip >= 0) != (t.old_value != nullptr)) return py::none();
  t.options = {clip, value_clip, value_coef, entropy_coef, normalize_advantage};
  t.outputs(call, mean, value, want_value, shared && want_dist ? A : 0);
  void *mean_data, *log_std_data = nullptr;
  py::object grad_mean = wanted(call, want_dist, mean, mean_data);
  py::object grad_log_std = shared ? call.empty(mean, py::make_tuple(want_dist ? A : 0), log_std_data)
                                   : wanted(call, want_dist, mean, log_std_data);
  if (!want_dist) log_std_data = nullptr;
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::PpoLossGaussianArgs<S> a{
        t.common<S>(), in<S>(mu), in<S>(ls), in<S>(act), out<S>(mean_data), out<S>(log_std_data), A, shared ? 1 : t.M};
    call.run([&] { pywm::cpu::ppo_loss_gaussian(a); }, [&](void* stream) { pywm::cuda::ppo_loss_gaussian(a, stream); });
  });
  return py::make_tuple(t.loss, t.stats, grad_mean, grad_log_std, t.grad_value);
}

// The weights and biases of a perceptron, each layer fitting the one before.
struct MlpTensors {
  std::vector<const void*> weights, biases;
  std::vector<int64_t> sizes;
  int64_t M = 1, L = 0, hidden = 0;  // hidden: the widths between input and output, added up

  bool read(Call& call, py::handle weights_, py::handle biases_) {
    const View& x = call.first();
    if (!call.ok() || x.ndim < 1 || x.device.type != pywm::abi::kCPU) return false;
    if (!PyList_Check(weights_.ptr()) && !PyTuple_Check(weights_.ptr())) return false;
    L = PySequence_Fast_GET_SIZE(weights_.ptr());
    const bool with_biases = !biases_.is_none();
    if (with_biases && ((!PyList_Check(biases_.ptr()) && !PyTuple_Check(biases_.ptr())) ||
                        PySequence_Fast_GET_SIZE(biases_.ptr()) != L))
      return false;
    for (int i = 0; i < x.ndim - 1; ++i) M *= x.shape[i];
    weights.reserve(L);
    biases.reserve(L);
    sizes.reserve(L + 1);
    sizes.push_back(x.shape[x.ndim - 1]);
    for (int64_t l = 0; l < L; ++l) {
      View v;
      weights.push_back(call.floats(PySequence_Fast_GET_ITEM(weights_.ptr(), l), {-1, sizes[l]}, v));
      if (!call.ok()) return false;
      sizes.push_back(v.shape[0]);
      if (with_biases) biases.push_back(call.floats(PySequence_Fast_GET_ITEM(biases_.ptr(), l), {sizes[l + 1]}, v));
      if (!call.ok() || sizes[l] < 1 || sizes[l + 1] < 1) return false;
    }
    for (int64_t l = 1; l < L; ++l) hidden += sizes[l];
    return L > 0;
  }
};

template <typename S>
const S* const* in(const std::vector<const void*>& pointers) {
  return reinterpret_cast<const S* const*>(pointers.data());
}
template <typename S>
S* const* out(const std::vector<void*>& pointers) {
  return reinterpret_cast<S* const*>(pointers.data());
}

bool activation_of(py::handle name, pywm::Activation& activation) {
  constexpr const char* kNames[] = {"none", "tanh", "silu", "elu", "relu"};  // in the order of the enumeration
  if (!PyUnicode_Check(name.ptr())) return false;
  for (int i = 0; i < 5; ++i)
    if (PyUnicode_CompareWithASCIIString(name.ptr(), kNames[i]) == 0) {
      activation = static_cast<pywm::Activation>(i);
      return true;
    }
  return false;
}

// How many elements keep the derivatives of layers whose activations do not tell them.
int64_t slopes_size(const MlpTensors& t, pywm::Activation activation, pywm::Activation output_activation) {
  return (activation == pywm::Activation::kSilu ? t.M * t.hidden : 0) +
         (output_activation == pywm::Activation::kSilu ? t.M * t.sizes.back() : 0);
}

// Returns y; with `keep`, y and what the backward pass needs. NotImplemented: all is well, but gradients are wanted.
py::object mlp(py::handle x, py::handle weights, py::handle biases, py::handle activation, py::handle output_activation,
               bool keep, bool direct) {
  Call call("mlp", direct);
  pywm::Activation f, f_out;
  const void* xs = call.first(x, -1);
  MlpTensors t;
  if (biases.is_none() || !t.read(call, weights, biases) || !activation_of(activation, f) ||
      !activation_of(output_activation, f_out) || f == pywm::Activation::kNone)
    return py::none();
  if (!direct && call.wants_gradients()) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  const View& v = call.first();
  py::tuple shape(v.ndim);
  for (int i = 0; i < v.ndim; ++i) shape[i] = py::int_(i + 1 < v.ndim ? v.shape[i] : t.sizes.back());
  // Without gradients the activations are scratch, in front of the packed weights.
  const int64_t hidden_size = t.M * t.hidden, slopes = keep ? slopes_size(t, f, f_out) : 0;
  const int64_t packed_size = call.is_float() ? pywm::cpu::mlp_workspace<float>(t.sizes.data(), t.L)
                                              : pywm::cpu::mlp_workspace<double>(t.sizes.data(), t.L);
  void *y_data = nullptr, *kept_data = nullptr, *scratch_data = nullptr;
  py::object y = call.empty(x, shape, y_data), kept;
  if (keep) kept = call.empty(x, py::make_tuple(hidden_size + slopes), kept_data);
  if (t.M > 0) {
    py::object scratch = call.empty(x, py::make_tuple(packed_size + (keep ? 0 : hidden_size)), scratch_data);
    if (!call.ok()) return py::none();
    by_dtype(call, [&]<typename S>() {
      S* packed = out<S>(scratch_data);
      S* hidden = keep ? out<S>(kept_data) : packed + packed_size;
      const pywm::MlpArgs<S> a{in<S>(xs),
                               in<S>(t.weights),
                               in<S>(t.biases),
                               t.sizes.data(),
                               out<S>(y_data),
                               hidden,
                               keep ? hidden + hidden_size : nullptr,
                               packed,
                               t.M,
                               t.L,
                               f,
                               f_out};
      call.run([&] { pywm::cpu::mlp(a); }, [&](void*) { no_cuda_kernel("mlp"); });
    });
  }
  if (!call.ok()) return py::none();
  return keep ? py::object(py::make_tuple(y, kept)) : y;
}

// Returns a list: the gradient of x (an empty tensor if unwanted), then those of all weights and all biases if wanted.
py::object mlp_backward(py::handle grad, py::handle x, py::handle y, py::handle kept, py::handle weights,
                        py::handle activation, py::handle output_activation, bool want_x, bool want_parameters) {
  Call call("mlp_backward", true);
  pywm::Activation f, f_out;
  const void* xs = call.first(x, -1);
  MlpTensors t;
  if (!t.read(call, weights, py::none()) || !activation_of(activation, f) || !activation_of(output_activation, f_out) ||
      t.M == 0)
    return py::none();
  View v;
  const int rank = call.first().ndim - 1;
  const int64_t hidden_size = t.M * t.hidden, O = t.sizes.back();
  const void* gs = call.floats(grad, call.first(), rank, O);
  const void* ys = f_out == pywm::Activation::kNone ? nullptr : call.floats(y, call.first(), rank, O);
  const void* ks = call.floats(kept, {hidden_size + slopes_size(t, f, f_out)}, v);
  if (!call.ok()) return py::none();
  py::list result;
  void *grad_x_data = nullptr, *scratch_data = nullptr;
  result.append(wanted(call, want_x, x, grad_x_data));
  std::vector<void*> grad_weights(t.L), grad_biases(t.L);
  if (want_parameters) {
    for (int64_t l = 0; l < t.L; ++l)
      result.append(call.empty(x, py::make_tuple(t.sizes[l + 1], t.sizes[l]), grad_weights[l]));
    for (int64_t l = 0; l < t.L; ++l) result.append(call.empty(x, py::make_tuple(t.sizes[l + 1]), grad_biases[l]));
  }
  const int64_t packed_size = call.is_float() ? pywm::cpu::mlp_backward_workspace<float>(t.sizes.data(), t.L)
                                              : pywm::cpu::mlp_backward_workspace<double>(t.sizes.data(), t.L);
  py::object scratch = call.empty(x, py::make_tuple(packed_size + hidden_size + t.M * O), scratch_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    S* packed = out<S>(scratch_data);
    const S* hidden = in<S>(ks);
    const pywm::MlpBackwardArgs<S> a{in<S>(gs),
                                     in<S>(xs),
                                     in<S>(ys),
                                     hidden,
                                     hidden + hidden_size,
                                     in<S>(t.weights),
                                     t.sizes.data(),
                                     out<S>(grad_x_data),
                                     want_parameters ? out<S>(grad_weights) : nullptr,
                                     out<S>(grad_biases),
                                     packed,
                                     packed + packed_size,
                                     t.M,
                                     t.L,
                                     f,
                                     f_out};
    call.run([&] { pywm::cpu::mlp_backward(a); }, [&](void*) { no_cuda_kernel("mlp_backward"); });
  });
  return result;
}

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
  const double rate = call.number(lr, 0, INFINITY), b1 = call.number(beta1, 0, kBelow1),
               b2 = call.number(beta2, 0, kBelow1), e = call.number(eps, 0, INFINITY);
  const double c = max_grad_norm.is_none() ? -1 : call.number(max_grad_norm, 0, INFINITY);
  py::object answer;
  if (call.ok() && (std::isnan(k) || call.numel() == 0 || call.first().device.type != pywm::abi::kCPU)) call.refuse();
  if (call.declines(answer)) return py::none();
  void* norm_data = nullptr;
  py::object norm = call.empty(param, py::tuple(0), norm_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::AdamArgs<S> a{
        out<S>(p), in<S>(g), out<S>(m), out<S>(v), out<S>(norm_data), call.numel(), static_cast<int64_t>(k), rate,
        b1,        b2,       e,         c};
    call.run([&] { pywm::cpu::adam_step(a); }, [&](void*) { no_cuda_kernel("adam_step_"); });
  });
  return norm;
}

py::dict calls() {
  py::dict result;
  for (const Counter& c : counters)
    if (c.name) result[c.name] = py::make_tuple(c.cpu.load(), c.cuda.load());
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pywm. Private: call pywm.ops instead.";
  find_torch();
  pywm::cpu::kernels();  // an unusable PYWM_CPU_ISA is an error now, not at the first call
  for (const char* name : {"gae", "gae_backward", "lambda_return", "lambda_return_backward", "discounted_return",
                           "discounted_return_backward", "vtrace", "vtrace_backward", "ppo_loss_categorical",
                           "ppo_loss_gaussian", "mlp", "mlp_backward", "adam_step_"})
    counter(name);

  m.attr("__version__") = PYWM_VERSION;
  m.attr("cuda_reason") = PYWM_CUDA_REASON;
  m.attr("max_groups") = pywm::kMaxGroups;
#if defined(PYWM_WITH_CUDA)
  m.attr("has_cuda") = true;
  m.def("cuda_device_count", &pywm::cuda::device_count);
  m.def("cuda_status", &pywm::cuda::status);
#else
  m.attr("has_cuda") = false;
  m.def("cuda_device_count", [] { return 0; });
  m.def("cuda_status", [] { return "built without CUDA"; });
#endif
  m.def("cpu_isa", [] { return pywm::cpu::kernels().name; }, "Instruction set of the CPU kernels in use.");
  m.def("cpu_isas", [] { return pywm::cpu::available_isas(); }, "Instruction sets that this machine can run.");
  m.def("num_threads", &pywm::cpu::num_threads, "Threads that a large call would use now.");
  m.def("calls", &calls, "How often each kernel ran so far: name -> (CPU, CUDA).");
  m.def("register_result", &register_result, "name"_a, "type"_a);

  m.def("gae", &gae, "reward"_a, "value"_a, "next_value"_a, "terminated"_a, "truncated"_a, "valid"_a, "discount"_a,
        "lam"_a, "direct"_a);
  m.def("gae_backward", &gae_backward, "like"_a, "grad_advantage"_a, "grad_returns"_a, "terminated"_a, "truncated"_a,
        "valid"_a, "discount"_a, "lam"_a, "want_reward"_a, "want_value"_a, "want_next_value"_a);
  m.def("lambda_return", &lambda_return, "reward"_a, "discount"_a, "next_value"_a, "lam_rows"_a, "lam"_a, "valid"_a,
        "direct"_a);
  m.def("lambda_return_backward", &lambda_return_backward, "grad"_a, "discount"_a, "next_value"_a, "returns"_a,
        "lam_rows"_a, "lam"_a, "valid"_a, "want_reward"_a, "want_discount"_a, "want_next_value"_a);
  m.def("discounted_return", &discounted_return, "reward"_a, "discount"_a, "bootstrap"_a, "direct"_a);
  m.def("discounted_return_backward", &discounted_return_backward, "grad"_a, "discount"_a, "bootstrap"_a, "returns"_a,
        "want_reward"_a, "want_discount"_a, "want_bootstrap"_a);
  m.def("vtrace", &vtrace, "log_ratio"_a, "reward"_a, "discount"_a, "value"_a, "next_value"_a, "truncated"_a, "lam"_a,
        "rho_clip"_a, "c_clip"_a, "keep"_a, "direct"_a);
  m.def("vtrace_backward", &vtrace_backward, "grad_target"_a, "grad_advantage"_a, "log_ratio"_a, "discount"_a,
        "next_value"_a, "y"_a, "truncated"_a, "lam"_a, "rho_clip"_a, "c_clip"_a, "want_reward"_a, "want_discount"_a,
        "want_value"_a, "want_next_value"_a);
  m.def("ppo_loss_categorical", &ppo_loss_categorical, "logits"_a, "nvec"_a, "action"_a, "old_log_prob"_a,
        "advantage"_a, "value"_a, "returns"_a, "old_value"_a, "valid"_a, "clip"_a, "value_clip"_a, "value_coef"_a,
        "entropy_coef"_a, "normalize_advantage"_a, "grouped"_a, "want_dist"_a, "want_value"_a, "direct"_a);
  m.def("ppo_loss_gaussian", &ppo_loss_gaussian, "mean"_a, "log_std"_a, "action"_a, "old_log_prob"_a, "advantage"_a,
        "value"_a, "returns"_a, "old_value"_a, "valid"_a, "clip"_a, "value_clip"_a, "value_coef"_a, "entropy_coef"_a,
        "normalize_advantage"_a, "want_dist"_a, "want_value"_a, "direct"_a);
  m.def("mlp", &mlp, "x"_a, "weights"_a, "biases"_a, "activation"_a, "output_activation"_a, "keep"_a, "direct"_a);
  m.def("mlp_backward", &mlp_backward, "grad"_a, "x"_a, "y"_a, "kept"_a, "weights"_a, "activation"_a,
        "output_activation"_a, "want_x"_a, "want_parameters"_a);
  m.def("adam_step_", &adam_step_, "param"_a, "grad"_a, "exp_avg"_a, "exp_avg_sq"_a, "step"_a, "lr"_a, "beta1"_a,
        "beta2"_a, "eps"_a, "max_grad_norm"_a, "direct"_a);
}
