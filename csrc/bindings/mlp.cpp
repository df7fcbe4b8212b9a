// Perceptrons: all layers in one call.

#include <vector>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// The weights and biases of a perceptron, each layer fitting the one before.
struct MlpTensors {
  std::vector<const void*> weights, biases;
  std::vector<int64_t> sizes;
  int64_t M = 1, L = 0, hidden = 0;  // hidden: the widths between input and output, added up

  bool read(Call& call, py::handle weights_, py::handle biases_) {
    const View& x = call.first();
    if (!call.ok() || x.ndim < 1 || x.device.type != abi::kCPU) return false;
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
const S* const* in_each(const std::vector<const void*>& pointers) {
  return reinterpret_cast<const S* const*>(pointers.data());
}
template <typename S>
S* const* out_each(const std::vector<void*>& pointers) {
  return reinterpret_cast<S* const*>(pointers.data());
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
  std::vector<int64_t> shape(v.shape, v.shape + v.ndim);
  shape.back() = t.sizes.back();
  // Without gradients the activations are scratch, in front of the packed weights.
  const int64_t hidden_size = t.M * t.hidden, slopes = keep ? slopes_size(t, f, f_out) : 0;
  const int64_t packed_size = call.is_float() ? pywm::cpu::mlp_workspace<float>(t.sizes.data(), t.L)
                                              : pywm::cpu::mlp_workspace<double>(t.sizes.data(), t.L);
  void *y_data = nullptr, *kept_data = nullptr;
  py::object y = call.empty(shape.data(), v.ndim, y_data), kept;
  if (keep) kept = call.empty({hidden_size + slopes}, kept_data);
  if (t.M > 0) {
    const Scratch scratch(call, packed_size + (keep ? 0 : hidden_size));
    if (!call.ok()) return py::none();
    by_dtype(call, [&]<typename S>() {
      S* packed = out<S>(scratch.data);
      S* hidden = keep ? out<S>(kept_data) : packed + packed_size;
      const pywm::MlpArgs<S> a{in<S>(xs),
                               in_each<S>(t.weights),
                               in_each<S>(t.biases),
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
  void* grad_x_data = nullptr;
  result.append(call.wanted(want_x, grad_x_data));
  std::vector<void*> grad_weights(t.L), grad_biases(t.L);
  if (want_parameters) {
    for (int64_t l = 0; l < t.L; ++l) result.append(call.empty({t.sizes[l + 1], t.sizes[l]}, grad_weights[l]));
    for (int64_t l = 0; l < t.L; ++l) result.append(call.empty({t.sizes[l + 1]}, grad_biases[l]));
  }
  const int64_t packed_size = call.is_float() ? pywm::cpu::mlp_backward_workspace<float>(t.sizes.data(), t.L)
                                              : pywm::cpu::mlp_backward_workspace<double>(t.sizes.data(), t.L);
  const Scratch scratch(call, packed_size + hidden_size + t.M * O);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    S* packed = out<S>(scratch.data);
    const S* hidden = in<S>(ks);
    const pywm::MlpBackwardArgs<S> a{in<S>(gs),
                                     in<S>(xs),
                                     in<S>(ys),
                                     hidden,
                                     hidden + hidden_size,
                                     in_each<S>(t.weights),
                                     t.sizes.data(),
                                     out<S>(grad_x_data),
                                     want_parameters ? out_each<S>(grad_weights) : nullptr,
                                     out_each<S>(grad_biases),
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

}  // namespace

void define_mlp(py::module_& m) {
  define_fast<&mlp>(
      m, "mlp",
      "mlp(x: object, weights: object, biases: object, activation: object, output_activation: object, keep: "
      "bool, direct: bool) -> object");
  m.def("mlp_backward", &mlp_backward, "grad"_a, "x"_a, "y"_a, "kept"_a, "weights"_a, "activation"_a,
        "output_activation"_a, "want_x"_a, "want_parameters"_a);
}

}  // namespace pywm::bindings
