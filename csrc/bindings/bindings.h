// Python <-> C++ boundary, shared by the files of this folder, the only ones that include pybind11.
//
// Every op has one entry. It looks at the tensors through torch's DLPack exchange API, and serves the call only if it
// is plain: ordinary tensors of one device, one kernel dtype and fitting shapes, contiguous, nothing that asks for
// gradients, nobody tracing. Otherwise it returns None, and pywm/ops explains what is wrong or finds the way that
// works. So the common call costs one crossing, and every message is written in one place, pywm/ops/_check.py.
//
// `direct` calls come from below the dispatcher, which has seen to gradients and tracing already.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <initializer_list>
#include <limits>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <utility>

#include "../cpu/kernels.h"
#include "../ops.h"
#include "../tensor.h"
#include "memory.h"

namespace pywm::bindings {

namespace py = pybind11;
using namespace py::literals;
using abi::View;

void define_returns(py::module_& m);
void define_ppo_loss(py::module_& m);
void define_mlp(py::module_& m);
void define_norm_mlp(py::module_& m);
void define_norm_act(py::module_& m);
void define_gru_gates(py::module_& m);
void define_one_hot_linear(py::module_& m);
void define_adam_step(py::module_& m);
void define_laprop_step(py::module_& m);
void define_rssm(py::module_& m);
void define_rssm_products(py::module_& m);
void define_distributions(py::module_& m);
void define_pixels(py::module_& m);

// ---- torch, looked up once -----------------------------------------------------------------------------------------

struct Torch {
  const abi::Exchange* api = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* module = nullptr;
  PyObject* is_grad_enabled = nullptr;
  PyObject* is_neg = nullptr;
  PyObject* num_dispatch_modes = nullptr;  // null in a torch that has no such function
  PyObject *s_requires_grad = nullptr, *s_empty_like = nullptr, *s_new_empty = nullptr;
};
extern Torch torch;

void find_torch();

[[noreturn]] inline void rethrow() { throw py::error_already_set(); }

inline bool is_true(PyObject* owned) {
  if (!owned) rethrow();
  const bool result = owned == Py_True;
  Py_DECREF(owned);
  return result;
}

// Only exact tensors and parameters: a subclass may mean something else by its data. A tensor of functorch or of a
// tracer has no data to view, which is no error here.
inline bool view_of(py::handle object, View& view) {
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type != torch.tensor && type != torch.parameter) return false;
  if (torch.api->view_from_python(object.ptr(), &view) != 0) {
    PyErr_Clear();
    return false;
  }
  return view.data || abi::numel(view) == 0;
}

// How often each kernel ran: lets a test assert which backend served a call. Finds the counter of this name, or makes
// it; `name` is a literal.
struct Counter {
  const char* name;
  std::atomic<int64_t> cpu{0}, cuda{0};
};
Counter& counter(const char* name);
py::dict calls();

// ---- one call ------------------------------------------------------------------------------------------------------

class Call {
 public:
  Call(const char* name, bool direct) : name_(name), direct_(direct) {
    if (direct) return;
    if (torch.num_dispatch_modes) {
      PyObject* depth = PyObject_CallNoArgs(torch.num_dispatch_modes);
      if (!depth) rethrow();
      ok_ = PyLong_AsLong(depth) == 0;
      Py_DECREF(depth);
    }
    grad_mode_ = is_true(PyObject_CallNoArgs(torch.is_grad_enabled));
  }

  bool ok() const { return ok_; }
  bool direct() const { return direct_; }
  bool is_float() const { return first_.dtype.bits == 32; }
  bool on_cpu() const { return first_.device.type == abi::kCPU; }
  const View& first() const { return first_; }
  int64_t size(int i) const { return first_.shape[i]; }
  int64_t numel() const { return abi::numel(first_); }

  // The tensor that sets dtype, device and shape.
  const void* first(py::handle object, int rank) {
    if (!ok_ || !view_of(object, first_)) return refuse();
    object_ = object;
    const bool kernel_dtype = abi::is_type<float>(first_) || abi::is_type<double>(first_);
    if (!kernel_dtype || !on_kernel_device() || (rank >= 0 && first_.ndim != rank)) return refuse();
    return plain(object, first_);
  }

  // The same, of bytes.
  const uint8_t* first_bytes(py::handle object, int rank) {
    if (!ok_ || !view_of(object, first_)) return refuse();
    object_ = object;
    if (!abi::is_bytes(first_) || !on_kernel_device() || (rank >= 0 && first_.ndim != rank) ||
        !abi::is_contiguous(first_))
      return refuse();
    return static_cast<const uint8_t*>(data(first_));
  }

  // A float tensor whose shape is the first `rank` sizes of `like`, then `extra` if it is not negative.
  const void* floats(py::handle object, const View& like, int rank, int64_t extra = -1) {
    View v;
    if (!ok_ || !view_of(object, v) || !same_dtype(v) || !fits(v, like, rank, extra)) return refuse();
    return plain(object, v);
  }
  const void* floats(py::handle object) { return floats(object, first_, first_.ndim); }
  // A float tensor of this shape; a negative size takes any, and `view` tells which.
  const void* floats(py::handle object, std::initializer_list<int64_t> shape, View& view) {
    if (!ok_ || !view_of(object, view) || !same_dtype(view) || view.ndim != static_cast<int>(shape.size()) ||
        !abi::same_device(view, first_))
      return refuse();
    int i = 0;
    for (int64_t size : shape) {
      if (size >= 0 && view.shape[i] != size) return refuse();
      ++i;
    }
    return plain(object, view);
  }
  // Of any shape, which `view` tells.
  const void* any_floats(py::handle object, View& view) {
    if (!ok_ || !view_of(object, view) || !same_dtype(view) || !abi::same_device(view, first_)) return refuse();
    return plain(object, view);
  }
  // [N, width], each row contiguous, `stride` numbers apart.
  const void* float_rows(py::handle object, int64_t N, int64_t& width, int64_t& stride) {
    View v;
    if (!ok_ || !view_of(object, v) || !same_dtype(v) || !abi::same_device(v, first_) || v.ndim != 2 ||
        v.shape[0] != N || v.shape[1] < 1 || (v.strides && v.shape[1] > 1 && v.strides[1] != 1))
      return refuse();
    width = v.shape[1];
    stride = v.strides ? v.strides[0] : width;
    return stride >= width || N == 1 ? data(v) : refuse();
  }
  const void* optional_floats(py::handle object) { return object.is_none() ? nullptr : floats(object); }

  // [N] beside [T, N]
  const void* column(py::handle object) {
    View v;
    return ok_ ? floats(object, {first_.shape[1]}, v) : nullptr;
  }

  const uint8_t* mask(py::handle object, const View& like, int rank) {
    View v;
    if (!ok_ || !view_of(object, v) || !abi::is_type<uint8_t>(v) || !fits(v, like, rank, -1) || !abi::is_contiguous(v))
      return refuse();
    return static_cast<const uint8_t*>(data(v));
  }
  const uint8_t* mask(py::handle object) { return mask(object, first_, first_.ndim); }
  const uint8_t* optional_mask(py::handle object) { return object.is_none() ? nullptr : mask(object); }

  // bool [N]
  const uint8_t* mask_of(py::handle object, int64_t N, View& view) {
    if (!ok_ || !view_of(object, view) || !abi::is_type<uint8_t>(view) || !abi::same_device(view, first_) ||
        view.ndim != 1 || view.shape[0] != N || !abi::is_contiguous(view))
      return refuse();
    return static_cast<const uint8_t*>(data(view));
  }

  // Bytes of any shape, which `view` tells.
  const uint8_t* bytes(py::handle object, View& view) {
    if (!ok_ || !view_of(object, view) || !abi::is_bytes(view) || !abi::same_device(view, first_) ||
        !abi::is_contiguous(view))
      return refuse();
    return static_cast<const uint8_t*>(data(view));
  }

  const int64_t* classes(py::handle object, const View& like, int rank, int64_t extra) {
    View v;
    if (!ok_ || !view_of(object, v) || !abi::is_type<int64_t>(v) || !fits(v, like, rank, extra) ||
        !abi::is_contiguous(v))
      return refuse();
    return static_cast<const int64_t*>(data(v));
  }

  // int64 of one axis of any size, which `view` tells.
  const int64_t* indices(py::handle object, View& view) {
    if (!ok_ || !view_of(object, view) || !abi::is_type<int64_t>(view) || !abi::same_device(view, first_) ||
        view.ndim != 1 || !abi::is_contiguous(view))
      return refuse();
    return static_cast<const int64_t*>(data(view));
  }

  // bfloat16 [N], as its bits.
  uint16_t* bfloat16s(py::handle object, int64_t N) {
    View v;
    if (!ok_ || !view_of(object, v) || v.dtype.code != abi::kBFloat || v.dtype.bits != 16 || v.dtype.lanes != 1 ||
        v.ndim != 1 || v.shape[0] != N || !abi::same_device(v, first_))
      return refuse();
    return static_cast<uint16_t*>(const_cast<void*>(plain(object, v)));
  }

  // uint8 of the first `rank` sizes of `like`, then `extra`.
  const uint8_t* bytes(py::handle object, const View& like, int rank, int64_t extra) {
    View v;
    if (!ok_ || !view_of(object, v) || v.dtype.code != abi::kUInt || v.dtype.bits != 8 || v.dtype.lanes != 1 ||
        !fits(v, like, rank, extra) || !abi::is_contiguous(v))
      return refuse();
    return static_cast<const uint8_t*>(data(v));
  }

  double number(py::handle object, double low, double high);
  static constexpr double kFinite = std::numeric_limits<double>::max();

  // Whether a tensor that was looked at wants a gradient, and grad mode is on.
  bool wants_gradients() const { return wants_grad_; }

  // After all inputs: what to return instead of an answer. None sends the call to the checks; NotImplemented says that
  // all is well, but that gradients are wanted.
  bool declines(py::object& answer) const {
    if (!ok_)
      answer = py::none();
    else if (wants_grad_)
      answer = py::reinterpret_borrow<py::object>(Py_NotImplemented);
    else
      return false;
    return true;
  }

  // Outputs, of the first tensor's dtype, on its device.
  py::object like_first(void*& pointer);
  py::object empty(std::initializer_list<int64_t> shape, void*& pointer) {
    return empty(shape.begin(), static_cast<int>(shape.size()), pointer);
  }
  py::object empty(const int64_t* shape, int rank, void*& pointer);
  // The same, of torch.uint8.
  py::object bytes(const int64_t* shape, int rank, void*& pointer);
  // One that is wanted, or an empty tensor in its place and a null pointer.
  py::object wanted(bool yes, void*& pointer) {
    if (yes) return like_first(pointer);
    py::object none = empty({0}, pointer);
    pointer = nullptr;
    return none;
  }
  py::object wanted(bool yes, std::initializer_list<int64_t> shape, void*& pointer) {
    return yes ? empty(shape, pointer) : wanted(false, pointer);
  }

  // Run the launcher of the tensors' device on its current stream, without the GIL.
  template <typename Cpu, typename Cuda>
  void run(const Cpu& cpu, const Cuda& cuda) {
    Counter& count = counter(name_);
    if (on_cpu()) {
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

  // Where the numbers of a view are.
  static void* data(const View& v) { return static_cast<char*>(v.data) + v.byte_offset; }

  std::nullptr_t refuse() {
    ok_ = false;
    return nullptr;
  }

 private:
  bool on_kernel_device() const {
#if defined(PYWM_WITH_CUDA)
    return on_cpu() || first_.device.type == abi::kCUDA;
#else
    return on_cpu();
#endif
  }

  static bool is_dtype(const View& v, abi::DType dtype) {
    return v.dtype.bits == dtype.bits && v.dtype.code == dtype.code;
  }
  bool same_dtype(const View& v) const { return is_dtype(v, first_.dtype); }

  bool fits(const View& v, const View& like, int rank, int64_t extra) const {
    if (v.ndim != rank + (extra >= 0) || !abi::same_device(v, first_)) return false;
    for (int i = 0; i < rank; ++i)
      if (v.shape[i] != like.shape[i]) return false;
    return extra < 0 || v.shape[rank] == extra;
  }

  const void* plain(py::handle object, const View& v) {
    if (!abi::is_contiguous(v)) return refuse();
    if (!direct_) {
      // A view with the negative bit holds the numbers with the other sign.
      PyObject* self = object.ptr();
      if (is_true(PyObject_Vectorcall(torch.is_neg, &self, 1, nullptr))) return refuse();
      if (grad_mode_ && !wants_grad_) wants_grad_ = is_true(PyObject_GetAttr(self, torch.s_requires_grad));
    }
    // An empty array has no address; any non-null pointer tells it from a refusal.
    void* pointer = data(v);
    return pointer ? pointer : static_cast<const void*>(&torch);
  }

  py::object empty(abi::DType dtype, const int64_t* shape, int rank, void*& pointer);
  py::object adopt(PyObject* made, abi::DType dtype, int64_t expected, void*& pointer);

  const char* name_;
  bool direct_;
  bool ok_ = true;
  bool grad_mode_ = false;
  bool wants_grad_ = false;
  View first_{};
  py::handle object_;
};

// Memory on the CPU for the length of a call.
class Scratch {
 public:
  Scratch(const Call& call, int64_t count) : block_(new_block(call.first().dtype, &count, 1, &data)) {
    if (!block_) throw std::bad_alloc();
  }
  ~Scratch() { block_->deleter(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data = nullptr;  // before block_, which sets it

 private:
  abi::Managed* block_;
};

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

// A class that is none is all that can be wrong when a kernel runs: a ValueError for the caller to pass on.
template <typename Run>
void named(const Run& run) {
  try {
    run();
  } catch (const std::out_of_range& error) {
    throw py::value_error(error.what());
  }
}

[[noreturn]] void no_cuda_kernel(const char* name);

// The activation of this name ("none" is one), if there is one.
bool activation_of(py::handle name, pywm::Activation& activation);

// Elements of scratch for the gradients of a normalisation's scale and shift.
int64_t norm_workspace(const Call& call, int64_t M, int64_t D);

// ---- entries without pybind11's dispatch, which costs as much as a small kernel ------------------------------------

template <typename T>
T argument(PyObject* object) {
  if constexpr (std::is_same_v<T, bool>)
    return object == Py_True;
  else
    return T(object);
}

template <auto fn>
struct Fast;
template <typename... Args, py::object (*fn)(Args...)>
struct Fast<fn> {
  template <size_t... I>
  static py::object spread(PyObject* const* args, std::index_sequence<I...>) {
    return fn(argument<Args>(args[I])...);
  }
  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    if (count != sizeof...(Args)) {
      PyErr_Format(PyExc_TypeError, "pywm._C: %zd arguments came, but %zu were expected", count, sizeof...(Args));
      return nullptr;
    }
    (void)self;
    try {
      return spread(args, std::index_sequence_for<Args...>{}).release().ptr();
    } catch (py::error_already_set& error) {
      error.restore();
    } catch (const py::builtin_exception& error) {
      error.set_error();
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::out_of_range& error) {
      PyErr_SetString(PyExc_IndexError, error.what());
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

// Define a function of handles and bools that takes its arguments by position. `signature` is the first line of its
// docstring, from which the stub is written: "name(first: object, ...) -> object".
template <auto fn>
void define_fast(py::module_& m, const char* name, const char* signature) {
  static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&Fast<fn>::call)),
                                METH_FASTCALL, signature};
  m.attr(name) = py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, m.ptr(), nullptr));
}

}  // namespace pywm::bindings
