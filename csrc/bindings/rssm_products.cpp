// What a scan made of products needs of row kernels: all of them write where they are told to, so that nothing is
// allocated between two products. See pywm/ops/rssm_products.py, which alone calls these; None says that an argument
// did not fit, True that all is done.

#include "bindings.h"

namespace pywm::bindings {
namespace {

bool read_norm(py::handle name, bool& layer) {
  if (!PyUnicode_Check(name.ptr())) return false;
  layer = PyUnicode_CompareWithASCIIString(name.ptr(), "layer") == 0;
  return layer || PyUnicode_CompareWithASCIIString(name.ptr(), "rms") == 0;
}

// Tensors of any shape; `count` is how many numbers they must hold, if it is not negative.
struct Operands {
  Call& call;

  const void* floats(py::handle object, int64_t count) {
    View v;
    const void* data = call.any_floats(object, v);
    return data && (count < 0 || abi::numel(v) == count) ? data : call.refuse();
  }
  const void* optional(py::handle object, int64_t count) { return object.is_none() ? nullptr : floats(object, count); }
  const uint8_t* bytes(py::handle object, int64_t count) {
    View v;
    const uint8_t* data = call.bytes(object, v);
    return data && abi::numel(v) == count ? data : call.refuse();
  }
  const bool* flags(py::handle object, int64_t N) {
    View v;
    return reinterpret_cast<const bool*>(call.mask_of(object, N, v));
  }
};

// What a norm of the rows of the first tensor [M, D] takes; scale, shift [turns, D].
struct NormOf {
  const void *scale = nullptr, *shift = nullptr;
  bool layer = false;
  pywm::Activation activation = pywm::Activation::kNone;
  double eps = 0;
  int64_t turns = 1;

  bool read(Operands& operands, py::handle scale_, py::handle shift_, py::handle norm, py::handle act,
            py::handle eps_) {
    Call& call = operands.call;
    eps = call.number(eps_, 0, Call::kFinite);
    View v;
    scale = call.any_floats(scale_, v);
    if (!call.ok() || !read_norm(norm, layer) || !activation_of(act, activation)) return false;
    const int64_t D = call.size(1), count = abi::numel(v);
    if (D == 0 || count == 0 || count % D != 0) return false;
    turns = count / D;
    shift = operands.optional(shift_, turns * D);
    return call.ok();
  }
};

// y = norm_act(x), x [M, D], scale, shift [turns, D].
py::object rows_norm_act(py::handle x, py::handle scale, py::handle shift, py::handle norm, py::handle act,
                         py::handle eps, py::handle y) {
  Call call("norm_act", true);
  Operands read{call};
  const void* x_data = call.first(x, 2);
  NormOf n;
  if (!n.read(read, scale, shift, norm, act, eps)) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  void* y_data = const_cast<void*>(read.floats(y, M * D));
  if (!call.ok() || M == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const NormActArgs<S> a{in<S>(x_data), in<S>(n.scale), in<S>(n.shift), out<S>(y_data), M, D,
                           S(n.eps),      n.activation,   n.layer,        n.turns};
    call.run([&] { cpu::norm_act(a); }, [&](void* stream) { cuda::norm_act(a, stream); });
  });
  return py::bool_(true);
}

// grad_x only.
py::object rows_norm_act_backward(py::handle grad, py::handle x, py::handle scale, py::handle shift, py::handle norm,
                                  py::handle act, py::handle eps, py::handle grad_x) {
  Call call("norm_act_backward", true);
  Operands read{call};
  const void* x_data = call.first(x, 2);
  NormOf n;
  if (!n.read(read, scale, shift, norm, act, eps)) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  const void* grad_data = read.floats(grad, M * D);
  void* out_data = const_cast<void*>(read.floats(grad_x, M * D));
  if (!call.ok() || M == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const NormActBackwardArgs<S> a{in<S>(grad_data),
                                   in<S>(x_data),
                                   in<S>(n.scale),
                                   in<S>(n.shift),
                                   out<S>(out_data),
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   M,
                                   D,
                                   S(n.eps),
                                   n.activation,
                                   n.layer,
                                   n.turns};
    call.run([&] { cpu::norm_act_backward(a); }, [&](void* stream) { cuda::norm_act_backward(a, stream); });
  });
  return py::bool_(true);
}

// deter [M, D] -> y; gates [M, 3D]. A block of a block-diagonal cell is a row.
py::object rows_block_gru_gates(py::handle gates, py::handle deter, py::handle y) {
  Call call("block_gru_gates", true);
  Operands read{call};
  const void* deter_data = call.first(deter, 2);
  if (!call.ok()) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  const void* gates_data = read.floats(gates, 3 * M * D);
  void* y_data = const_cast<void*>(read.floats(y, M * D));
  if (!call.ok() || M * D == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const BlockGruGatesArgs<S> a{in<S>(gates_data), in<S>(deter_data), out<S>(y_data), M, D};
    call.run([&] { cpu::block_gru_gates(a); }, [&](void* stream) { cuda::block_gru_gates(a, stream); });
  });
  return py::bool_(true);
}

py::object rows_block_gru_gates_backward(py::handle grad, py::handle gates, py::handle deter, py::handle grad_gates,
                                         py::handle grad_deter) {
  Call call("block_gru_gates_backward", true);
  Operands read{call};
  const void* deter_data = call.first(deter, 2);
  if (!call.ok()) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  const void *g = read.floats(grad, M * D), *gates_data = read.floats(gates, 3 * M * D);
  void *out_gates = const_cast<void*>(read.floats(grad_gates, 3 * M * D)),
       *out_deter = const_cast<void*>(read.floats(grad_deter, M * D));
  if (!call.ok() || M * D == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const BlockGruGatesBackwardArgs<S> a{
        in<S>(g), in<S>(gates_data), in<S>(deter_data), out<S>(out_gates), out<S>(out_deter), M, D};
    call.run([&] { cpu::block_gru_gates_backward(a); },
             [&](void* stream) { cuda::block_gru_gates_backward(a, stream); });
  });
  return py::bool_(true);
}

py::object rows_layernorm_gru_gates(py::handle pre, py::handle scale, py::handle shift, py::handle deter,
                                    py::handle eps_, py::handle y) {
  Call call("layernorm_gru_gates", true);
  Operands read{call};
  const void* deter_data = call.first(deter, 2);
  const double eps = call.number(eps_, 0, Call::kFinite);
  if (!call.ok()) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  const void *p = read.floats(pre, 3 * M * D), *s = read.floats(scale, 3 * D), *b = read.floats(shift, 3 * D);
  void* y_data = const_cast<void*>(read.floats(y, M * D));
  if (!call.ok() || M * D == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const LayernormGruGatesArgs<S> a{in<S>(p), in<S>(s), in<S>(b), in<S>(deter_data), out<S>(y_data), M, D, S(eps)};
    call.run([&] { cpu::layernorm_gru_gates(a); }, [&](void* stream) { cuda::layernorm_gru_gates(a, stream); });
  });
  return py::bool_(true);
}

// Not the gradients of scale and shift.
py::object rows_layernorm_gru_gates_backward(py::handle grad, py::handle pre, py::handle scale, py::handle shift,
                                             py::handle deter, py::handle eps_, py::handle grad_pre,
                                             py::handle grad_deter) {
  Call call("layernorm_gru_gates_backward", true);
  Operands read{call};
  const void* deter_data = call.first(deter, 2);
  const double eps = call.number(eps_, 0, Call::kFinite);
  if (!call.ok()) return py::none();
  const int64_t M = call.size(0), D = call.size(1);
  const void *g = read.floats(grad, M * D), *p = read.floats(pre, 3 * M * D), *s = read.floats(scale, 3 * D),
             *b = read.floats(shift, 3 * D);
  void *out_pre = const_cast<void*>(read.floats(grad_pre, 3 * M * D)),
       *out_deter = const_cast<void*>(read.floats(grad_deter, M * D));
  if (!call.ok() || M * D == 0) return py::none();
  by_dtype(call, [&]<typename S>() {
    const LayernormGruGatesBackwardArgs<S> a{
        in<S>(g), in<S>(p), in<S>(s), in<S>(b), in<S>(deter_data), out<S>(out_pre), nullptr, nullptr, out<S>(out_deter),
        nullptr,  M,        D,        S(eps)};
    call.run([&] { cpu::layernorm_gru_gates_backward(a); },
             [&](void* stream) { cuda::layernorm_gru_gates_backward(a, stream); });
  });
  return py::bool_(true);
}

// logits [M, K], uniform, index [M].
py::object rows_categorical_sample(py::handle logits, py::handle uniform, py::handle unimix_, py::handle stoch,
                                   py::handle index) {
  Call call("categorical_sample", true);
  Operands read{call};
  const void* l = call.first(logits, 2);
  const double unimix = call.number(unimix_, 0, 1);
  if (!call.ok()) return py::none();
  const int64_t M = call.size(0), K = call.size(1);
  const void* u = read.floats(uniform, M);
  void* s = const_cast<void*>(read.floats(stoch, M * K));
  uint8_t* i = const_cast<uint8_t*>(read.bytes(index, M));
  if (!call.ok() || M * K == 0 || K > kMaxClasses) return py::none();
  by_dtype(call, [&]<typename S>() {
    const CategoricalSampleArgs<S> a{in<S>(l), in<S>(u), out<S>(s), i, M, K, unimix};
    call.run([&] { cpu::categorical_sample(a); }, [&](void* stream) { cuda::categorical_sample(a, stream); });
  });
  return py::bool_(true);
}

// See RssmEnterArgs. deter, h [N, D]; add [N, H] or [H]; stoch_proj [N, H], or packed [groups·classes, H] with index
// [N, groups]; u [N, H], whose rows may lie apart.
py::object rssm_enter(py::handle deter, py::handle add, py::handle stoch_proj, py::handle packed, py::handle index,
                      py::handle is_first, py::handle h, py::handle u) {
  Call call("rssm_enter", true);
  Operands read{call};
  const void* deter_data = call.first(deter, 2);
  if (!call.ok()) return py::none();
  const int64_t N = call.size(0), D = call.size(1);
  int64_t u_stride = 0, H = 0;
  void* u_data = const_cast<void*>(call.float_rows(u, N, H, u_stride));
  if (!u_data || N == 0 || H == 0) return py::none();
  View v;
  const void* add_data = call.any_floats(add, v);
  if (!add_data || (abi::numel(v) != H && abi::numel(v) != N * H)) return py::none();
  const int64_t add_stride = v.ndim == 1 ? 0 : H;
  if (abi::numel(v) != (add_stride ? N * H : H)) return py::none();
  const void *proj = read.optional(stoch_proj, N * H), *packed_data = nullptr;
  const uint8_t* index_data = nullptr;
  int64_t groups = 0, classes = 0;
  if (!proj) {
    View of_packed, of_index;
    packed_data = call.any_floats(packed, of_packed);
    index_data = call.bytes(index, of_index);
    if (!call.ok() || of_index.ndim != 2 || of_index.shape[0] != N || of_packed.ndim != 2 || of_packed.shape[1] != H)
      return py::none();
    groups = of_index.shape[1];
    if (groups == 0 || of_packed.shape[0] % groups != 0 || of_packed.shape[0] == 0) return py::none();
    classes = of_packed.shape[0] / groups;
    if (call.on_cpu())
      for (int64_t i = 0; i < N * groups; ++i)
        if (index_data[i] >= classes) return py::none();
  }
  const bool* first = read.flags(is_first, N);
  void* h_data = const_cast<void*>(read.floats(h, N * D));
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const RssmEnterArgs<S> a{in<S>(deter_data),
                             in<S>(add_data),
                             in<S>(proj),
                             in<S>(packed_data),
                             index_data,
                             first,
                             out<S>(h_data),
                             out<S>(u_data),
                             N,
                             D,
                             H,
                             groups,
                             classes,
                             add_stride,
                             u_stride};
    call.run([&] { cpu::rssm_enter(a); }, [&](void* stream) { cuda::rssm_enter(a, stream); });
  });
  return py::bool_(true);
}

// See RssmLeaveArgs. logits [N, groups, classes].
py::object rssm_leave(py::handle logits, py::handle outer_logits, py::handle outer_stoch, py::handle outer_deter,
                      py::handle carry_stoch, py::handle carry_deter, py::handle is_first_behind, py::handle unimix_,
                      py::handle grad_logits, py::handle grad_h) {
  Call call("rssm_leave", true);
  Operands read{call};
  const void* l = call.first(logits, 3);
  const double unimix = call.number(unimix_, 0, 1);
  if (!call.ok()) return py::none();
  const int64_t N = call.size(0), groups = call.size(1), classes = call.size(2), Z = N * groups * classes;
  View v;
  void* h = const_cast<void*>(call.any_floats(grad_h, v));
  if (!h || v.ndim != 2 || v.shape[0] != N || Z == 0 || classes > kMaxClasses) return py::none();
  const int64_t D = v.shape[1];
  const void *ol = read.optional(outer_logits, Z), *os = read.optional(outer_stoch, Z),
             *od = read.optional(outer_deter, N * D), *cs = read.optional(carry_stoch, Z),
             *cd = read.optional(carry_deter, N * D);
  const bool* first = is_first_behind.is_none() ? nullptr : read.flags(is_first_behind, N);
  void* g = const_cast<void*>(read.floats(grad_logits, Z));
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const RssmLeaveArgs<S> a{in<S>(l),  in<S>(ol), in<S>(os), in<S>(od), in<S>(cs), in<S>(cd), first,
                             out<S>(g), out<S>(h), N,         D,         groups,    classes,   unimix};
    call.run([&] { cpu::rssm_leave(a); }, [&](void* stream) { cuda::rssm_leave(a, stream); });
  });
  return py::bool_(true);
}

}  // namespace

void define_rssm_products(py::module_& m) {
  m.def("rows_norm_act", &rows_norm_act, "x"_a, "scale"_a, "shift"_a, "norm"_a, "act"_a, "eps"_a, "y"_a);
  m.def("rows_norm_act_backward", &rows_norm_act_backward, "grad"_a, "x"_a, "scale"_a, "shift"_a, "norm"_a, "act"_a,
        "eps"_a, "grad_x"_a);
  m.def("rows_block_gru_gates", &rows_block_gru_gates, "gates"_a, "deter"_a, "y"_a);
  m.def("rows_block_gru_gates_backward", &rows_block_gru_gates_backward, "grad"_a, "gates"_a, "deter"_a, "grad_gates"_a,
        "grad_deter"_a);
  m.def("rows_layernorm_gru_gates", &rows_layernorm_gru_gates, "pre"_a, "scale"_a, "shift"_a, "deter"_a, "eps"_a,
        "y"_a);
  m.def("rows_layernorm_gru_gates_backward", &rows_layernorm_gru_gates_backward, "grad"_a, "pre"_a, "scale"_a,
        "shift"_a, "deter"_a, "eps"_a, "grad_pre"_a, "grad_deter"_a);
  m.def("rows_categorical_sample", &rows_categorical_sample, "logits"_a, "uniform"_a, "unimix"_a, "stoch"_a, "index"_a);
  m.def("rssm_enter", &rssm_enter, "deter"_a, "add"_a, "stoch_proj"_a, "packed"_a, "index"_a, "is_first"_a, "h"_a,
        "u"_a);
  m.def("rssm_leave", &rssm_leave, "logits"_a, "outer_logits"_a, "outer_stoch"_a, "outer_deter"_a, "carry_stoch"_a,
        "carry_deter"_a, "is_first_behind"_a, "unimix"_a, "grad_logits"_a, "grad_h"_a);
}

}  // namespace pywm::bindings
