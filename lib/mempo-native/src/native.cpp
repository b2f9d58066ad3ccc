// Operators of libtorch that tch does not bind.

#include "guarded.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_flash_attention_forward.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
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

extern "C" const char *mempo_varlen_attention(at::Tensor **out, const at::Tensor *q, const at::Tensor *k,
                                              const at::Tensor *v, const at::Tensor *offsets, int64_t longest) {
  return guarded([&] {
    *out = new at::Tensor(std::get<0>(at::_flash_attention_forward(q->contiguous(), k->contiguous(), v->contiguous(),
                                                                   *offsets, *offsets, longest, longest, 0.0, true, false)));
  });
}

extern "C" const char *mempo_pack_weight(at::Tensor **out, const at::Tensor *weight, int64_t rows) {
  return guarded([&] {
    static const auto pack = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_reorder_linear_weight", "");
    torch::jit::Stack stack{*weight, rows};
    pack.callBoxed(stack);
    *out = new at::Tensor(stack.at(0).toTensor());
  });
}

extern "C" const char *mempo_packed_linear(at::Tensor **out, const at::Tensor *x, const at::Tensor *packed,
                                           const at::Tensor *bias) {
  return guarded([&] {
    static const auto linear = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_linear_pointwise", "");
    const c10::IValue some_bias = bias == nullptr ? c10::IValue() : c10::IValue(*bias);
    torch::jit::Stack stack{*x, *packed, some_bias, "none", c10::List<std::optional<at::Scalar>>(), ""};
    linear.callBoxed(stack);
    *out = new at::Tensor(stack.at(0).toTensor());
  });
}

extern "C" void *mempo_inference_mode() { return new c10::InferenceMode(); }

extern "C" void mempo_end_inference_mode(void *mode) { delete static_cast<c10::InferenceMode *>(mode); }

extern "C" void mempo_keep_freed_memory() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, -1);
}
