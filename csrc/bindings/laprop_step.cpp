// LaProp's step on flat parameters.

#include <cmath>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// On the CPU a look costs nothing; elsewhere it would wait for the device, where the kernel is safe with any offsets.
bool are_offsets(const int64_t* offsets, int64_t count, int64_t P) {
  if (offsets[0] != 0 || offsets[count - 1] != P) return false;
  for (int64_t s = 1; s < count; ++s)
    if (offsets[s] < offsets[s - 1]) return false;
  return true;
}

// Changes param, exp_avg, exp_avg_sq, slow and rounded in place and returns the norm. clip: None does not clip. slow
// and rounded may be None.
py::object laprop_step_(py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq,
                        py::handle offsets, py::handle step, py::handle lr, py::handle beta1, py::handle beta2,
                        py::handle eps, py::handle clip, py::handle min_norm, py::handle slow, py::handle slow_rate,
                        py::handle rounded, bool direct) {
  Call call("laprop_step_", direct);
  void* p = const_cast<void*>(call.first(param, 1));
  const void* g = call.floats(grad);
  void* m = const_cast<void*>(call.floats(exp_avg));
  void* v = const_cast<void*>(call.floats(exp_avg_sq));
  View borders;
  const int64_t* o = call.indices(offsets, borders);
  View followed;
  void* s = slow.is_none() ? nullptr : const_cast<void*>(call.floats(slow, {-1}, followed));
  uint16_t* copy = rounded.is_none() ? nullptr : call.bfloat16s(rounded, call.numel());
  constexpr double kBelow1 = 1 - 0x1p-53;
  const double k = PyLong_Check(step.ptr()) ? call.number(step, 1, 0x1p53) : NAN;
  const double rate = call.number(lr, 0, Call::kFinite), b1 = call.number(beta1, 0, kBelow1),
               b2 = call.number(beta2, 0, kBelow1), e = call.number(eps, 0, Call::kFinite),
               least = call.number(min_norm, 0, Call::kFinite);
  const double follow = call.number(slow_rate, 0, 1);
  const double c = clip.is_none() ? -1 : call.number(clip, 0, Call::kFinite);
  py::object answer;
  if (call.ok() && (std::isnan(k) || call.numel() == 0 || borders.shape[0] < 2)) call.refuse();
  if (call.ok() && s && followed.shape[0] > call.numel()) call.refuse();
  if (call.ok() && call.on_cpu() && !are_offsets(o, borders.shape[0], call.numel())) call.refuse();
  if (call.declines(answer)) return py::none();
  const int64_t segments = borders.shape[0] - 1;
  void *norm_data = nullptr, *workspace_data = nullptr;
  py::object norm = call.empty({}, norm_data), workspace;
#if defined(PYWM_WITH_CUDA)
  if (!call.on_cpu()) {  // doubles, whatever the dtype
    const int64_t doubles = pywm::cuda::laprop_workspace(call.numel(), segments);
    workspace = call.empty({doubles * (call.is_float() ? 2 : 1)}, workspace_data);
  }
#endif
  if (!call.ok()) return py::none();
  by_dtype(call, [&]<typename S>() {
    pywm::LaPropArgs<S> a{};
    a.param = out<S>(p), a.grad = in<S>(g), a.exp_avg = out<S>(m), a.exp_avg_sq = out<S>(v);
    a.slow = out<S>(s), a.rounded = copy, a.followed = s ? followed.shape[0] : 0, a.slow_rate = follow;
    a.norm = out<S>(norm_data), a.offsets = o, a.workspace = static_cast<double*>(workspace_data);
    a.P = call.numel(), a.segments = segments, a.step = static_cast<int64_t>(k);
    a.lr = rate, a.beta1 = b1, a.beta2 = b2, a.eps = e, a.clip = c, a.min_norm = least;
    call.run([&] { pywm::cpu::laprop_step(a); }, [&](void* stream) { pywm::cuda::laprop_step(a, stream); });
  });
  return norm;
}

}  // namespace

void define_laprop_step(py::module_& m) {
  define_fast<&laprop_step_>(
      m, "laprop_step_",
      "laprop_step_(param: object, grad: object, exp_avg: object, exp_avg_sq: object, offsets: object, step: "
      "object, lr: object, beta1: object, beta2: object, eps: object, clip: object, min_norm: object, slow: object, "
      "slow_rate: object, rounded: object, direct: bool) -> object");
}

}  // namespace pywm::bindings
