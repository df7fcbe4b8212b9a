// The PPO loss of each family of distributions, with its gradients.

#include <array>
#include <utility>

#include "bindings.h"

namespace pywm::bindings {
namespace {

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

  // A call from below the dispatcher clips at -1 where nothing is clipped.
  void numbers(Call& call, py::handle clip, py::handle value_clip, py::handle value_coef, py::handle entropy_coef,
               py::handle normalize_advantage, bool direct) {
    options.clip = call.number(clip, 0, INFINITY);
    options.value_clip = value_clip.is_none() ? -1 : call.number(value_clip, direct ? -1 : 0, INFINITY);
    options.value_coef = call.number(value_coef, 0, Call::kFinite);
    options.entropy_coef = call.number(entropy_coef, 0, Call::kFinite);
    options.normalize_advantage = normalize_advantage.ptr() == Py_True;
    if (options.clip == 0 || !PyBool_Check(normalize_advantage.ptr())) call.refuse();
  }

  void outputs(Call& call, py::handle like, int rank, bool want_value, int64_t columns) {
    loss = call.empty({}, loss_data);
    stats = call.empty({5}, stats_data);
    if (want_value)
      grad_value = call.empty(call.first().shape, rank, grad_value_data);
    else
      grad_value = unwanted(call, grad_value_data);
    (void)like;
    (void)columns;
#if defined(PYWM_WITH_CUDA)
    if (call.ok() && call.first().device.type == abi::kCUDA) {
      // Scratch from torch's allocator, which ties it to the current stream. Counted in doubles, allocated in bytes.
      const int64_t doubles = pywm::cuda::ppo_loss_workspace(M, columns);
      workspace = like.attr("new_empty")(py::make_tuple(doubles), "dtype"_a = py::handle(torch.module).attr("float64"));
      View v;
      if (view_of(workspace, v)) workspace_data = static_cast<double*>(v.data);
    }
#endif
  }

  // Below the dispatcher every output is a tensor; users are given None, which costs nothing.
  static py::object unwanted(Call& call, void*& data) {
    py::object none = call.direct() ? call.empty({0}, data) : py::none();
    data = nullptr;
    return none;
  }

  // The statistics as users see them: on the CPU tensors of their own, which take less time than views of one.
  template <typename S>
  py::object shown(Call& call) {
    if (call.direct() || !call.on_cpu()) return stats;
    constexpr int kStats = 5;
    py::tuple each(kStats);
    for (int i = 0; i < kStats; ++i) {
      void* data = nullptr;
      py::object x = call.empty({}, data);
      if (!call.ok()) return stats;
      *static_cast<S*>(data) = static_cast<const S*>(stats_data)[i];
      each[i] = std::move(x);
    }
    return each;
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

py::object ppo_loss_categorical(py::handle logits, py::handle nvec_, py::handle action, py::handle old_log_prob,
                                py::handle advantage, py::handle value, py::handle returns, py::handle old_value,
                                py::handle valid, py::handle clip, py::handle value_clip, py::handle value_coef,
                                py::handle entropy_coef, py::handle normalize_advantage, bool grouped, bool want_dist,
                                bool want_value, bool direct) {
  Call call("ppo_loss_categorical", direct);
  const void* l = call.first(logits, -1);
  const bool tuple = PyTuple_Check(nvec_.ptr());
  if (!call.ok() || call.first().ndim < 1 || !(tuple || PyList_Check(nvec_.ptr()))) return py::none();
  const int rank = call.first().ndim - 1;
  int64_t width = 0;
  std::array<int64_t, pywm::kMaxGroups> nvec;
  const Py_ssize_t groups = Py_SIZE(nvec_.ptr());
  if (groups > static_cast<Py_ssize_t>(nvec.size())) return py::none();
  for (Py_ssize_t i = 0; i < groups; ++i) {
    PyObject* item = tuple ? PyTuple_GET_ITEM(nvec_.ptr(), i) : PyList_GET_ITEM(nvec_.ptr(), i);
    const int64_t n = nvec[static_cast<size_t>(i)] = PyLong_Check(item) ? PyLong_AsLongLong(item) : 0;
    if (PyErr_Occurred()) PyErr_Clear();
    if (n < 1 || n > call.first().shape[rank] - width) return py::none();  // sums of anything could overflow
    width += n;
  }
  const int64_t G = groups;
  if (width != call.first().shape[rank] || (!grouped && G != 1)) return py::none();
  const int64_t* act = call.classes(action, call.first(), rank, grouped ? G : -1);
  PpoTensors t;
  t.inputs(call, old_log_prob, advantage, value, returns, old_value, valid, rank);
  t.numbers(call, clip, value_clip, value_coef, entropy_coef, normalize_advantage, direct);
  if (!call.ok() || t.M == 0 || (t.options.value_clip >= 0) != (t.old_value != nullptr)) return py::none();
  t.outputs(call, logits, rank, want_value, 0);
  void* grad_data;
  py::object grad = want_dist ? call.like_first(grad_data) : PpoTensors::unwanted(call, grad_data);
  if (!call.ok()) return py::none();
  py::object stats;
  by_dtype(call, [&]<typename S>() {
    const pywm::PpoLossCategoricalArgs<S> a{t.common<S>(), in<S>(l), act, nvec.data(), out<S>(grad_data), G, width};
    call.run([&] { pywm::cpu::ppo_loss_categorical(a); },
             [&](void* stream) { pywm::cuda::ppo_loss_categorical(a, stream); });
    stats = t.shown<S>(call);
  });
  return py::make_tuple(t.loss, stats, grad, t.grad_value);
}

py::object ppo_loss_gaussian(py::handle mean, py::handle log_std, py::handle action, py::handle old_log_prob,
                             py::handle advantage, py::handle value, py::handle returns, py::handle old_value,
                             py::handle valid, py::handle clip, py::handle value_clip, py::handle value_coef,
                             py::handle entropy_coef, py::handle normalize_advantage, bool want_dist, bool want_value,
                             bool direct) {
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
  t.numbers(call, clip, value_clip, value_coef, entropy_coef, normalize_advantage, direct);
  if (!call.ok() || t.M == 0 || (t.options.value_clip >= 0) != (t.old_value != nullptr)) return py::none();
  t.outputs(call, mean, rank, want_value, shared && want_dist ? A : 0);
  void *mean_data, *log_std_data;
  py::object grad_mean = want_dist ? call.like_first(mean_data) : PpoTensors::unwanted(call, mean_data);
  py::object grad_log_std = !want_dist ? PpoTensors::unwanted(call, log_std_data)
                            : shared   ? call.empty({A}, log_std_data)
                                       : call.like_first(log_std_data);
  if (!call.ok()) return py::none();
  py::object stats;
  by_dtype(call, [&]<typename S>() {
    const pywm::PpoLossGaussianArgs<S> a{
        t.common<S>(), in<S>(mu), in<S>(ls), in<S>(act), out<S>(mean_data), out<S>(log_std_data), A, shared ? 1 : t.M};
    call.run([&] { pywm::cpu::ppo_loss_gaussian(a); }, [&](void* stream) { pywm::cuda::ppo_loss_gaussian(a, stream); });
    stats = t.shown<S>(call);
  });
  return py::make_tuple(t.loss, stats, grad_mean, grad_log_std, t.grad_value);
}

}  // namespace

void define_ppo_loss(py::module_& m) {
  define_fast<&ppo_loss_categorical>(
      m, "ppo_loss_categorical",
      "ppo_loss_categorical(logits: object, nvec: object, action: object, old_log_prob: object, advantage: object, "
      "value: object, returns: object, old_value: object, valid: object, clip: object, value_clip: object, "
      "value_coef: object, entropy_coef: object, normalize_advantage: object, grouped: bool, want_dist: bool, "
      "want_value: bool, direct: bool) -> object");
  define_fast<&ppo_loss_gaussian>(
      m, "ppo_loss_gaussian",
      "ppo_loss_gaussian(mean: object, log_std: object, action: object, old_log_prob: object, advantage: object, "
      "value: object, returns: object, old_value: object, valid: object, clip: object, value_clip: object, "
      "value_coef: object, entropy_coef: object, normalize_advantage: object, want_dist: bool, want_value: bool, "
      "direct: bool) -> object");
}

}  // namespace pywm::bindings
