// Perceptrons with norms: all layers in one call. x sets dtype and device, the CPU.

#include <stdexcept>
#include <vector>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// The arguments of a perceptron, each layer fitting the one before.
struct NormMlpTensors {
  std::vector<const void*> weights, biases, scales;
  std::vector<int64_t> sizes;
  const uint8_t* index = nullptr;
  pywm::NormMlpForm form{};
  int64_t hidden = 0;  // the widths of the layers with a norm, added up

  static bool is_list(py::handle list) { return PyList_Check(list.ptr()) || PyTuple_Check(list.ptr()); }
  static int64_t length(py::handle list) { return PySequence_Fast_GET_SIZE(list.ptr()); }
  static py::handle item(py::handle list, int64_t i) { return PySequence_Fast_GET_ITEM(list.ptr(), i); }

  // `biases_`: None where they are not looked at.
  bool read(Call& call, py::handle index_, py::handle weights_, py::handle biases_, py::handle scales_) {
    const View& x = call.first();
    if (!call.ok() || x.ndim < 1 || !call.on_cpu() || !is_list(weights_) || !is_list(scales_)) return false;
    const int64_t L = form.L = length(weights_);
    form.norms = length(scales_);
    const bool with_biases = !biases_.is_none();
    if (L < 1 || L > pywm::kMostNormMlpLayers || form.norms < L - 1 || form.norms > L ||
        (with_biases && (!is_list(biases_) || length(biases_) != L)))
      return false;
    form.M = 1;
    for (int i = 0; i < x.ndim - 1; ++i) form.M *= x.shape[i];
    const int64_t inputs = x.shape[x.ndim - 1];
    View v;
    if (!index_.is_none()) {
      index = call.bytes(index_, v);
      if (!call.ok() || v.ndim != x.ndim) return false;
      for (int i = 0; i < x.ndim - 1; ++i)
        if (v.shape[i] != x.shape[i]) return false;
      form.groups = v.shape[v.ndim - 1];
      if (form.groups < 1) return false;
    }
    for (int64_t l = 0; l < L; ++l) {
      weights.push_back(call.floats(item(weights_, l), {-1, l == 0 ? -1 : sizes[l]}, v));
      if (!call.ok() || v.shape[0] < 1) return false;
      if (l == 0) sizes.push_back(v.shape[1]);
      sizes.push_back(v.shape[0]);
      if (with_biases) biases.push_back(call.floats(item(biases_, l), {sizes[l + 1]}, v));
      if (l < form.norms) {
        scales.push_back(call.floats(item(scales_, l), {sizes[l + 1]}, v));
        hidden += sizes[l + 1];
      }
      if (!call.ok()) return false;
    }
    const int64_t rest = sizes[0] - inputs;
    if (inputs < 1 || rest < 0 || (form.groups == 0 ? rest != 0 : rest == 0 || rest % form.groups != 0)) return false;
    form.classes = form.groups == 0 ? 0 : rest / form.groups;
    if (form.classes > pywm::kMaxClasses) return false;
    form.sizes = sizes.data();
    return true;
  }
};

template <typename S>
const S* const* in_each(const std::vector<const void*>& pointers) {
  return reinterpret_cast<const S* const*>(pointers.data());
}
template <typename S>
S* const* out_each(const std::vector<void*>& pointers) {
  return reinterpret_cast<S* const*>(pointers.data());
}

// Returns y; with `keep`, y and what the backward pass needs. NotImplemented: all is well, but gradients are wanted.
py::object norm_mlp(py::handle x, py::handle index, py::handle weights, py::handle biases, py::handle scales,
                    py::handle eps, bool keep, bool direct) {
  Call call("norm_mlp", direct);
  const void* xs = call.first(x, -1);
  NormMlpTensors t;
  if (biases.is_none() || !t.read(call, index, weights, biases, scales)) return py::none();
  const double e = call.number(eps, 0, Call::kFinite);
  if (!call.ok() || e <= 0) return py::none();
  if (!direct && call.wants_gradients()) return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  const View& v = call.first();
  std::vector<int64_t> shape(v.shape, v.shape + v.ndim);
  shape.back() = t.sizes.back();
  void *y_data = nullptr, *kept_data = nullptr;
  py::object y = call.empty(shape.data(), v.ndim, y_data), kept;
  if (keep) kept = call.empty({t.form.M * t.hidden}, kept_data);
  if (!call.ok()) return py::none();
  if (t.form.M > 0)
    by_dtype(call, [&]<typename S>() {
      const int64_t members = pywm::cpu::norm_mlp_members(t.form);
      const Scratch scratch(call, pywm::cpu::norm_mlp_workspace<S>(t.form, members));
      const pywm::NormMlpArgs<S> a{t.form,
                                   in<S>(xs),
                                   t.index,
                                   in_each<S>(t.weights),
                                   in_each<S>(t.biases),
                                   in_each<S>(t.scales),
                                   out<S>(y_data),
                                   out<S>(kept_data),
                                   out<S>(scratch.data),
                                   members,
                                   S(e)};
      try {
        call.run([&] { pywm::cpu::norm_mlp(a); }, [&](void*) { no_cuda_kernel("norm_mlp"); });
      } catch (const std::out_of_range& error) {
        throw py::value_error(error.what());
      }
    });
  return keep ? py::object(py::make_tuple(y, kept)) : y;
}

// Returns a list: the gradient of x (an empty tensor if unwanted), then those of all weights, biases and scales if
// wanted.
py::object norm_mlp_backward(py::handle grad, py::handle x, py::handle index, py::handle kept, py::handle weights,
                             py::handle scales, py::handle eps, bool want_x, bool want_parameters) {
  Call call("norm_mlp_backward", true);
  const void* xs = call.first(x, -1);
  NormMlpTensors t;
  if (!t.read(call, index, weights, py::none(), scales) || t.form.M == 0) return py::none();
  const double e = call.number(eps, 0, Call::kFinite);
  View v;
  const void* gs = call.floats(grad, call.first(), call.first().ndim - 1, t.sizes.back());
  const void* ks = call.floats(kept, {t.form.M * t.hidden}, v);
  if (!call.ok()) return py::none();
  py::list result;
  void* grad_x_data = nullptr;
  result.append(call.wanted(want_x, grad_x_data));
  const int64_t L = t.form.L;
  std::vector<void*> grad_weights(L), grad_biases(L), grad_scales(t.form.norms);
  if (want_parameters) {
    for (int64_t l = 0; l < L; ++l) result.append(call.empty({t.sizes[l + 1], t.sizes[l]}, grad_weights[l]));
    for (int64_t l = 0; l < L; ++l) result.append(call.empty({t.sizes[l + 1]}, grad_biases[l]));
    for (int64_t l = 0; l < t.form.norms; ++l) result.append(call.empty({t.sizes[l + 1]}, grad_scales[l]));
  }
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const int64_t members = pywm::cpu::norm_mlp_members(t.form);
    const Scratch scratch(call, pywm::cpu::norm_mlp_backward_workspace<S>(t.form, members));
    const pywm::NormMlpBackwardArgs<S> a{t.form,
                                         in<S>(gs),
                                         in<S>(xs),
                                         t.index,
                                         in<S>(ks),
                                         in_each<S>(t.weights),
                                         in_each<S>(t.scales),
                                         out<S>(grad_x_data),
                                         want_parameters ? out_each<S>(grad_weights) : nullptr,
                                         out_each<S>(grad_biases),
                                         out_each<S>(grad_scales),
                                         out<S>(scratch.data),
                                         members,
                                         S(e)};
    call.run([&] { pywm::cpu::norm_mlp_backward(a); }, [&](void*) { no_cuda_kernel("norm_mlp_backward"); });
  });
  return result;
}

}  // namespace

void define_norm_mlp(py::module_& m) {
  define_fast<&norm_mlp>(
      m, "norm_mlp",
      "norm_mlp(x: object, index: object, weights: object, biases: object, scales: object, eps: object, keep: bool, "
      "direct: bool) -> object");
  m.def("norm_mlp_backward", &norm_mlp_backward, "grad"_a, "x"_a, "index"_a, "kept"_a, "weights"_a, "scales"_a, "eps"_a,
        "want_x"_a, "want_parameters"_a);
}

}  // namespace pywm::bindings
