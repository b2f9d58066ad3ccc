// Operators of libtorch that tch does not bind.

#include "guarded.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_adamw.h>
#include <malloc.h>

#include <optional>

extern "C" const char *mempo_fused_adamw(at::Tensor *weights, at::Tensor *gradient, at::Tensor *first, at::Tensor *second,
                                         at::Tensor *step, at::Tensor *divisor, double learning_rate, double beta1,
                                         double beta2, double weight_decay, double epsilon) {
  return guarded([&] {
    at::_fused_adamw_({*weights}, {*gradient}, {*first}, {*second}, {}, {*step}, learning_rate, beta1, beta2,
                      weight_decay, epsilon, false, false, std::optional<at::Tensor>(*divisor), std::nullopt);
  });
}

extern "C" void mempo_keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, -1);
}
