// The PPO loss of each family of distributions, with its gradients.

#include <pybind11/stl.h>

#include <vector>

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

  void outputs(Call& call, py::handle like, int rank, bool want_value, int64_t columns) {
    loss = call.empty({}, loss_data);
    stats = call.empty({5}, stats_data);
    if (want_value) {
      grad_value = call.empty(call.first().shape, rank, grad_value_data);
    } else {
      grad_value = call.empty({0}, grad_value_data);
      grad_value_data = nullptr;
    }
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
  t.outputs(call, logits, rank, want_value, 0);
  void* grad_data;
  py::object grad = call.wanted(want_dist, grad_data);
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
  t.outputs(call, mean, rank, want_value, shared && want_dist ? A : 0);
  void *mean_data, *log_std_data = nullptr;
  py::object grad_mean = call.wanted(want_dist, mean_data);
  py::object grad_log_std =
      shared ? call.empty({want_dist ? A : 0}, log_std_data) : call.wanted(want_dist, log_std_data);
  if (!want_dist) log_std_data = nullptr;
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    const pywm::PpoLossGaussianArgs<S> a{
        t.common<S>(), in<S>(mu), in<S>(ls), in<S>(act), out<S>(mean_data), out<S>(log_std_data), A, shared ? 1 : t.M};
    call.run([&] { pywm::cpu::ppo_loss_gaussian(a); }, [&](void* stream) { pywm::cuda::ppo_loss_gaussian(a, stream); });
  });
  return py::make_tuple(t.loss, t.stats, grad_mean, grad_log_std, t.grad_value);
}

}  // namespace

void define_ppo_loss(py::module_& m) {
  m.def("ppo_loss_categorical", &ppo_loss_categorical, "logits"_a, "nvec"_a, "action"_a, "old_log_prob"_a,
        "advantage"_a, "value"_a, "returns"_a, "old_value"_a, "valid"_a, "clip"_a, "value_clip"_a, "value_coef"_a,
        "entropy_coef"_a, "normalize_advantage"_a, "grouped"_a, "want_dist"_a, "want_value"_a, "direct"_a);
  m.def("ppo_loss_gaussian", &ppo_loss_gaussian, "mean"_a, "log_std"_a, "action"_a, "old_log_prob"_a, "advantage"_a,
        "value"_a, "returns"_a, "old_value"_a, "valid"_a, "clip"_a, "value_clip"_a, "value_coef"_a, "entropy_coef"_a,
        "normalize_advantage"_a, "want_dist"_a, "want_value"_a, "direct"_a);
}

}  // namespace pywm::bindings
