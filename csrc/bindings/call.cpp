#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "memory.h"

namespace pywm::bindings {

Torch torch;

namespace {

// The newest names first; torch 2.10 spelt the attribute differently before its release.
const abi::Exchange* find_exchange_api(py::handle tensor_type) {
  for (const char* attribute : {"__dlpack_c_exchange_api__", "__c_dlpack_exchange_api__"}) {
    if (!py::hasattr(tensor_type, attribute)) continue;
    py::object capsule = tensor_type.attr(attribute);
    if (!PyCapsule_CheckExact(capsule.ptr())) continue;
    void* pointer = PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr()));
    if (!pointer) throw py::error_already_set();
    for (auto* header = static_cast<abi::Header*>(pointer); header; header = header->prev) {
      auto* api = reinterpret_cast<const abi::Exchange*>(header);
      if (header->version.major == 1 && api->view_from_python && api->current_stream && api->managed_to_python)
        return api;
    }
  }
  throw py::import_error("this torch offers no DLPack C exchange API of version 1; pywm's kernels need torch >= 2.10");
}

PyObject* forever(py::object object) { return object.release().ptr(); }

std::array<Counter, 64> counters;

}  // namespace

void find_torch() {
  py::module_ module = py::module_::import("torch");
  py::object tensor = module.attr("Tensor"), internals = module.attr("_C");
  torch.api = find_exchange_api(tensor);
  torch.is_neg = forever(tensor.attr("is_neg"));
  torch.tensor = reinterpret_cast<PyTypeObject*>(forever(tensor));
  torch.parameter = reinterpret_cast<PyTypeObject*>(forever(module.attr("nn").attr("Parameter")));
  torch.is_grad_enabled = forever(module.attr("is_grad_enabled"));
  if (py::hasattr(internals, "_len_torch_dispatch_stack"))
    torch.num_dispatch_modes = forever(internals.attr("_len_torch_dispatch_stack"));
  torch.module = forever(module);
  torch.s_requires_grad = PyUnicode_InternFromString("requires_grad");
  torch.s_empty_like = PyUnicode_InternFromString("empty_like");
  torch.s_new_empty = PyUnicode_InternFromString("new_empty");
}

Counter& counter(const char* name) {
  for (Counter& c : counters) {
    if (!c.name) c.name = name;
    if (c.name == name || std::string(c.name) == name) return c;
  }
  throw std::logic_error("too many kernels to count");
}

py::dict calls() {
  py::dict result;
  for (const Counter& c : counters)
    if (c.name) result[c.name] = py::make_tuple(c.cpu.load(), c.cuda.load());
  return result;
}

void no_cuda_kernel(const char* name) {
  throw std::runtime_error(std::string(name) + ": no CUDA kernel; the reference should have served this call");
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

double Call::number(py::handle object, double low, double high) {
  double x = NAN;
  if (PyFloat_Check(object.ptr()))
    x = PyFloat_AS_DOUBLE(object.ptr());
  else if (PyLong_Check(object.ptr()) && !PyBool_Check(object.ptr()))
    x = PyLong_AsDouble(object.ptr());
  if (PyErr_Occurred()) PyErr_Clear();
  if (!(x >= low && x <= high)) refuse();
  return x;
}

py::object Call::like_first(void*& pointer) {
  if (!ok_) return py::none();
  if (on_cpu() && first_.ndim <= kMaxRank) return empty(first_.shape, first_.ndim, pointer);
  PyObject* args[] = {torch.module, object_.ptr()};
  PyObject* made = PyObject_VectorcallMethod(torch.s_empty_like, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  return adopt(made, first_.dtype, numel(), pointer);
}

py::object Call::empty(const int64_t* shape, int rank, void*& pointer) {
  return empty(first_.dtype, shape, rank, pointer);
}

py::object Call::bytes(const int64_t* shape, int rank, void*& pointer) {
  return empty(abi::DType{abi::kUInt, 8, 1}, shape, rank, pointer);
}

py::object Call::empty(abi::DType dtype, const int64_t* shape, int rank, void*& pointer) {
  if (!ok_) return py::none();
  if (on_cpu() && rank <= kMaxRank)
    if (abi::Managed* block = new_block(dtype, shape, rank, &pointer)) {
      void* made = nullptr;
      if (torch.api->managed_to_python(block, &made) != 0) {
        block->deleter(block);
        rethrow();
      }
      return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
    }
  int64_t n = 1;
  py::tuple sizes(rank);
  for (int i = 0; i < rank; ++i) {
    sizes[i] = py::int_(shape[i]);
    n *= shape[i];
  }
  if (dtype.code != first_.dtype.code)
    return adopt(object_.attr("new_empty")(sizes, "dtype"_a = py::handle(torch.module).attr("uint8")).release().ptr(),
                 dtype, n, pointer);
  PyObject* args[] = {object_.ptr(), sizes.ptr()};
  PyObject* made = PyObject_VectorcallMethod(torch.s_new_empty, args, 2 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  return adopt(made, dtype, n, pointer);
}

// What torch made, looked up each time so that whoever replaces the function (a test that poisons) is obeyed.
py::object Call::adopt(PyObject* made, abi::DType dtype, int64_t expected, void*& pointer) {
  if (!made) rethrow();
  py::object object = py::reinterpret_steal<py::object>(made);
  View v;
  if (!view_of(object, v) || abi::numel(v) != expected || !is_dtype(v, dtype) || !abi::is_contiguous(v) ||
      !abi::same_device(v, first_)) {
    refuse();
    return py::none();
  }
  pointer = data(v);
  return object;
}

}  // namespace pywm::bindings
