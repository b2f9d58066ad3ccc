// Linear layer, attention and SiLU whose result for a row is the same bits whatever stands beside it and however many
// threads work: every matrix product and reduction has a shape that is fixed, or a function of the model alone, and runs on
// one thread. The gradients are those of the ordinary operators, and of one sequence the same on any number of threads.

#include "guarded.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

// Part of MKL where libtorch has it: sets the threads of the calling thread's products, gives those it had (0: the usual).
extern "C" int MKL_Set_Num_Threads_Local(int threads) __attribute__((weak));

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

int64_t blocks_of(int64_t count, int64_t block) { return (count + block - 1) / block; }

// `x` with zeros behind, so that axis `dim` has `size`.
Tensor padded(const Tensor &x, int64_t dim, int64_t size) {
  if (x.size(dim) == size) return x;
  auto shape = x.sizes().vec();
  shape[dim] = size;
  Tensor out = at::zeros(shape, x.options());
  out.narrow(dim, 0, x.size(dim)).copy_(x);
  return out;
}

// Output columns of one product on a CPU: a few hundred keep a core busy, and there are as many products as that makes.
constexpr int64_t OUTPUTS = 512;

// This thread's products are not divided between threads while it lives. In a parallel region oneDNN sees to that itself;
// MKL, told by libtorch to take a fixed number of threads, cuts a product into as many parts there, too.
class Undivided {
  int before = MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0;

public:
  Undivided() = default;
  Undivided(const Undivided &) = delete;
  ~Undivided() {
    if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before);
  }
};

// What libtorch's operators multiply within parallel regions of their own is not divided further: for the threads that work
// for this one from now on, which multiply nowhere else.
void leave_workers_alone() {
  at::parallel_for(0, at::get_num_threads(), 1, [](int64_t, int64_t) {
    if (at::get_thread_num() > 0 && MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(1);
  });
}

// Calls `work` with 0, 1, .. count - 1, each on one thread alone: how a library divides a product between threads may reach
// its last bits. A single call, too, is made in a region of two threads, since one of one is none.
template <typename F> void each_alone(int64_t count, const F &work) {
  if (at::get_num_threads() == 1) {
    for (int64_t index = 0; index < count; ++index) work(index);
    return;
  }
  at::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t from, int64_t to) {
    // Whether gradients are wanted is known to the calling thread alone: here nothing is recorded.
    at::AutoDispatchBelowADInplaceOrView below;
    const Undivided undivided;
    for (int64_t index = from; index < std::min(to, count); ++index) work(index);
  });
}

// x [R,I] -> [R,O], in products of `block` rows.
Tensor linear_by_blocks(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias, int64_t block) {
  const int64_t rows = x.size(0), outputs = weight.size(0);
  const Tensor input = padded(x, 0, blocks_of(rows, block) * block);
  Tensor out = at::empty({input.size(0), outputs}, x.options());
  const int64_t width = x.is_cpu() ? std::min(OUTPUTS, outputs) : outputs, across = blocks_of(outputs, width);
  const auto product = [&](int64_t index) {
    const int64_t row = index / across * block, column = index % across * width;
    const int64_t columns = std::min(width, outputs - column);
    Tensor part = out.narrow(0, row, block).narrow(1, column, columns);
    const Tensor from = input.narrow(0, row, block), matrix = weight.narrow(0, column, columns).t();
    if (bias) {
      at::addmm_out(part, bias->narrow(0, column, columns), from, matrix);
    } else {
      at::mm_out(part, from, matrix);
    }
  };
  const int64_t count = blocks_of(rows, block) * across;
  if (x.is_cpu()) {
    each_alone(count, product);
  } else {
    for (int64_t index = 0; index < count; ++index) product(index);
  }
  return out.narrow(0, 0, rows);
}

// sum [O,I] += left [O,R] right [R,I].
void add_product(Tensor &sum, const Tensor &left, const Tensor &right) {
  const auto add = [&](int64_t start, int64_t count) {
    Tensor part = sum.narrow(0, start, count);
    const Tensor from = left.narrow(0, start, count);
    if (sum.scalar_type() == right.scalar_type()) {
      part.addmm_(from, right);
    } else {
      part.add_(from.mm(right));
    }
  };
  const int64_t rows = sum.size(0);
  if (!sum.is_cpu()) return add(0, rows);
  each_alone(blocks_of(rows, OUTPUTS), [&](int64_t index) {
    const int64_t start = index * OUTPUTS;
    add(start, std::min(OUTPUTS, rows - start));
  });
}

// The gradient by `x` is blocked like the product itself, that by the weight by its rows.
struct Linear : Function<Linear> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias,
                        int64_t block) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    ctx->saved_data["block"] = block;
    return linear_by_blocks(x, weight, bias, block);
  }

  static variable_list backward(AutogradContext *ctx, variable_list gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor &gradient = gradients[0];
    Tensor by_bias;
    if (ctx->saved_data["bias"].toBool()) by_bias = gradient.sum(0);
    const Tensor by_x = linear_by_blocks(gradient, saved[1].t(), std::nullopt, ctx->saved_data["block"].toInt());
    Tensor by_weight;
    if (ctx->needs_input_grad(1)) {
      by_weight = at::zeros_like(saved[1]);
      add_product(by_weight, gradient.t(), saved[0]);
    }
    return {by_x, by_weight, by_bias, Tensor()};
  }
};

struct Shape {
  int64_t rows;    // query tokens of one product
  int64_t columns; // key tokens of one product
};

// Query blocks worked on at a time: few enough that seeing all key blocks up to the last one's end wastes little.
constexpr int64_t CHUNK = 16;

// Blocks of query tokens, q [B,K,G,N,Q,d] from positions `first` [B or 1] on, over key blocks k, v [B,K,M,C,d] -> the same
// shape as q. The parts of the softmax are added key block after key block, so that blocks behind a query's position add
// exactly nothing.
Tensor attend_blocks(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &first, double scale) {
  const int64_t batch = q.size(0), groups = q.size(1), share = q.size(2), blocks = q.size(3), rows = q.size(4);
  const int64_t size = q.size(5), key_blocks = k.size(2), columns = k.size(3);
  const int64_t all = batch * groups * blocks * key_blocks;
  const auto integers = first.options();
  const auto flat = [&](const Tensor &x, int64_t dim, int64_t count, int64_t height) {
    auto shape = x.unsqueeze(dim).sizes().vec();
    shape[dim] = count;
    return x.unsqueeze(dim).expand(shape).reshape({all, height, size});
  };
  const Tensor queries = flat(q.permute({0, 1, 3, 2, 4, 5}), 3, key_blocks, share * rows);
  const Tensor keys = flat(k, 2, blocks, columns), values = flat(v, 2, blocks, columns);
  Tensor scores =
      queries.bmm(keys.transpose(1, 2)).to(at::kFloat).view({batch, groups, blocks, key_blocks, share, rows, columns});
  const Tensor places = at::arange(key_blocks * columns, integers).view({key_blocks, 1, 1, columns});
  const Tensor last = first.view({-1, 1, 1, 1, 1, 1, 1}) + at::arange(blocks * rows, integers).view({blocks, 1, 1, rows, 1});
  scores.mul_(scale).masked_fill_(places.gt(last), -std::numeric_limits<double>::infinity());
  const Tensor weights = scores.sub_(scores.amax({3, 6}, true)).exp_();
  const Tensor sums = weights.sum(6, true);
  const Tensor parts = weights.to(v.scalar_type()).view({all, share * rows, columns}).bmm(values).to(at::kFloat)
                           .view({batch, groups, blocks, key_blocks, share, rows, size});
  Tensor attended = parts.select(3, 0).clone(), sum = sums.select(3, 0).clone();
  for (int64_t block = 1; block < key_blocks; ++block) {
    attended.add_(parts.select(3, block));
    sum.add_(sums.select(3, block));
  }
  return attended.div_(sum).to(q.scalar_type()).permute({0, 1, 3, 2, 4, 5});
}

// q [B,H,T,d], row b from position first[b] on, over k, v [B,K,S,d] from position 0 on -> [B,H,T,d].
Tensor attention_by_blocks(const Tensor &q, const Tensor &k, const Tensor &v, const Tensor &first, int64_t largest,
                           Shape shape) {
  const int64_t batch = q.size(0), heads = q.size(1), length = q.size(2), size = q.size(3), groups = k.size(1);
  const int64_t count = blocks_of(length, shape.rows), share = heads / groups;
  const double scale = 1.0 / std::sqrt(static_cast<double>(size));
  const Tensor queries = padded(q, 2, count * shape.rows).reshape({batch, groups, share, count, shape.rows, size});
  const int64_t key_blocks = blocks_of(k.size(2), shape.columns);
  const auto in_blocks = [&](const Tensor &x) {
    return padded(x, 2, key_blocks * shape.columns).unflatten(2, {key_blocks, shape.columns});
  };
  const Tensor keys = in_blocks(k), values = in_blocks(v);
  std::vector<Tensor> parts;
  for (int64_t block = 0; block < count; block += CHUNK) {
    const int64_t blocks = std::min(CHUNK, count - block), start = block * shape.rows;
    const int64_t end = largest + start + blocks * shape.rows;
    const int64_t seen = std::min(key_blocks, blocks_of(end, shape.columns));
    parts.push_back(attend_blocks(queries.narrow(3, block, blocks), keys.narrow(2, 0, seen), values.narrow(2, 0, seen),
                                  first + start, scale));
  }
  const Tensor out = parts.size() == 1 ? parts[0] : at::cat(parts, 3);
  return out.reshape({batch, groups, share, count * shape.rows, size}).narrow(3, 0, length).reshape({batch, heads, length, size});
}

// Causal, from position 0 on.
struct Attention : Function<Attention> {
  static Tensor forward(AutogradContext *ctx, const Tensor &q, const Tensor &k, const Tensor &v, int64_t rows,
                        int64_t columns) {
    ctx->save_for_backward({q, k, v});
    const Tensor first = at::zeros({1}, q.options().dtype(at::kLong));
    return attention_by_blocks(q, k, v, first, 0, {rows, columns});
  }

  static variable_list backward(AutogradContext *ctx, variable_list gradients) {
    variable_list inputs;
    for (const auto &saved : ctx->get_saved_variables()) inputs.push_back(saved.detach().requires_grad_());
    at::AutoGradMode with_gradient(true);
    leave_workers_alone();
    const Undivided undivided;
    const bool grouped = inputs[0].size(1) != inputs[1].size(1);
    const Tensor out = at::scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], std::nullopt, 0.0, true,
                                                        std::nullopt, grouped);
    auto by_inputs = torch::autograd::grad({out}, inputs, {gradients[0]});
    return {by_inputs[0], by_inputs[1], by_inputs[2], Tensor(), Tensor()};
  }
};

// libtorch's own treats the end of a thread's share, which no vector fills, with another exponential.
struct Silu : Function<Silu> {
  static Tensor forward(AutogradContext *ctx, const Tensor &x) {
    ctx->save_for_backward({x});
    const Tensor wide = x.to(at::kFloat);
    return wide.div(wide.neg().exp_().add_(1)).to(x.scalar_type());
  }

  static variable_list backward(AutogradContext *ctx, variable_list gradients) {
    const Tensor x = ctx->get_saved_variables()[0];
    const Tensor wide = x.to(at::kFloat);
    const Tensor sigmoid = wide.neg().exp_().add_(1).reciprocal_();
    const Tensor slope = sigmoid * (wide * (1 - sigmoid) + 1);
    return {(gradients[0].to(at::kFloat) * slope).to(x.scalar_type())};
  }
};

} // namespace

extern "C" const char *mempo_fixed_linear(Tensor **out, const Tensor *x, const Tensor *weight, const Tensor *bias,
                                          int64_t rows) {
  return guarded([&] {
    const Tensor flat = x->reshape({-1, x->size(-1)});
    auto shape = x->sizes().vec();
    shape.back() = weight->size(0);
    const auto some_bias = bias == nullptr ? std::nullopt : std::optional<Tensor>(*bias);
    *out = new Tensor(Linear::apply(flat, *weight, some_bias, rows).view(shape));
  });
}

extern "C" const char *mempo_fixed_add_product(Tensor *sum, const Tensor *left, const Tensor *right) {
  return guarded([&] { add_product(*sum, *left, *right); });
}

extern "C" const char *mempo_fixed_attention(Tensor **out, const Tensor *q, const Tensor *k, const Tensor *v,
                                             int64_t rows, int64_t columns) {
  return guarded([&] { *out = new Tensor(Attention::apply(*q, *k, *v, rows, columns)); });
}

extern "C" const char *mempo_fixed_attention_at(Tensor **out, const Tensor *q, const Tensor *k, const Tensor *v,
                                                const Tensor *first, int64_t largest, int64_t rows, int64_t columns) {
  return guarded([&] { *out = new Tensor(attention_by_blocks(*q, *k, *v, *first, largest, {rows, columns})); });
}

extern "C" const char *mempo_fixed_silu(Tensor **out, const Tensor *x) {
  return guarded([&] { *out = new Tensor(Silu::apply(*x)); });
}
