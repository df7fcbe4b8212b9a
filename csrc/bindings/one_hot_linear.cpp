// The linear layer of one-hot vectors. The weight sets dtype and device.

#include <vector>

#include "bindings.h"

namespace pywm::bindings {
namespace {

struct OneHotTensors {
  const uint8_t* index = nullptr;
  View view{};
  int64_t M = 1, groups = 0, columns = 0;

  bool read(Call& call, py::handle index_, int64_t columns_) {
    columns = columns_;
    index = call.bytes(index_, view);
    if (!call.ok() || view.ndim < 1) return false;
    groups = view.shape[view.ndim - 1];
    for (int i = 0; i < view.ndim - 1; ++i) M *= view.shape[i];
    return groups >= 1 && columns >= 1 && columns % groups == 0;
  }
};

py::object one_hot_linear(py::handle index, py::handle weight, py::handle bias, bool direct) {
  Call call("one_hot_linear", direct);
  const void* w = call.first(weight, 2);
  if (!call.ok()) return py::none();
  const int64_t U = call.size(0);
  OneHotTensors t;
  if (U < 1 || !t.read(call, index, call.size(1))) return py::none();
  View v;
  const void* b = bias.is_none() ? nullptr : call.floats(bias, {U}, v);
  py::object answer;
  if (call.declines(answer)) return answer;
  std::vector<int64_t> shape(t.view.shape, t.view.shape + t.view.ndim);
  shape.back() = U;
  void *y_data = nullptr, *packed_data = nullptr;
  py::object y = call.empty(shape.data(), t.view.ndim, y_data), packed;
  if (call.ok() && call.on_cpu() && t.M > 0)
    packed = call.empty({call.is_float() ? pywm::cpu::one_hot_linear_workspace<float>(U, t.columns)
                                         : pywm::cpu::one_hot_linear_workspace<double>(U, t.columns)},
                        packed_data);
  if (!call.ok()) return py::none();
  if (t.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::OneHotLinearArgs<S> a{in<S>(w), in<S>(b), t.index,  out<S>(y_data),      out<S>(packed_data),
                                        t.M,      U,        t.groups, t.columns / t.groups};
      named([&] {
        call.run([&] { pywm::cpu::one_hot_linear(a); }, [&](void* stream) { pywm::cuda::one_hot_linear(a, stream); });
      });
    });
  return y;
}

py::object one_hot_linear_backward(py::handle grad, py::handle index, int64_t columns, bool want_weight,
                                   bool want_bias) {
  Call call("one_hot_linear_backward", true);
  const void* g = call.first(grad, -1);
  OneHotTensors t;
  if (!call.ok() || call.first().ndim < 1 || !t.read(call, index, columns) || t.M == 0) return py::none();
  const int rank = call.first().ndim;
  const int64_t U = call.size(rank - 1);
  if (U < 1 || call.numel() != t.M * U) return py::none();
  void *weight_data, *bias_data, *packed_data = nullptr;
  py::object grad_weight = call.wanted(want_weight, {U, columns}, weight_data);
  py::object grad_bias = call.wanted(want_bias, {U}, bias_data), packed;
  if (call.ok() && call.on_cpu() && want_weight)
    packed = call.empty({call.is_float() ? pywm::cpu::one_hot_linear_workspace<float>(U, columns)
                                         : pywm::cpu::one_hot_linear_workspace<double>(U, columns)},
                        packed_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::OneHotLinearBackwardArgs<S> a{
        in<S>(g), t.index,  out<S>(weight_data), out<S>(bias_data), out<S>(packed_data), t.M,
        U,        t.groups, columns / t.groups};
    named([&] {
      call.run([&] { pywm::cpu::one_hot_linear_backward(a); },
               [&](void* stream) { pywm::cuda::one_hot_linear_backward(a, stream); });
    });
  });
  return py::make_tuple(grad_weight, grad_bias);
}

}  // namespace

void define_one_hot_linear(py::module_& m) {
  define_fast<&one_hot_linear>(m, "one_hot_linear",
                               "one_hot_linear(index: object, weight: object, bias: object, direct: bool) -> object");
  m.def("one_hot_linear_backward", &one_hot_linear_backward, "grad"_a, "index"_a, "columns"_a, "want_weight"_a,
        "want_bias"_a);
}

}  // namespace pywm::bindings
