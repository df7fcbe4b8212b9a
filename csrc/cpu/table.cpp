// One table of kernels for the instruction set this file is compiled for.

#include "kernels.h"

#define PYWM_STRING_(x) #x
#define PYWM_STRING(x) PYWM_STRING_(x)

namespace pywm::cpu::PYWM_ISA {

void fill_gae(Kernels&);
void fill_lambda_return(Kernels&);
void fill_discounted_return(Kernels&);
void fill_vtrace(Kernels&);
void fill_ppo_loss(Kernels&);
void fill_mlp(Kernels&);
void fill_norm_mlp(Kernels&);
void fill_norm_act(Kernels&);
void fill_gru_gates(Kernels&);
void fill_one_hot_linear(Kernels&);
void fill_adam(Kernels&);
void fill_laprop(Kernels&);
void fill_rssm_observe(Kernels&);
void fill_rssm_imagine(Kernels&);
void fill_rssm_imagine_backward(Kernels&);
void fill_rssm_act(Kernels&);
void fill_philox(Kernels&);
void fill_categorical_sample(Kernels&);
void fill_rssm_step(Kernels&);
void fill_kl_balance(Kernels&);
void fill_symexp_twohot(Kernels&);
void fill_gaussian(Kernels&);
void fill_pixel_cross_entropy(Kernels&);
void fill_stack_frames(Kernels&);
void fill_resize_area(Kernels&);
void fill_sample_starts(Kernels&);

const Kernels& table() {
  static Kernels filled = [] {
    Kernels kernels{};
    kernels.name = PYWM_STRING(PYWM_ISA);
    fill_gae(kernels);
    fill_lambda_return(kernels);
    fill_discounted_return(kernels);
    fill_vtrace(kernels);
    fill_ppo_loss(kernels);
    fill_mlp(kernels);
    fill_norm_mlp(kernels);
    fill_norm_act(kernels);
    fill_gru_gates(kernels);
    fill_one_hot_linear(kernels);
    fill_adam(kernels);
    fill_laprop(kernels);
    fill_rssm_observe(kernels);
    fill_rssm_imagine(kernels);
    fill_rssm_imagine_backward(kernels);
    fill_rssm_act(kernels);
    fill_philox(kernels);
    fill_categorical_sample(kernels);
    fill_rssm_step(kernels);
    fill_kl_balance(kernels);
    fill_symexp_twohot(kernels);
    fill_gaussian(kernels);
    fill_pixel_cross_entropy(kernels);
    fill_stack_frames(kernels);
    fill_resize_area(kernels);
    fill_sample_starts(kernels);
    return kernels;
  }();
  return filled;
}

}  // namespace pywm::cpu::PYWM_ISA
