// Recurrent state-space models: whole windows in one call.

#include <array>
#include <vector>

#include "../cpu/parallel.h"
#include "bindings.h"

namespace pywm::bindings {
namespace {

// cell, norm, activation, D, H, groups, classes, blocks, unimix, eps, cell_eps, min_std, sigmoid_std, bfloat16
bool read_form(py::handle object, RssmForm& f) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 14) return false;
  const auto integer = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(object.ptr(), i)); };
  const auto real = [&](int i) { return PyFloat_AsDouble(PyTuple_GET_ITEM(object.ptr(), i)); };
  f = {static_cast<RssmCell>(integer(0)),
       static_cast<Norm>(integer(1)),
       static_cast<Activation>(integer(2)),
       integer(3),
       integer(4),
       integer(5),
       integer(6),
       integer(7),
       real(8),
       real(9),
       real(10),
       real(11),
       integer(12) != 0,
       integer(13) != 0};
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return false;
  }
  return f.D > 0 && f.H > 0 && f.groups > 0 && f.classes >= 0 && f.classes <= 256 && f.blocks > 0 &&
         f.D % f.blocks == 0;
}

constexpr int kLayers = 7, kParts = 4;

// Seven layers of four tensors or None each: weight, bias, scale, shift; see RssmWeights.
struct WeightTensors {
  std::array<std::array<const void*, kParts>, kLayers> pointers{};
  std::array<int64_t, kLayers> ld{};

  bool read(Call& call, py::handle list, const RssmForm& f) {
    if (!PyTuple_Check(list.ptr()) || PyTuple_GET_SIZE(list.ptr()) != kLayers * kParts) return false;
    for (int layer = 0; layer < kLayers; ++layer)
      for (int part = 0; part < kParts; ++part) {
        py::handle tensor = PyTuple_GET_ITEM(list.ptr(), layer * kParts + part);
        if (tensor.is_none()) continue;
        View v;
        const bool blocks = layer == 2 || (layer == 3 && f.cell == RssmCell::kBlockGru);
        pointers[layer][part] = part > 0 ? call.floats(tensor, {-1}, v)
                                : blocks ? call.floats(tensor, {f.blocks, -1, -1}, v)
                                         : call.floats(tensor, {-1, -1}, v);
        if (!call.ok()) return false;
        const int64_t width = v.shape[v.ndim - 1], rows = part > 0 ? width : v.shape[v.ndim - 2];
        if (rows < least_rows(f, layer, part) || (part == 0 && width < least_width(f, layer))) return false;
        if (part == 0) ld[layer] = width;
      }
    return pointers[1][0] && pointers[3][0] && pointers[5][0] && pointers[6][0];
  }

  // What the kernels will read of a layer, so that a wrong tensor is refused here and not read past its end.
  static int64_t least_rows(const RssmForm& f, int layer, int part) {
    const int64_t Dg = f.D / f.blocks;
    const bool block = f.cell == RssmCell::kBlockGru, planet = f.cell == RssmCell::kGruBlock;
    switch (layer) {
      case 2:
        return part == 0 ? Dg : f.D;
      case 3:
        return block ? (part == 0 ? 3 * Dg : 3 * f.D) : (planet ? 2 : 3) * f.D;
      case 4:
        return (planet ? 1 : 3) * f.D;
      case 6:
        return f.stats();
      default:
        return f.H;
    }
  }
  static int64_t least_width(const RssmForm& f, int layer) {
    const int64_t Dg = f.D / f.blocks;
    const bool block = f.cell == RssmCell::kBlockGru, gru = f.cell == RssmCell::kGru;
    switch (layer) {
      case 1:
        return f.stoch();
      case 2:
        return Dg + 2 * f.H;
      case 3:
        return block ? Dg : (gru ? f.H : f.H + f.D);
      case 4:
        return gru ? f.D : f.H + f.D;
      case 6:
        return f.H;
      default:
        return f.D;
    }
  }

  template <typename S>
  RssmWeights<S> weights() const {
    const auto layer = [&](int i) {
      return RssmLayer<S>{in<S>(pointers[i][0]), ld[i], in<S>(pointers[i][1]), in<S>(pointers[i][2]),
                          in<S>(pointers[i][3])};
    };
    return {layer(0), layer(1), layer(2), layer(3), layer(4), layer(5), layer(6)};
  }
};

// Whether the form's layers all came: bindings are private, but a null pointer must not reach a kernel.
bool complete(const RssmForm& f, const WeightTensors& w) {
  const auto has = [&](int layer, bool norm) {
    const auto& p = w.pointers[layer];
    return p[0] && (!norm || f.norm == Norm::kNone || p[2]) && (!norm || f.norm != Norm::kLayer || p[3]);
  };
  if (!has(1, true) || !has(5, true) || !has(6, false) || !has(3, false)) return false;
  switch (f.cell) {
    case RssmCell::kBlockGru:
      return has(0, true) && has(2, true) && w.pointers[3][1];
    case RssmCell::kLayerNormGru:
      return w.pointers[3][2] && w.pointers[3][3];
    case RssmCell::kGru:
    case RssmCell::kGruBlock:
      return has(4, false);
  }
  return false;
}

struct Planes {
  int64_t u, cell1, cell2, action;
  explicit Planes(const RssmForm& f) {
    const bool block = f.cell == RssmCell::kBlockGru;
    u = block ? 2 * f.H : f.H;
    cell1 = block ? f.D : (f.cell == RssmCell::kGruBlock ? 2 * f.D : 3 * f.D);
    cell2 = f.cell == RssmCell::kLayerNormGru ? 0 : (f.cell == RssmCell::kGruBlock ? f.D : 3 * f.D);
    action = block ? f.D : f.H;
  }
};

// Returns deter, stats, stoch, and with `keep` u, cell1, cell2, o. `index` [T, N, groups] is written in place (None for
// Gaussian latents), `force` forces the samples: indices, or floats.
py::object rssm_observe(py::handle form, py::handle weights, py::handle token_proj, py::handle action_proj,
                        py::handle action_class, py::handle deter0, py::handle stoch_proj, py::handle noise,
                        py::handle is_first, py::handle force, py::handle index, bool keep) {
  Call call("rssm_observe", true);
  RssmForm f;
  WeightTensors w;
  const void* tokens = call.first(token_proj, 3);
  if (!call.ok() || !call.on_cpu() || !read_form(form, f) || !w.read(call, weights, f) || !complete(f, w))
    return py::none();
  const Planes width(f);
  const int64_t T = call.size(0), N = call.size(1);
  View v;
  if (call.size(2) != f.H) return py::none();
  const void* actions = nullptr;
  const uint8_t* classes = nullptr;
  if (action_class.is_none()) {
    actions = call.floats(action_proj, {T, N, width.action}, v);
  } else {  // a row for each class
    View table;
    actions = call.floats(action_proj, {-1, width.action}, table);
    classes = call.bytes(action_class, call.first(), 1, N);
    if (!call.ok() || f.cell != RssmCell::kBlockGru) return py::none();
    for (int64_t i = 0; i < T * N; ++i)
      if (classes[i] >= table.shape[0]) return py::none();
  }
  const void* deter_start = call.floats(deter0, {N, f.D}, v);
  const void* stoch_start = call.floats(stoch_proj, {N, f.H}, v);
  const void* noise_data = noise.is_none() ? nullptr : call.floats(noise, {T, N, f.groups}, v);
  const uint8_t* first = call.mask(is_first, call.first(), 2);
  const uint8_t* force_index = nullptr;
  const void* force_stoch = nullptr;
  uint8_t* index_data = nullptr;
  if (f.gaussian()) {
    if (!force.is_none()) force_stoch = call.floats(force, {T, N, f.groups}, v);
  } else {
    if (!force.is_none()) force_index = call.bytes(force, call.first(), 2, f.groups);
    index_data = const_cast<uint8_t*>(call.bytes(index, call.first(), 2, f.groups));
  }
  if (!call.ok() || T == 0 || N == 0 || (!noise_data && !force_index && !force_stoch)) return py::none();
  if (force_index)
    for (int64_t i = 0; i < T * N * f.groups; ++i)
      if (force_index[i] >= f.classes) return py::none();
  void *deter_data, *stats_data, *stoch_data, *u = nullptr, *cell1 = nullptr, *cell2 = nullptr, *o = nullptr;
  py::object deter = call.empty({T, N, f.D}, deter_data), stats = call.empty({T, N, f.stats()}, stats_data);
  py::object stoch = call.empty({T, N, f.stoch()}, stoch_data), kept_u, kept1, kept2, kept_o;
  if (keep) {
    kept_u = call.empty({T, N, width.u}, u);
    kept1 = call.empty({T, N, width.cell1}, cell1);
    kept2 = call.empty({T, N, width.cell2}, cell2);
    kept_o = call.empty({T, N, f.H}, o);
  }
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const Scratch scratch(call, pywm::cpu::rssm_observe_workspace<S>(f, N, keep));
    const RssmObserveArgs<S> a{f,
                               w.weights<S>(),
                               in<S>(tokens),
                               in<S>(actions),
                               in<S>(deter_start),
                               in<S>(stoch_start),
                               in<S>(noise_data),
                               first,
                               force_index,
                               classes,
                               in<S>(force_stoch),
                               out<S>(deter_data),
                               out<S>(stats_data),
                               out<S>(stoch_data),
                               index_data,
                               out<S>(u),
                               out<S>(cell1),
                               out<S>(cell2),
                               out<S>(o),
                               out<S>(scratch.data),
                               T,
                               N};
    call.run([&] { pywm::cpu::rssm_observe(a); }, [&](void*) { no_cuda_kernel("rssm_observe"); });
  });
  if (!keep) return py::make_tuple(deter, stats, stoch);
  return py::make_tuple(deter, stats, stoch, kept_u, kept1, kept2, kept_o);
}

// Of the scales and shifts of the cell and of so many hidden layers of a head.
int64_t norm_widths(const RssmForm& f, int64_t heads) {
  const int64_t each = f.norm == Norm::kNone ? 0 : (f.norm == Norm::kLayer ? 2 : 1);
  const int64_t cell =
      f.cell == RssmCell::kBlockGru ? each * (f.H + f.D) : (f.cell == RssmCell::kLayerNormGru ? 6 * f.D : 0);
  return cell + (1 + heads) * each * f.H;
}

// Returns the gradients of deter0, stoch_proj, stats, o, cell1, cell2, u; x, y, head; those of scales and shifts.
py::object rssm_observe_backward(py::handle form, py::handle weights, py::handle grad_deter, py::handle grad_stats,
                                 py::handle grad_stoch, py::handle deter0, py::handle deter, py::handle stats,
                                 py::handle noise, py::handle is_first, py::handle u, py::handle cell1,
                                 py::handle cell2, py::handle o) {
  Call call("rssm_observe_backward", true);
  RssmForm f;
  WeightTensors w;
  const void* deter_data = call.first(deter, 3);
  if (!call.ok() || !call.on_cpu() || !read_form(form, f) || !w.read(call, weights, f) || !complete(f, w))
    return py::none();
  const Planes width(f);
  const int64_t T = call.size(0), N = call.size(1), members = pywm::cpu::num_threads();
  View v;
  if (call.size(2) != f.D || T == 0 || N == 0) return py::none();
  const auto optional = [&](py::handle object, int64_t last) {
    return object.is_none() ? nullptr : call.floats(object, {T, N, last}, v);
  };
  const void *gd = optional(grad_deter, f.D), *gs = optional(grad_stats, f.stats()),
             *gz = optional(grad_stoch, f.stoch());
  const void* start = call.floats(deter0, {N, f.D}, v);
  const void* stats_data = call.floats(stats, {T, N, f.stats()}, v);
  const void* noise_data = f.gaussian() ? call.floats(noise, {T, N, f.groups}, v) : nullptr;
  const uint8_t* first = call.mask(is_first, call.first(), 2);
  const void *kept_u = call.floats(u, {T, N, width.u}, v), *kept1 = call.floats(cell1, {T, N, width.cell1}, v),
             *kept2 = call.floats(cell2, {T, N, width.cell2}, v), *kept_o = call.floats(o, {T, N, f.H}, v);
  if (!call.ok()) return py::none();
  void *p_deter0, *p_proj, *p_stats, *p_o, *p1, *p2, *p_u, *p_x, *p_y, *p_head, *p_norms;
  py::object out_deter0 = call.empty({N, f.D}, p_deter0), out_proj = call.empty({N, f.H}, p_proj),
             out_stats = call.empty({T, N, f.stats()}, p_stats), out_o = call.empty({T, N, f.H}, p_o),
             out1 = call.empty({T, N, width.cell1}, p1), out2 = call.empty({T, N, width.cell2}, p2),
             out_u = call.empty({T, N, width.u}, p_u), out_x = call.empty({T, N, width.u}, p_x),
             out_y = call.empty({T, N, f.D}, p_y), out_head = call.empty({T, N, f.H}, p_head),
             out_norms = call.empty({norm_widths(f, 1)}, p_norms);
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const Scratch scratch(call, pywm::cpu::rssm_observe_backward_workspace<S>(f, N, members));
    const RssmObserveBackwardArgs<S> a{f,
                                       w.weights<S>(),
                                       in<S>(gd),
                                       in<S>(gs),
                                       in<S>(gz),
                                       in<S>(start),
                                       in<S>(deter_data),
                                       in<S>(stats_data),
                                       in<S>(noise_data),
                                       first,
                                       in<S>(kept_u),
                                       in<S>(kept1),
                                       in<S>(kept2),
                                       in<S>(kept_o),
                                       out<S>(p_deter0),
                                       out<S>(p_proj),
                                       out<S>(p_stats),
                                       out<S>(p_o),
                                       out<S>(p1),
                                       out<S>(p2),
                                       out<S>(p_u),
                                       out<S>(p_x),
                                       out<S>(p_y),
                                       out<S>(p_head),
                                       out<S>(p_norms),
                                       out<S>(scratch.data),
                                       T,
                                       N,
                                       members};
    call.run([&] { pywm::cpu::rssm_observe_backward(a); }, [&](void*) { no_cuda_kernel("rssm_observe_backward"); });
  });
  return py::make_tuple(out_deter0, out_proj, out_stats, out_o, out1, out2, out_u, out_x, out_y, out_head, out_norms);
}

// A list of layers, each a tuple (weight, bias, scale, shift) with None for what is not there.
template <typename S>
struct LayerList {
  std::vector<RssmLayer<S>> layers;

  // widths[i] is the least width of layer i's input and outs[i] the length of its output.
  bool read(Call& call, py::handle list, const std::vector<int64_t>& widths, Norm norm) {
    if (!PyTuple_Check(list.ptr()) || PyTuple_GET_SIZE(list.ptr()) + 1 != static_cast<Py_ssize_t>(widths.size()))
      return false;
    for (size_t i = 0; i + 1 < widths.size(); ++i) {
      py::handle parts = PyTuple_GET_ITEM(list.ptr(), i);
      if (!PyTuple_Check(parts.ptr()) || PyTuple_GET_SIZE(parts.ptr()) != kParts) return false;
      View v;
      const bool last = i + 2 == widths.size();
      const void* p[kParts] = {};
      for (int part = 0; part < kParts; ++part) {
        py::handle tensor = PyTuple_GET_ITEM(parts.ptr(), part);
        if (!tensor.is_none())
          p[part] =
              part == 0 ? call.floats(tensor, {widths[i + 1], widths[i]}, v) : call.floats(tensor, {widths[i + 1]}, v);
      }
      if (!call.ok() || !p[0] || (!last && norm != Norm::kNone && !p[2]) || (!last && norm == Norm::kLayer && !p[3]))
        return false;
      layers.push_back({in<S>(p[0]), widths[i], in<S>(p[1]), in<S>(p[2]), in<S>(p[3])});
    }
    return true;
  }
};

// policy: (layers, U, outputs, norm, activation, eps, kind, classes, unimix, min_std, max_std). Fills rows 1 to H of
// deter, stoch and index; returns action, prior statistics, policy outputs, and with `keep` the pre-activations of the
// policy's hidden layers (else None).
py::object rssm_imagine(py::handle form, py::handle weights, py::handle action_in, py::handle prior, py::handle policy,
                        py::handle stoch_proj, py::handle policy_proj, py::handle noise, py::handle action_noise,
                        py::handle force, py::handle force_action, py::handle deter, py::handle stoch, py::handle index,
                        bool keep) {
  Call call("rssm_imagine", true);
  RssmForm f;
  WeightTensors w;
  const void* deter_data = call.first(deter, 3);
  if (!call.ok() || !call.on_cpu() || !read_form(form, f) || !w.read(call, weights, f) ||
      !PyTuple_Check(policy.ptr()) || PyTuple_GET_SIZE(policy.ptr()) != 11 || !PyTuple_Check(prior.ptr()))
    return py::none();
  const bool block = f.cell == RssmCell::kBlockGru;
  const int64_t horizon = call.size(0) - 1, N = call.size(1);
  View v;
  if (call.size(2) != f.D || horizon < 1 || N < 1) return py::none();
  if (!complete(f, w)) return py::none();
  const auto item = [&](int i) { return py::handle(PyTuple_GET_ITEM(policy.ptr(), i)); };
  const auto integer = [&](int i) { return PyLong_AsLongLong(item(i).ptr()); };
  const auto real = [&](int i) { return PyFloat_AsDouble(item(i).ptr()); };
  const int64_t U = integer(1), outputs = integer(2);
  const Norm policy_norm = static_cast<Norm>(integer(3));
  const PolicyKind kind = static_cast<PolicyKind>(integer(6));
  std::vector<int64_t> classes;
  if (!PyTuple_Check(item(7).ptr())) return py::none();
  for (py::handle n : py::reinterpret_borrow<py::tuple>(item(7))) classes.push_back(PyLong_AsLongLong(n.ptr()));
  const double policy_eps = real(5), unimix = real(8), min_std = real(9), max_std = real(10);
  const Activation activation = static_cast<Activation>(integer(4));
  if (PyErr_Occurred()) {
    PyErr_Clear();
    return py::none();
  }
  int64_t A = kind == PolicyKind::kCategorical ? 0 : outputs / 2;
  for (int64_t n : classes) {
    if (n < 1 || n > 256) return py::none();
    A += n;
  }
  const int64_t policy_layers = PyTuple_Check(item(0).ptr()) ? PyTuple_GET_SIZE(item(0).ptr()) : 0;
  const int64_t prior_layers = PyTuple_GET_SIZE(prior.ptr());
  constexpr int64_t kMostLayers = 16;
  if (policy_layers < 2 || policy_layers > kMostLayers || prior_layers < 1 || prior_layers > kMostLayers || U < 1 ||
      outputs != (kind == PolicyKind::kCategorical ? A : 2 * A) || A < 1)
    return py::none();
  std::vector<int64_t> policy_widths{f.D + f.stoch()}, prior_widths{f.D};
  for (int64_t i = 1; i < policy_layers; ++i) policy_widths.push_back(U);
  policy_widths.push_back(outputs);
  for (int64_t i = 1; i < prior_layers; ++i) prior_widths.push_back(f.H);
  prior_widths.push_back(f.stats());
  void* stoch_data = const_cast<void*>(call.floats(stoch, {horizon + 1, N, f.stoch()}, v));
  const void* proj = call.floats(stoch_proj, {N, f.H}, v);
  const void* first_proj = call.floats(policy_proj, {N, U}, v);
  const void* noise_data = noise.is_none() ? nullptr : call.floats(noise, {horizon, N, f.groups}, v);
  const int64_t groups = static_cast<int64_t>(classes.size());
  const void* action_noise_data =
      action_noise.is_none()
          ? nullptr
          : call.floats(action_noise, {horizon, N, kind == PolicyKind::kCategorical ? groups : A}, v);
  const void* forced_action = force_action.is_none() ? nullptr : call.floats(force_action, {horizon, N, A}, v);
  const uint8_t* force_index = nullptr;
  const void* force_stoch = nullptr;
  uint8_t* index_data = nullptr;
  if (f.gaussian()) {
    if (!force.is_none()) force_stoch = call.floats(force, {horizon, N, f.groups}, v);
  } else {
    index_data = const_cast<uint8_t*>(call.bytes(index, call.first(), 2, f.groups));
    if (!force.is_none()) {
      View fv;
      if (!call.ok() || !view_of(force, fv) || fv.ndim != 3 || fv.shape[0] != horizon || fv.shape[1] != N ||
          fv.shape[2] != f.groups || fv.dtype.code != abi::kUInt || fv.dtype.bits != 8 || !abi::is_contiguous(fv) ||
          fv.device.type != abi::kCPU)
        return py::none();
      force_index = static_cast<const uint8_t*>(fv.data) + fv.byte_offset;
      for (int64_t i = 0; i < horizon * N * f.groups; ++i)
        if (force_index[i] >= f.classes) return py::none();
    }
  }
  if (!call.ok() || (!noise_data && !force_index && !force_stoch) || (!action_noise_data && !forced_action))
    return py::none();
  void *action_data, *prior_data, *policy_data;
  py::object action = call.empty({horizon, N, A}, action_data), stats = call.empty({horizon, N, f.stats()}, prior_data),
             policy_stats = call.empty({horizon, N, outputs}, policy_data), policy_pre = py::none();
  void* pre_data = nullptr;
  const int64_t pre_shape[] = {policy_layers - 1, horizon, N, U};
  if (keep) policy_pre = call.empty(pre_shape, 4, pre_data);
  if (!call.ok()) return py::none();
  bool served = true;
  by_dtype(call, [&]<typename S>() {
    LayerList<S> prior_list, policy_list, action_list;
    served = prior_list.read(call, prior, prior_widths, f.norm) &&
             policy_list.read(call, item(0), policy_widths, policy_norm);
    if (served && block)
      served = action_list.read(call, action_in, {A, f.H}, Norm::kNone) &&
               (f.norm == Norm::kNone || action_list.layers[0].scale) &&
               (f.norm != Norm::kLayer || action_list.layers[0].shift);
    if (served && block) served = w.ld[2] >= f.D / f.blocks + 3 * f.H && w.pointers[2][0] && w.pointers[0][0];
    if (served && !block) served = w.ld[1] >= f.stoch() + A;
    if (!served) return;
    RssmImagineArgs<S> a{f,
                         w.weights<S>(),
                         block ? action_list.layers[0] : RssmLayer<S>{},
                         prior_list.layers.data(),
                         prior_layers,
                         {policy_list.layers.data(), policy_layers, U, outputs, policy_norm, activation, policy_eps,
                          kind, classes.data(), groups, unimix, min_std, max_std},
                         in<S>(proj),
                         in<S>(first_proj),
                         in<S>(noise_data),
                         in<S>(action_noise_data),
                         force_index,
                         in<S>(force_stoch),
                         in<S>(forced_action),
                         out<S>(const_cast<void*>(deter_data)),
                         out<S>(stoch_data),
                         out<S>(action_data),
                         out<S>(prior_data),
                         out<S>(policy_data),
                         index_data,
                         out<S>(pre_data),
                         nullptr,
                         horizon,
                         N,
                         A,
                         pywm::cpu::num_threads()};
    a.w.head = {};
    const Scratch scratch(call, pywm::cpu::rssm_imagine_workspace(a));
    a.scratch = out<S>(scratch.data);
    call.run([&] { pywm::cpu::rssm_imagine(a); }, [&](void*) { no_cuda_kernel("rssm_imagine"); });
  });
  if (!served || !call.ok()) return py::none();
  return py::make_tuple(action, stats, policy_stats, policy_pre);
}

// Returns the gradients of deter0, stoch0, stats, the prior's hidden layers, cell1, cell2, u; x, y, and what the
// prior's hidden layers give; those of scales and shifts. `index` is None for Gaussian latents, whose noise is None for
// others.
py::object rssm_imagine_backward(py::handle form, py::handle weights, py::handle prior, py::handle grad_deter,
                                 py::handle grad_stoch, py::handle grad_stats, py::handle action_proj,
                                 py::handle stoch_proj, py::handle deter, py::handle stoch, py::handle stats,
                                 py::handle noise, py::handle index) {
  Call call("rssm_imagine_backward", true);
  RssmForm f;
  WeightTensors w;
  const void* deter_data = call.first(deter, 3);
  if (!call.ok() || !call.on_cpu() || !read_form(form, f) || !w.read(call, weights, f) || !complete(f, w) ||
      !PyTuple_Check(prior.ptr()))
    return py::none();
  const Planes width(f);
  const int64_t horizon = call.size(0) - 1, N = call.size(1), prior_layers = PyTuple_GET_SIZE(prior.ptr());
  constexpr int64_t kMostLayers = 16;
  if (call.size(2) != f.D || horizon < 1 || N < 1 || prior_layers < 2 || prior_layers > kMostLayers) return py::none();
  View v;
  const auto optional = [&](py::handle object, int64_t rows, int64_t last) {
    return object.is_none() ? nullptr : call.floats(object, {rows, N, last}, v);
  };
  const void *gd = optional(grad_deter, horizon + 1, f.D), *gz = optional(grad_stoch, horizon + 1, f.stoch()),
             *gs = optional(grad_stats, horizon, f.stats());
  const void *actions = call.floats(action_proj, {horizon, N, width.action}, v),
             *start = call.floats(stoch_proj, {N, f.H}, v),
             *stoch_data = call.floats(stoch, {horizon + 1, N, f.stoch()}, v),
             *stats_data = call.floats(stats, {horizon, N, f.stats()}, v);
  const void* noise_data = f.gaussian() ? call.floats(noise, {horizon, N, f.groups}, v) : nullptr;
  const uint8_t* index_data = f.gaussian() ? nullptr : call.bytes(index, call.first(), 2, f.groups);
  if (!call.ok()) return py::none();
  if (index_data)
    for (int64_t i = 0; i < (horizon + 1) * N * f.groups; ++i)
      if (index_data[i] >= f.classes) return py::none();
  void *p_deter0, *p_stoch0, *p_stats, *p_prior, *p1, *p2, *p_u, *p_x, *p_y, *p_prior_x, *p_norms;
  const int64_t heads[] = {prior_layers - 1, horizon, N, f.H};
  py::object out_deter0 = call.empty({N, f.D}, p_deter0), out_stoch0 = call.empty({N, f.stoch()}, p_stoch0),
             out_stats = call.empty({horizon, N, f.stats()}, p_stats), out_prior = call.empty(heads, 4, p_prior),
             out1 = call.empty({horizon, N, width.cell1}, p1), out2 = call.empty({horizon, N, width.cell2}, p2),
             out_u = call.empty({horizon, N, width.u}, p_u), out_x = call.empty({horizon, N, width.u}, p_x),
             out_y = call.empty({horizon, N, f.D}, p_y), out_prior_x = call.empty(heads, 4, p_prior_x),
             out_norms = call.empty({norm_widths(f, prior_layers - 1)}, p_norms);
  if (!call.ok()) return py::none();
  std::vector<int64_t> widths(static_cast<size_t>(prior_layers), f.H);
  widths.front() = f.D;
  widths.push_back(f.stats());
  bool served = true;
  by_dtype(call, [&]<typename S>() {
    LayerList<S> list;
    served = list.read(call, prior, widths, f.norm);
    if (!served) return;
    RssmImagineBackwardArgs<S> a{f,
                                 w.weights<S>(),
                                 list.layers.data(),
                                 prior_layers,
                                 in<S>(gd),
                                 in<S>(gz),
                                 in<S>(gs),
                                 in<S>(actions),
                                 in<S>(start),
                                 in<S>(deter_data),
                                 in<S>(stoch_data),
                                 in<S>(stats_data),
                                 in<S>(noise_data),
                                 index_data,
                                 out<S>(p_deter0),
                                 out<S>(p_stoch0),
                                 out<S>(p_stats),
                                 out<S>(p_prior),
                                 out<S>(p1),
                                 out<S>(p2),
                                 out<S>(p_u),
                                 out<S>(p_x),
                                 out<S>(p_y),
                                 out<S>(p_prior_x),
                                 out<S>(p_norms),
                                 nullptr,
                                 horizon,
                                 N,
                                 pywm::cpu::num_threads()};
    a.w.head = {};
    const Scratch scratch(call, pywm::cpu::rssm_imagine_backward_workspace(a));
    a.scratch = out<S>(scratch.data);
    call.run([&] { pywm::cpu::rssm_imagine_backward(a); }, [&](void*) { no_cuda_kernel("rssm_imagine_backward"); });
  });
  if (!served || !call.ok()) return py::none();
  return py::make_tuple(out_deter0, out_stoch0, out_stats, out_prior, out1, out2, out_u, out_x, out_y, out_prior_x,
                        out_norms);
}

// A layer, a tuple of weight, bias, scale and shift, whose weight has this shape. `norm`: what stands behind it.
template <typename S>
bool read_layer(Call& call, py::handle layer, std::initializer_list<int64_t> shape, Norm norm, RssmLayer<S>& out) {
  if (!PyTuple_Check(layer.ptr()) || PyTuple_GET_SIZE(layer.ptr()) != kParts) return false;
  View v;
  const void* weight = call.floats(PyTuple_GET_ITEM(layer.ptr(), 0), shape, v);
  if (!call.ok()) return false;
  const int64_t outputs = shape.size() == 3 ? v.shape[0] * v.shape[1] : v.shape[0];
  const void* parts[kParts] = {weight};
  for (int part = 1; part < kParts; ++part) {
    py::handle tensor = PyTuple_GET_ITEM(layer.ptr(), part);
    View unused;
    if (!tensor.is_none()) parts[part] = call.floats(tensor, {outputs}, unused);
  }
  out = {in<S>(weight), v.shape[v.ndim - 1], in<S>(parts[1]), in<S>(parts[2]), in<S>(parts[3])};
  return call.ok() && (norm == Norm::kNone) == !out.scale && (norm == Norm::kLayer) == (out.shift != nullptr);
}

constexpr int64_t kMostHeadLayers = 16, kMostRows = 64, kMacsForTeam = 1 << 17;

// The model of RSSMParams, a tuple: config, deter_in, stoch_in, action_in, hidden, gates, candidate, prior, posterior.
template <typename S>
bool read_model(Call& call, py::handle params, RssmActArgs<S>& a, std::vector<RssmLayer<S>>& head) {
  if (!PyTuple_Check(params.ptr()) || PyTuple_GET_SIZE(params.ptr()) != 9) return false;
  const auto item = [&](int i) { return py::handle(PyTuple_GET_ITEM(params.ptr(), i)); };
  const RssmForm& f = a.form;
  const int64_t D = f.D, H = f.H, G = f.blocks, Dg = D / G, Z = f.stoch();
  bool fits = false;
  if (f.cell == RssmCell::kBlockGru)
    fits = read_layer(call, item(1), {H, D}, f.norm, a.w.deter_in) &&
           read_layer(call, item(2), {H, Z}, f.norm, a.w.stoch_in) &&
           read_layer(call, item(3), {H, a.A}, f.norm, a.action_in) &&
           read_layer(call, item(4), {G, Dg, Dg + 3 * H}, f.norm, a.w.hidden) &&
           read_layer(call, item(5), {G, 3 * Dg, Dg}, Norm::kNone, a.w.gates);
  else if (f.cell == RssmCell::kLayerNormGru)
    fits = read_layer(call, item(2), {H, Z + a.A}, f.norm, a.w.stoch_in) &&
           read_layer(call, item(5), {3 * D, H + D}, Norm::kLayer, a.w.gates);
  py::handle layers = item(a.embed ? 8 : 7);
  if (!fits || !PyTuple_Check(layers.ptr())) return false;
  const int64_t count = PyTuple_GET_SIZE(layers.ptr());
  if (count < 2 || count > kMostHeadLayers) return false;
  head.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const bool last = i + 1 == count;
    if (!read_layer(call, PyTuple_GET_ITEM(layers.ptr(), i), {last ? f.stats() : H, i == 0 ? D + a.E : H},
                    last ? Norm::kNone : f.norm, head[static_cast<size_t>(i)]))
      return false;
  }
  a.head = head.data();
  a.head_layers = count;
  return true;
}

// One step of a few states without gradients: deter, stoch, index, logits. Whatever does not fit is declined. `noise`
// is a tensor or what draws one, called when all else fits: a call that is declined must not advance a generator.
py::object rssm_act(py::handle form, py::handle params, py::handle deter, py::handle stoch, py::handle action,
                    py::handle embed, py::handle is_first, py::handle noise, py::handle force) {
  Call call("rssm_act", false);
  RssmForm f;
  const void* deter_data = call.first(deter, 2);
  if (!call.ok() || !call.on_cpu() || !read_form(form, f) || f.gaussian()) return py::none();
  const int64_t N = call.size(0), G = f.groups, K = f.classes;
  if (call.size(1) != f.D || N < 1 || N > kMostRows) return py::none();
  View of_stoch, of_action, of_embed, v;
  if (!view_of(stoch, of_stoch)) return py::none();
  const uint8_t* stoch_index = nullptr;
  const void* stoch_data = nullptr;
  if (abi::is_bytes(of_stoch)) {
    stoch_index = call.bytes(stoch, call.first(), 1, G);
    if (stoch_index)
      for (int64_t i = 0; i < N * G; ++i)
        if (stoch_index[i] >= K) return py::none();
  } else {
    stoch_data = call.floats(stoch, {N, G, K}, v);
  }
  const void* action_data = call.floats(action, {N, -1}, of_action);
  const void* embed_data = embed.is_none() ? nullptr : call.floats(embed, {N, -1}, of_embed);
  const uint8_t* first = is_first.is_none() ? nullptr : call.mask(is_first, call.first(), 1);
  const bool drawn_late = PyFunction_Check(noise.ptr());
  const void* noise_data = noise.is_none() || drawn_late ? nullptr : call.floats(noise, {N, G}, v);
  const uint8_t* forced = force.is_none() ? nullptr : call.bytes(force, call.first(), 1, G);
  if (!call.ok() || (!noise_data && !drawn_late && !forced) || of_action.shape[1] < 1) return py::none();
  if (forced)
    for (int64_t i = 0; i < N * G; ++i)
      if (forced[i] >= K) return py::none();
  py::object result = py::none();
  by_dtype(call, [&]<typename S>() {
    RssmActArgs<S> a{};
    std::vector<RssmLayer<S>> head;
    a.form = f;
    a.deter = in<S>(deter_data);
    a.stoch = in<S>(stoch_data);
    a.action = in<S>(action_data);
    a.embed = in<S>(embed_data);
    a.noise = in<S>(noise_data);
    a.stoch_index = stoch_index;
    a.is_first = first;
    a.force_index = forced;
    a.N = N;
    a.A = of_action.shape[1];
    a.E = embed_data ? of_embed.shape[1] : 0;
    if (!read_model(call, params, a, head) || call.wants_gradients()) return;
    py::object drawn;
    if (drawn_late && !forced) {
      drawn = noise();
      a.noise = in<S>(call.floats(drawn, {N, G}, v));
      if (!call.ok()) return;
    }
    const int64_t shape[] = {N, G, K};
    void *deter_out, *stoch_out, *stats_out, *index_out;
    py::object new_deter = call.empty({N, f.D}, deter_out), new_stoch = call.empty(shape, 3, stoch_out),
               index = call.bytes(shape, 2, index_out), stats = call.empty(shape, 3, stats_out);
    if (!call.ok()) return;
    a.deter_out = out<S>(deter_out);
    a.stoch_out = out<S>(stoch_out);
    a.stats = out<S>(stats_out);
    a.index = static_cast<uint8_t*>(index_out);
    // Members of a team cost some microseconds to call.
    a.members = pywm::rssm_act_work(f, N) < kMacsForTeam ? 1 : pywm::cpu::num_threads();
    const Scratch scratch(call, pywm::cpu::rssm_act_workspace(a));
    a.scratch = out<S>(scratch.data);
    call.run([&] { pywm::cpu::rssm_act(a); }, [&](void*) { no_cuda_kernel("rssm_act"); });
    result = py::make_tuple(new_deter, new_stoch, index, stats);
  });
  return result;
}

// An empty tensor of like's dtype, or of bytes, in the memory that outputs have: pages of 4 KB, which the system clears
// one fault at a time, would take longer than some kernels.
py::object new_output(py::handle like, py::handle sizes, bool bytes) {
  Call call("new_output", true);
  call.first(like, -1);
  if (!call.ok() || !PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) > kMaxRank) return py::none();
  std::array<int64_t, kMaxRank> shape{};
  const int rank = static_cast<int>(PyTuple_GET_SIZE(sizes.ptr()));
  for (int i = 0; i < rank; ++i) {
    shape[static_cast<size_t>(i)] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
    if (shape[static_cast<size_t>(i)] < 0) {
      PyErr_Clear();
      return py::none();
    }
  }
  void* unused = nullptr;
  return bytes ? call.bytes(shape.data(), rank, unused) : call.empty(shape.data(), rank, unused);
}

// The classes of one-hot actions [T, N, A] in `classes` [T, N] uint8, A for the zeros where an episode begins; False if
// some action is neither.
py::object action_classes(py::handle action, py::handle is_first, py::handle classes) {
  Call call("action_classes", true);
  const void* data = call.first(action, 3);
  if (!call.ok() || !call.on_cpu()) return py::none();
  const int64_t T = call.size(0), N = call.size(1), A = call.size(2);
  const uint8_t* first = call.mask(is_first, call.first(), 2);
  uint8_t* out = const_cast<uint8_t*>(call.bytes(classes, call.first(), 1, N));
  if (!call.ok() || A > 255) return py::none();
  bool all = true;
  by_dtype(call, [&]<typename S>() {
    const S* x = in<S>(data);
    for (int64_t i = 0; i < T * N && all; ++i, x += A) {
      int64_t zeros = 0, one = A;
      for (int64_t j = 0; j < A; ++j) {
        zeros += x[j] == S(0);
        one = x[j] == S(1) ? j : one;
      }
      const bool hot = one < A && zeros == A - 1;
      all = first[i] || hot || zeros == A;
      out[i] = static_cast<uint8_t>(first[i] || !hot ? A : one);
    }
  });
  return py::bool_(all);
}

}  // namespace

void define_rssm(py::module_& m) {
  define_fast<&rssm_observe>(
      m, "rssm_observe",
      "rssm_observe(form: object, weights: object, token_proj: object, action_proj: object, action_class: object, "
      "deter0: object, stoch_proj: object, noise: object, is_first: object, force: object, "
      "index: object, keep: bool) -> object");
  define_fast<&rssm_act>(m, "rssm_act",
                         "rssm_act(form: object, params: object, deter: object, stoch: object, action: object, "
                         "embed: object, is_first: object, noise: object, force: object) -> object");
  define_fast<&new_output>(m, "new_output", "new_output(like: object, sizes: object, bytes: bool) -> object");
  m.def("action_classes", &action_classes, "action"_a, "is_first"_a, "classes"_a);
  define_fast<&rssm_observe_backward>(
      m, "rssm_observe_backward",
      "rssm_observe_backward(form: object, weights: object, grad_deter: object, grad_stats: object, "
      "grad_stoch: object, deter0: object, deter: object, stats: object, noise: object, is_first: object, u: object, "
      "cell1: object, cell2: object, o: object) -> object");
  define_fast<&rssm_imagine>(
      m, "rssm_imagine",
      "rssm_imagine(form: object, weights: object, action_in: object, prior: object, policy: object, "
      "stoch_proj: object, policy_proj: object, noise: object, action_noise: object, force: object, "
      "force_action: object, deter: object, stoch: object, index: object, keep: bool) -> object");
  define_fast<&rssm_imagine_backward>(
      m, "rssm_imagine_backward",
      "rssm_imagine_backward(form: object, weights: object, prior: object, grad_deter: object, grad_stoch: object, "
      "grad_stats: object, action_proj: object, stoch_proj: object, deter: object, stoch: object, stats: object, "
      "noise: object, index: object) -> object");
}

}  // namespace pywm::bindings
