// The module pywm._C.

#include <pybind11/stl.h>

#include "../cpu/parallel.h"
#include "bindings.h"
#include "memory.h"

PYBIND11_MODULE(_C, m) {
  using namespace pywm::bindings;
  m.doc() = "Compiled kernels of pywm. Private: call pywm.ops instead.";
  find_torch();
  pywm::cpu::kernels();  // an unusable PYWM_CPU_ISA is an error now, not at the first call
  for (const char* name : {"gae",
                           "gae_backward",
                           "lambda_return",
                           "lambda_return_backward",
                           "discounted_return",
                           "discounted_return_backward",
                           "vtrace",
                           "vtrace_backward",
                           "ppo_loss_categorical",
                           "ppo_loss_gaussian",
                           "mlp",
                           "mlp_backward",
                           "norm_mlp",
                           "norm_mlp_backward",
                           "norm_act",
                           "norm_act_backward",
                           "block_gru_gates",
                           "block_gru_gates_backward",
                           "layernorm_gru_gates",
                           "layernorm_gru_gates_backward",
                           "gru_gates",
                           "gru_gates_backward",
                           "gru_block_reset",
                           "gru_block_reset_backward",
                           "gru_block_update",
                           "gru_block_update_backward",
                           "one_hot_linear",
                           "one_hot_linear_backward",
                           "adam_step_",
                           "laprop_step_",
                           "rssm_observe",
                           "rssm_observe_backward",
                           "rssm_imagine",
                           "rssm_imagine_backward",
                           "rssm_act",
                           "philox",
                           "categorical_sample",
                           "categorical_sample_backward",
                           "kl_balance",
                           "kl_balance_backward",
                           "symexp_twohot_loss",
                           "symexp_twohot_loss_backward",
                           "symexp_twohot_mean",
                           "symexp_twohot_mean_backward",
                           "gaussian_sample",
                           "gaussian_sample_backward",
                           "gaussian_kl",
                           "gaussian_kl_backward",
                           "pixel_cross_entropy",
                           "pixel_cross_entropy_backward",
                           "stack_frames",
                           "resize_area",
                           "sample_starts"})
    counter(name);

  m.attr("__version__") = PYWM_VERSION;
  m.attr("cuda_reason") = PYWM_CUDA_REASON;
  m.attr("max_groups") = pywm::kMaxGroups;
  m.attr("keeps_memory") = kKeepBlocks;
#if defined(PYWM_WITH_CUDA)
  m.attr("has_cuda") = true;
  m.def("cuda_device_count", &pywm::cuda::device_count);
  m.def("cuda_status", &pywm::cuda::status);
#else
  m.attr("has_cuda") = false;
  m.def("cuda_device_count", [] { return 0; });
  m.def("cuda_status", [] { return "built without CUDA"; });
#endif
  m.def("cpu_isa", [] { return pywm::cpu::kernels().name; }, "Instruction set of the CPU kernels in use.");
  m.def("cpu_isas", [] { return pywm::cpu::available_isas(); }, "Instruction sets that this machine can run.");
  m.def("num_threads", &pywm::cpu::num_threads, "Threads that a large call would use now.");
  m.def("calls", &calls, "How often each kernel ran so far: name -> (CPU, CUDA).");
  m.def("kept_bytes", &kept_bytes, "How much freed memory waits for the next call.");
  m.attr("kept_limit") = kept_limit();
  m.def("poison", &poison, "on"_a, "Fill new outputs on the CPU with NaN before the kernels write them; for tests.");

  define_returns(m);
  define_ppo_loss(m);
  define_mlp(m);
  define_norm_mlp(m);
  define_norm_act(m);
  define_gru_gates(m);
  define_one_hot_linear(m);
  define_adam_step(m);
  define_laprop_step(m);
  define_rssm(m);
  define_rssm_products(m);
  define_distributions(m);
  define_pixels(m);
}
