// Gates of recurrent cells. In every call the state sets dtype, device, and the shape of the result.

#include "bindings.h"

namespace pywm::bindings {
namespace {

// The rows of the state, and the tensors beside it, which are some multiple of its width.
struct Rows {
  Call& call;
  const void* deter;
  int64_t M = 1, D = 0;

  Rows(Call& call, py::handle deter_) : call(call), deter(call.first(deter_, -1)) {
    constexpr int64_t kMaxWidth = int64_t{1} << 60;  // three times as much is still a number
    if (!call.ok()) return;
    if (call.first().ndim < 1 || width() < 1 || width() > kMaxWidth) {
      call.refuse();
      return;
    }
    D = width();
    for (int i = 0; i < call.first().ndim - 1; ++i) M *= call.size(i);
  }
  int64_t width() const { return call.size(call.first().ndim - 1); }
  const void* times(int64_t factor, py::handle object) const {
    return call.ok() ? call.floats(object, call.first(), call.first().ndim - 1, factor * D) : nullptr;
  }
  // The gradient of such a tensor.
  py::object wanted(int64_t factor, bool yes, void*& pointer) const {
    pointer = nullptr;
    if (!call.ok()) return py::none();
    if (!yes) return call.wanted(false, pointer);
    int64_t shape[kMaxDims];
    const int rank = call.first().ndim;
    if (rank > kMaxDims) return call.refuse(), py::none();
    for (int i = 0; i < rank; ++i) shape[i] = call.size(i);
    shape[rank - 1] *= factor;
    return call.empty(shape, rank, pointer);
  }

  static constexpr int kMaxDims = 64;  // torch's own limit
};

// ---- Dreamer's ------------------------------------------------------------------------------------------------------

// How many rows a row is cut into, or 0.
int64_t block_count(const Rows& rows, py::handle blocks) {
  if (!PyLong_Check(blocks.ptr()) || PyBool_Check(blocks.ptr())) return 0;
  int overflow = 0;
  const long long count = PyLong_AsLongLongAndOverflow(blocks.ptr(), &overflow);
  return overflow || count < 1 || rows.D % count ? 0 : count;
}

py::object block_gru_gates(py::handle gates, py::handle deter, py::handle blocks, bool direct) {
  Call call("block_gru_gates", direct);
  Rows rows(call, deter);
  const void* g = rows.times(3, gates);
  if (!call.ok()) return py::none();
  const int64_t K = block_count(rows, blocks);
  if (K == 0) return py::none();
  py::object answer;
  if (call.declines(answer)) return answer;
  void* data = nullptr;
  py::object y = call.like_first(data);
  if (!call.ok()) return py::none();
  if (rows.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::BlockGruGatesArgs<S> a{in<S>(g), in<S>(rows.deter), out<S>(data), rows.M * K, rows.D / K};
      call.run([&] { pywm::cpu::block_gru_gates(a); }, [&](void* stream) { pywm::cuda::block_gru_gates(a, stream); });
    });
  return y;
}

py::object block_gru_gates_backward(py::handle grad, py::handle gates, py::handle deter, py::handle blocks,
                                    bool want_gates, bool want_deter) {
  Call call("block_gru_gates_backward", true);
  Rows rows(call, deter);
  const void *gr = rows.times(1, grad), *g = rows.times(3, gates);
  if (!call.ok() || rows.M == 0) return py::none();
  const int64_t K = block_count(rows, blocks);
  if (K == 0) return py::none();
  void *gates_data, *deter_data;
  py::object grad_gates = rows.wanted(3, want_gates, gates_data), grad_deter = rows.wanted(1, want_deter, deter_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::BlockGruGatesBackwardArgs<S> a{in<S>(gr),          in<S>(g),   in<S>(rows.deter), out<S>(gates_data),
                                               out<S>(deter_data), rows.M * K, rows.D / K};
    call.run([&] { pywm::cpu::block_gru_gates_backward(a); },
             [&](void* stream) { pywm::cuda::block_gru_gates_backward(a, stream); });
  });
  return py::make_tuple(grad_gates, grad_deter);
}

py::object layernorm_gru_gates(py::handle pre, py::handle scale, py::handle shift, py::handle deter, py::handle eps,
                               bool direct) {
  Call call("layernorm_gru_gates", direct);
  Rows rows(call, deter);
  const void* p = rows.times(3, pre);
  if (!call.ok()) return py::none();
  View v;
  const void *sc = call.floats(scale, {3 * rows.D}, v), *sh = call.floats(shift, {3 * rows.D}, v);
  const double epsilon = call.number(eps, 0, Call::kFinite);
  if (epsilon == 0) call.refuse();
  py::object answer;
  if (call.declines(answer)) return answer;
  void* data = nullptr;
  py::object y = call.like_first(data);
  if (!call.ok()) return py::none();
  if (rows.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::LayernormGruGatesArgs<S> a{in<S>(p),     in<S>(sc), in<S>(sh), in<S>(rows.deter),
                                             out<S>(data), rows.M,    rows.D,    S(epsilon)};
      call.run([&] { pywm::cpu::layernorm_gru_gates(a); },
               [&](void* stream) { pywm::cuda::layernorm_gru_gates(a, stream); });
    });
  return y;
}

py::object layernorm_gru_gates_backward(py::handle grad, py::handle pre, py::handle scale, py::handle shift,
                                        py::handle deter, double eps, bool want_pre, bool want_scale, bool want_shift,
                                        bool want_deter) {
  Call call("layernorm_gru_gates_backward", true);
  Rows rows(call, deter);
  const void *g = rows.times(1, grad), *p = rows.times(3, pre);
  if (!call.ok() || rows.M == 0) return py::none();
  View v;
  const int64_t W = 3 * rows.D;
  const void *sc = call.floats(scale, {W}, v), *sh = call.floats(shift, {W}, v);
  if (!call.ok()) return py::none();
  void *pre_data, *scale_data, *shift_data, *deter_data, *partial_data = nullptr;
  py::object grad_pre = rows.wanted(3, want_pre, pre_data);
  py::object grad_scale = call.wanted(want_scale, {W}, scale_data);
  py::object grad_shift = call.wanted(want_shift, {W}, shift_data);
  py::object grad_deter = rows.wanted(1, want_deter, deter_data), partial;
  if (want_scale || want_shift) partial = call.empty({norm_workspace(call, rows.M, W)}, partial_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::LayernormGruGatesBackwardArgs<S> a{in<S>(g),
                                                   in<S>(p),
                                                   in<S>(sc),
                                                   in<S>(sh),
                                                   in<S>(rows.deter),
                                                   out<S>(pre_data),
                                                   out<S>(scale_data),
                                                   out<S>(shift_data),
                                                   out<S>(deter_data),
                                                   out<S>(partial_data),
                                                   rows.M,
                                                   rows.D,
                                                   S(eps)};
    call.run([&] { pywm::cpu::layernorm_gru_gates_backward(a); },
             [&](void* stream) { pywm::cuda::layernorm_gru_gates_backward(a, stream); });
  });
  return py::make_tuple(grad_pre, grad_scale, grad_shift, grad_deter);
}

// ---- Keras' reset_after ---------------------------------------------------------------------------------------------

py::object gru_gates(py::handle input, py::handle hidden, py::handle deter, bool direct) {
  Call call("gru_gates", direct);
  Rows rows(call, deter);
  const void *x = rows.times(3, input), *h = rows.times(3, hidden);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* data = nullptr;
  py::object y = call.like_first(data);
  if (!call.ok()) return py::none();
  if (rows.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GruGatesArgs<S> a{in<S>(x), in<S>(h), in<S>(rows.deter), out<S>(data), rows.M, rows.D};
      call.run([&] { pywm::cpu::gru_gates(a); }, [&](void* stream) { pywm::cuda::gru_gates(a, stream); });
    });
  return y;
}

py::object gru_gates_backward(py::handle grad, py::handle input, py::handle hidden, py::handle deter, bool want_input,
                              bool want_hidden, bool want_deter) {
  Call call("gru_gates_backward", true);
  Rows rows(call, deter);
  const void *g = rows.times(1, grad), *x = rows.times(3, input), *h = rows.times(3, hidden);
  if (!call.ok() || rows.M == 0) return py::none();
  void *input_data, *hidden_data, *deter_data;
  py::object grad_input = rows.wanted(3, want_input, input_data),
             grad_hidden = rows.wanted(3, want_hidden, hidden_data),
             grad_deter = rows.wanted(1, want_deter, deter_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::GruGatesBackwardArgs<S> a{
        in<S>(g),           in<S>(x), in<S>(h), in<S>(rows.deter), out<S>(input_data), out<S>(hidden_data),
        out<S>(deter_data), rows.M,   rows.D};
    call.run([&] { pywm::cpu::gru_gates_backward(a); },
             [&](void* stream) { pywm::cuda::gru_gates_backward(a, stream); });
  });
  return py::make_tuple(grad_input, grad_hidden, grad_deter);
}

// ---- PlaNet's -------------------------------------------------------------------------------------------------------

py::object gru_block_reset(py::handle gates, py::handle deter, bool direct) {
  Call call("gru_block_reset", direct);
  Rows rows(call, deter);
  const void* g = rows.times(2, gates);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* data = nullptr;
  py::object y = call.like_first(data);
  if (!call.ok()) return py::none();
  if (rows.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GruBlockResetArgs<S> a{in<S>(g), in<S>(rows.deter), out<S>(data), rows.M, rows.D};
      call.run([&] { pywm::cpu::gru_block_reset(a); }, [&](void* stream) { pywm::cuda::gru_block_reset(a, stream); });
    });
  return y;
}

py::object gru_block_reset_backward(py::handle grad, py::handle gates, py::handle deter, bool want_gates,
                                    bool want_deter) {
  Call call("gru_block_reset_backward", true);
  Rows rows(call, deter);
  const void *gr = rows.times(1, grad), *g = rows.times(2, gates);
  if (!call.ok() || rows.M == 0) return py::none();
  void *gates_data, *deter_data;
  py::object grad_gates = rows.wanted(2, want_gates, gates_data), grad_deter = rows.wanted(1, want_deter, deter_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::GruBlockResetBackwardArgs<S> a{
        in<S>(gr), in<S>(g), in<S>(rows.deter), out<S>(gates_data), out<S>(deter_data), rows.M, rows.D};
    call.run([&] { pywm::cpu::gru_block_reset_backward(a); },
             [&](void* stream) { pywm::cuda::gru_block_reset_backward(a, stream); });
  });
  return py::make_tuple(grad_gates, grad_deter);
}

py::object gru_block_update(py::handle gates, py::handle candidate, py::handle deter, bool direct) {
  Call call("gru_block_update", direct);
  Rows rows(call, deter);
  const void *g = rows.times(2, gates), *c = rows.times(1, candidate);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* data = nullptr;
  py::object y = call.like_first(data);
  if (!call.ok()) return py::none();
  if (rows.M > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GruBlockUpdateArgs<S> a{in<S>(g), in<S>(c), in<S>(rows.deter), out<S>(data), rows.M, rows.D};
      call.run([&] { pywm::cpu::gru_block_update(a); }, [&](void* stream) { pywm::cuda::gru_block_update(a, stream); });
    });
  return y;
}

py::object gru_block_update_backward(py::handle grad, py::handle gates, py::handle candidate, py::handle deter,
                                     bool want_gates, bool want_candidate, bool want_deter) {
  Call call("gru_block_update_backward", true);
  Rows rows(call, deter);
  const void *gr = rows.times(1, grad), *g = rows.times(2, gates), *c = rows.times(1, candidate);
  if (!call.ok() || rows.M == 0) return py::none();
  void *gates_data, *candidate_data, *deter_data;
  py::object grad_gates = rows.wanted(2, want_gates, gates_data),
             grad_candidate = rows.wanted(1, want_candidate, candidate_data),
             grad_deter = rows.wanted(1, want_deter, deter_data);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::GruBlockUpdateBackwardArgs<S> a{
        in<S>(gr),          in<S>(g), in<S>(c), in<S>(rows.deter), out<S>(gates_data), out<S>(candidate_data),
        out<S>(deter_data), rows.M,   rows.D};
    call.run([&] { pywm::cpu::gru_block_update_backward(a); },
             [&](void* stream) { pywm::cuda::gru_block_update_backward(a, stream); });
  });
  return py::make_tuple(grad_gates, grad_candidate, grad_deter);
}

}  // namespace

void define_gru_gates(py::module_& m) {
  define_fast<&block_gru_gates>(
      m, "block_gru_gates", "block_gru_gates(gates: object, deter: object, blocks: object, direct: bool) -> object");
  m.def("block_gru_gates_backward", &block_gru_gates_backward, "grad"_a, "gates"_a, "deter"_a, "blocks"_a,
        "want_gates"_a, "want_deter"_a);
  define_fast<&layernorm_gru_gates>(
      m, "layernorm_gru_gates",
      "layernorm_gru_gates(pre: object, scale: object, shift: object, deter: object, eps: object, direct: bool) -> "
      "object");
  m.def("layernorm_gru_gates_backward", &layernorm_gru_gates_backward, "grad"_a, "pre"_a, "scale"_a, "shift"_a,
        "deter"_a, "eps"_a, "want_pre"_a, "want_scale"_a, "want_shift"_a, "want_deter"_a);
  define_fast<&gru_gates>(m, "gru_gates",
                          "gru_gates(input: object, hidden: object, deter: object, direct: bool) -> object");
  m.def("gru_gates_backward", &gru_gates_backward, "grad"_a, "input"_a, "hidden"_a, "deter"_a, "want_input"_a,
        "want_hidden"_a, "want_deter"_a);
  define_fast<&gru_block_reset>(m, "gru_block_reset",
                                "gru_block_reset(gates: object, deter: object, direct: bool) -> object");
  m.def("gru_block_reset_backward", &gru_block_reset_backward, "grad"_a, "gates"_a, "deter"_a, "want_gates"_a,
        "want_deter"_a);
  define_fast<&gru_block_update>(
      m, "gru_block_update",
      "gru_block_update(gates: object, candidate: object, deter: object, direct: bool) -> object");
  m.def("gru_block_update_backward", &gru_block_update_backward, "grad"_a, "gates"_a, "candidate"_a, "deter"_a,
        "want_gates"_a, "want_candidate"_a, "want_deter"_a);
}

}  // namespace pywm::bindings
