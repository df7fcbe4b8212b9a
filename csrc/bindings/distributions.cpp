// Random numbers, samples, divergences and losses of the distributions of world models.

#include <algorithm>
#include <cmath>
#include <limits>

#include "bindings.h"

namespace pywm::bindings {
namespace {

// Sizes of the first tensor around its last `last` dimensions.
struct Rows {
  int rank = 0;  // leading dimensions
  int64_t M = 1;

  Rows(const Call& call, int last) : rank(call.ok() ? call.first().ndim - last : 0) {
    for (int i = 0; i < rank; ++i) M *= call.size(i);
  }
};

// The largest finite number of the dtype stands for all above.
double bounded(const Call& call, double x) {
  return std::min(x, call.is_float() ? double(std::numeric_limits<float>::max()) : std::numeric_limits<double>::max());
}

const void* floats_or_null(Call& call, py::handle object, const View& like, int rank) {
  return object.is_none() ? nullptr : call.floats(object, like, rank);
}

// ---- philox --------------------------------------------------------------------------------------------------------

// Fills `out` [T, N, S]; None where it is not plain. `seed`: any bits.
py::object philox(py::handle out_, py::handle seed, py::handle offset, py::handle stream, bool normal, bool direct) {
  Call call("philox", direct);
  void* o = const_cast<void*>(call.first(out_, 3));
  const double start = call.number(offset, 0, 0x1p32), lane = call.number(stream, 0, 0x1p32 - 1);
  if (!call.ok() || !PyLong_Check(seed.ptr())) return py::none();
  const uint64_t key = PyLong_AsUnsignedLongLongMask(seed.ptr());
  if (PyErr_Occurred()) rethrow();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::PhiloxArgs<S> a{out<S>(o),
                                  call.size(0),
                                  call.size(1),
                                  call.size(2),
                                  key,
                                  static_cast<int64_t>(start),
                                  static_cast<int64_t>(lane),
                                  normal};
      call.run([&] { pywm::cpu::philox(a); }, [&](void* cuda_stream) { pywm::cuda::philox(a, cuda_stream); });
    });
  return py::bool_(true);
}

// ---- categorical_sample --------------------------------------------------------------------------------------------

bool is_group(Call& call, int least_rank) {
  if (!call.ok() || call.first().ndim < least_rank) return false;
  const int64_t K = call.size(call.first().ndim - 1);
  return K >= 1 && K <= kMaxClasses;
}

py::object categorical_sample(py::handle logits, py::handle uniform, py::handle unimix, bool direct) {
  Call call("categorical_sample", direct);
  const void* l = call.first(logits, -1);
  if (!is_group(call, 2)) return py::none();
  const Rows rows(call, 1);
  const void* u = call.floats(uniform, call.first(), rows.rank);
  const double mix = call.number(unimix, 0, 1);
  py::object answer;
  if (call.declines(answer)) return answer;
  void *stoch_data = nullptr, *index_data = nullptr;
  py::object stoch = call.like_first(stoch_data), index = call.bytes(call.first().shape, rows.rank, index_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::CategoricalSampleArgs<S> a{
          in<S>(l), in<S>(u), out<S>(stoch_data), out<uint8_t>(index_data), rows.M, call.size(rows.rank), mix};
      call.run([&] { pywm::cpu::categorical_sample(a); },
               [&](void* stream) { pywm::cuda::categorical_sample(a, stream); });
    });
  return py::make_tuple(stoch, index);
}

py::object categorical_sample_backward(py::handle grad, py::handle logits, double unimix) {
  Call call("categorical_sample_backward", true);
  const void* l = call.first(logits, -1);
  if (!is_group(call, 2)) return py::none();
  const void* g = call.floats(grad);
  const Rows rows(call, 1);
  void* grad_data = nullptr;
  py::object grad_logits = call.like_first(grad_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::CategoricalSampleBackwardArgs<S> a{
          in<S>(g), in<S>(l), out<S>(grad_data), rows.M, call.size(rows.rank), unimix};
      call.run([&] { pywm::cpu::categorical_sample_backward(a); },
               [&](void* stream) { pywm::cuda::categorical_sample_backward(a, stream); });
    });
  return grad_logits;
}

// ---- kl_balance ----------------------------------------------------------------------------------------------------

py::object kl_balance(py::handle posterior, py::handle prior, py::handle unimix, py::handle free_nats, bool direct) {
  Call call("kl_balance", direct);
  const void* q = call.first(posterior, -1);
  if (!is_group(call, 2)) return py::none();
  const void* p = call.floats(prior);
  const Rows rows(call, 2);
  const double mix = call.number(unimix, 0, 1), free = call.number(free_nats, 0, INFINITY);
  if (call.ok() && call.size(rows.rank) < 1) call.refuse();
  py::object answer;
  if (call.declines(answer)) return answer;
  void *dynamics_data, *representation_data, *kl_data;
  py::object dynamics = call.empty(call.first().shape, rows.rank, dynamics_data);
  py::object representation = call.empty(call.first().shape, rows.rank, representation_data);
  py::object kl = call.empty(call.first().shape, rows.rank, kl_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::KlBalanceArgs<S> a{in<S>(q),
                                     in<S>(p),
                                     out<S>(dynamics_data),
                                     out<S>(representation_data),
                                     out<S>(kl_data),
                                     rows.M,
                                     call.size(rows.rank),
                                     call.size(rows.rank + 1),
                                     mix,
                                     bounded(call, free)};
      call.run([&] { pywm::cpu::kl_balance(a); }, [&](void* stream) { pywm::cuda::kl_balance(a, stream); });
    });
  return py::make_tuple(dynamics, representation, kl);
}

py::object kl_balance_backward(py::handle grad_dynamics, py::handle grad_representation, py::handle posterior,
                               py::handle prior, py::handle kl, double unimix, double free_nats, bool want_posterior,
                               bool want_prior) {
  Call call("kl_balance_backward", true);
  const void* q = call.first(posterior, -1);
  if (!is_group(call, 2)) return py::none();
  const void* p = call.floats(prior);
  const Rows rows(call, 2);
  const void* gd = floats_or_null(call, grad_dynamics, call.first(), rows.rank);
  const void* gr = floats_or_null(call, grad_representation, call.first(), rows.rank);
  const void* value = call.floats(kl, call.first(), rows.rank);
  void *posterior_data, *prior_data;
  py::object grad_posterior = call.wanted(want_posterior, posterior_data);
  py::object grad_prior = call.wanted(want_prior, prior_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::KlBalanceBackwardArgs<S> a{in<S>(gd),
                                             in<S>(gr),
                                             in<S>(q),
                                             in<S>(p),
                                             in<S>(value),
                                             out<S>(posterior_data),
                                             out<S>(prior_data),
                                             rows.M,
                                             call.size(rows.rank),
                                             call.size(rows.rank + 1),
                                             unimix,
                                             bounded(call, free_nats)};
      call.run([&] { pywm::cpu::kl_balance_backward(a); },
               [&](void* stream) { pywm::cuda::kl_balance_backward(a, stream); });
    });
  return py::make_tuple(grad_posterior, grad_prior);
}

// ---- symexp two-hot ------------------------------------------------------------------------------------------------

bool is_bins(Call& call) {
  if (!call.ok() || call.first().ndim < 1) return false;
  const int64_t B = call.size(call.first().ndim - 1);
  return B >= 3 && B % 2 == 1 && B <= kMaxBins;
}

py::object symexp_twohot_loss(py::handle logits, py::handle target, py::handle other, py::handle other_scale,
                              bool direct) {
  Call call("symexp_twohot_loss", direct);
  const void* l = call.first(logits, -1);
  if (!is_bins(call)) return py::none();
  const Rows rows(call, 1);
  const void* y = call.floats(target, call.first(), rows.rank);
  const void* y2 = other.is_none() ? nullptr : call.floats(other, call.first(), rows.rank);
  const double scale = call.number(other_scale, 0, Call::kFinite);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* loss_data;
  py::object loss = call.empty(call.first().shape, rows.rank, loss_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::SymexpTwohotLossArgs<S> a{
          in<S>(l), in<S>(y), in<S>(y2), out<S>(loss_data), rows.M, call.size(rows.rank), S(scale)};
      call.run([&] { pywm::cpu::symexp_twohot_loss(a); },
               [&](void* stream) { pywm::cuda::symexp_twohot_loss(a, stream); });
    });
  return loss;
}

py::object symexp_twohot_loss_backward(py::handle grad, py::handle logits, py::handle target, py::handle other,
                                       double other_scale) {
  Call call("symexp_twohot_loss_backward", true);
  const void* l = call.first(logits, -1);
  if (!is_bins(call)) return py::none();
  const Rows rows(call, 1);
  const void* g = call.floats(grad, call.first(), rows.rank);
  const void* y = call.floats(target, call.first(), rows.rank);
  const void* y2 = other.is_none() ? nullptr : call.floats(other, call.first(), rows.rank);
  void* grad_data;
  py::object grad_logits = call.like_first(grad_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::SymexpTwohotLossBackwardArgs<S> a{
          in<S>(g), in<S>(l), in<S>(y), in<S>(y2), out<S>(grad_data), rows.M, call.size(rows.rank), S(other_scale)};
      call.run([&] { pywm::cpu::symexp_twohot_loss_backward(a); },
               [&](void* stream) { pywm::cuda::symexp_twohot_loss_backward(a, stream); });
    });
  return grad_logits;
}

py::object symexp_twohot_mean(py::handle logits, bool direct) {
  Call call("symexp_twohot_mean", direct);
  const void* l = call.first(logits, -1);
  if (!is_bins(call)) return py::none();
  const Rows rows(call, 1);
  py::object answer;
  if (call.declines(answer)) return answer;
  void* mean_data;
  py::object mean = call.empty(call.first().shape, rows.rank, mean_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::SymexpTwohotMeanArgs<S> a{in<S>(l), out<S>(mean_data), rows.M, call.size(rows.rank)};
      call.run([&] { pywm::cpu::symexp_twohot_mean(a); },
               [&](void* stream) { pywm::cuda::symexp_twohot_mean(a, stream); });
    });
  return mean;
}

py::object symexp_twohot_mean_backward(py::handle grad, py::handle logits, py::handle mean) {
  Call call("symexp_twohot_mean_backward", true);
  const void* l = call.first(logits, -1);
  if (!is_bins(call)) return py::none();
  const Rows rows(call, 1);
  const void* g = call.floats(grad, call.first(), rows.rank);
  const void* m = call.floats(mean, call.first(), rows.rank);
  void* grad_data;
  py::object grad_logits = call.like_first(grad_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::SymexpTwohotMeanBackwardArgs<S> a{in<S>(g),          in<S>(l), in<S>(m),
                                                    out<S>(grad_data), rows.M,   call.size(rows.rank)};
      call.run([&] { pywm::cpu::symexp_twohot_mean_backward(a); },
               [&](void* stream) { pywm::cuda::symexp_twohot_mean_backward(a, stream); });
    });
  return grad_logits;
}

// ---- Gaussian ------------------------------------------------------------------------------------------------------

py::object gaussian_sample(py::handle mean, py::handle raw_std, py::handle noise, py::handle min_std, bool sigmoid2,
                           bool direct) {
  Call call("gaussian_sample", direct);
  const void* mu = call.first(mean, -1);
  const void* raw = call.floats(raw_std);
  const void* xi = call.floats(noise);
  const double least = call.number(min_std, 0, Call::kFinite);
  py::object answer;
  if (call.declines(answer)) return answer;
  void *sample_data = nullptr, *std_data = nullptr;
  py::object sample = call.like_first(sample_data), std = call.like_first(std_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaussianSampleArgs<S> a{in<S>(mu),        in<S>(raw),   in<S>(xi), out<S>(sample_data),
                                          out<S>(std_data), call.numel(), S(least),  sigmoid2};
      call.run([&] { pywm::cpu::gaussian_sample(a); }, [&](void* stream) { pywm::cuda::gaussian_sample(a, stream); });
    });
  return py::make_tuple(sample, std);
}

py::object gaussian_sample_backward(py::handle grad_sample, py::handle grad_std, py::handle raw_std, py::handle noise,
                                    bool sigmoid2, bool want_mean, bool want_raw_std) {
  Call call("gaussian_sample_backward", true);
  const void* raw = call.first(raw_std, -1);
  const void* gs = call.optional_floats(grad_sample);
  const void* gd = call.optional_floats(grad_std);
  const void* xi = call.floats(noise);
  void *mean_data, *raw_data;
  py::object grad_mean = call.wanted(want_mean, mean_data), grad_raw = call.wanted(want_raw_std, raw_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaussianSampleBackwardArgs<S> a{in<S>(gs),         in<S>(gd),        in<S>(raw),   in<S>(xi),
                                                  out<S>(mean_data), out<S>(raw_data), call.numel(), sigmoid2};
      call.run([&] { pywm::cpu::gaussian_sample_backward(a); },
               [&](void* stream) { pywm::cuda::gaussian_sample_backward(a, stream); });
    });
  return py::make_tuple(grad_mean, grad_raw);
}

py::object gaussian_kl(py::handle mean_q, py::handle std_q, py::handle mean_p, py::handle std_p, bool direct) {
  Call call("gaussian_kl", direct);
  const void* mq = call.first(mean_q, -1);
  const void* sq = call.floats(std_q);
  const void* mp = call.floats(mean_p);
  const void* sp = call.floats(std_p);
  if (!call.ok() || call.first().ndim < 1) return py::none();
  const Rows rows(call, 1);
  if (call.size(rows.rank) < 1) call.refuse();
  py::object answer;
  if (call.declines(answer)) return answer;
  void* kl_data;
  py::object kl = call.empty(call.first().shape, rows.rank, kl_data);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaussianKlArgs<S> a{in<S>(mq),       in<S>(sq), in<S>(mp),           in<S>(sp),
                                      out<S>(kl_data), rows.M,    call.size(rows.rank)};
      call.run([&] { pywm::cpu::gaussian_kl(a); }, [&](void* stream) { pywm::cuda::gaussian_kl(a, stream); });
    });
  return kl;
}

py::object gaussian_kl_backward(py::handle grad, py::handle mean_q, py::handle std_q, py::handle mean_p,
                                py::handle std_p, bool want_mean_q, bool want_std_q, bool want_mean_p,
                                bool want_std_p) {
  Call call("gaussian_kl_backward", true);
  const void* mq = call.first(mean_q, -1);
  const void* sq = call.floats(std_q);
  const void* mp = call.floats(mean_p);
  const void* sp = call.floats(std_p);
  if (!call.ok() || call.first().ndim < 1) return py::none();
  const Rows rows(call, 1);
  const void* g = call.floats(grad, call.first(), rows.rank);
  void* data[4];
  const bool wanted[] = {want_mean_q, want_std_q, want_mean_p, want_std_p};
  py::tuple grads(4);
  for (int i = 0; i < 4; ++i) grads[i] = call.wanted(wanted[i], data[i]);
  if (!call.ok()) return py::none();
  if (call.numel() > 0)
    by_dtype(call, [&]<typename S>() {
      const pywm::GaussianKlBackwardArgs<S> a{in<S>(g),        in<S>(mq),       in<S>(sq),           in<S>(mp),
                                              in<S>(sp),       out<S>(data[0]), out<S>(data[1]),     out<S>(data[2]),
                                              out<S>(data[3]), rows.M,          call.size(rows.rank)};
      call.run([&] { pywm::cpu::gaussian_kl_backward(a); },
               [&](void* stream) { pywm::cuda::gaussian_kl_backward(a, stream); });
    });
  return grads;
}

}  // namespace

void define_distributions(py::module_& m) {
  define_fast<&philox>(
      m, "philox",
      "philox(out: object, seed: object, offset: object, stream: object, normal: bool, direct: bool) -> object");
  define_fast<&categorical_sample>(
      m, "categorical_sample",
      "categorical_sample(logits: object, uniform: object, unimix: object, direct: bool) -> object");
  m.def("categorical_sample_backward", &categorical_sample_backward, "grad"_a, "logits"_a, "unimix"_a);
  define_fast<&kl_balance>(
      m, "kl_balance",
      "kl_balance(posterior: object, prior: object, unimix: object, free_nats: object, direct: bool) -> object");
  m.def("kl_balance_backward", &kl_balance_backward, "grad_dynamics"_a, "grad_representation"_a, "posterior"_a,
        "prior"_a, "kl"_a, "unimix"_a, "free_nats"_a, "want_posterior"_a, "want_prior"_a);
  define_fast<&symexp_twohot_loss>(m, "symexp_twohot_loss",
                                   "symexp_twohot_loss(logits: object, target: object, other: object, other_scale: "
                                   "object, direct: bool) -> object");
  m.def("symexp_twohot_loss_backward", &symexp_twohot_loss_backward, "grad"_a, "logits"_a, "target"_a, "other"_a,
        "other_scale"_a);
  define_fast<&symexp_twohot_mean>(m, "symexp_twohot_mean",
                                   "symexp_twohot_mean(logits: object, direct: bool) -> object");
  m.def("symexp_twohot_mean_backward", &symexp_twohot_mean_backward, "grad"_a, "logits"_a, "mean"_a);
  define_fast<&gaussian_sample>(m, "gaussian_sample",
                                "gaussian_sample(mean: object, raw_std: object, noise: object, min_std: object, "
                                "sigmoid2: bool, direct: bool) -> object");
  m.def("gaussian_sample_backward", &gaussian_sample_backward, "grad_sample"_a, "grad_std"_a, "raw_std"_a, "noise"_a,
        "sigmoid2"_a, "want_mean"_a, "want_raw_std"_a);
  define_fast<&gaussian_kl>(
      m, "gaussian_kl",
      "gaussian_kl(mean_q: object, std_q: object, mean_p: object, std_p: object, direct: bool) -> "
      "object");
  m.def("gaussian_kl_backward", &gaussian_kl_backward, "grad"_a, "mean_q"_a, "std_q"_a, "mean_p"_a, "std_p"_a,
        "want_mean_q"_a, "want_std_q"_a, "want_mean_p"_a, "want_std_p"_a);
}

}  // namespace pywm::bindings
