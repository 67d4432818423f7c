// The policy loss on the CPU as autograd sees it: the gradient is made with the loss, and backward hands it on.
//
// In C++ because the kernel takes little more than 0.1 ms at [9, 16, 64, 64], and Python would add a third of that: PyTorch's
// classes for autograd functions in Python, and code and objects that the latents have swept out of the caches.

#include "star_kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <utility>

namespace star_kernels {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Entries of a gradient that are scaled at a time.
constexpr int64_t kPiece = 1 << 16;

// The identity, with an error for whoever differentiates it.
struct Undifferentiable : torch::autograd::Function<Undifferentiable> {
  static at::Tensor forward(AutogradContext*, const at::Tensor& gradient) { return gradient.view_as(gradient); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "policy_loss: second derivatives are not implemented, its gradient cannot be differentiated "
                                "with respect to the velocity");
  }
};

// Whether a tensor stands for a batch of tensors or for what a subclass makes of it.
bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  return !tensor.key_set().has_any(
      c10::DispatchKeySet({DispatchKey::Batched, DispatchKey::FuncTorchBatched, DispatchKey::Python}));
}

at::Tensor in_order_of_memory(const at::Tensor& dense) { return dense.as_strided({dense.numel()}, {1}); }

// `saved` times `scale` without a tensor of the latents' size beside it and the result. Unless the graph is kept for another
// backward, nothing reads `saved` after this one: it can be scaled in place and handed on.
at::Tensor scaled(const at::Tensor& saved, double scale, at::ScalarType dtype, bool is_ours) {
  if (is_ours) return (scale == 1.0 ? saved : saved.mul_(scale)).to(dtype);
  const at::Tensor result = at::empty_like(saved, saved.options().dtype(dtype));
  const at::Tensor from = in_order_of_memory(saved), to = in_order_of_memory(result);
  for (int64_t first = 0; first < from.numel(); first += kPiece) {
    const int64_t count = std::min(kPiece, from.numel() - first);
    // Piece by piece: for a result of another dtype PyTorch makes a product in the first one.
    to.narrow(0, first, count).copy_(from.narrow(0, first, count).mul(scale));
  }
  return result;
}

struct PolicyLossAndGradient : torch::autograd::Function<PolicyLossAndGradient> {
  using Compute = std::function<std::tuple<at::Tensor, at::Tensor>()>;

  static variable_list forward(AutogradContext* context, const at::Tensor& velocity, const Compute& compute) {
    // The gradient is a differentiable output: it leads back to the velocity, which a second derivative runs into.
    const auto [loss, gradient] = compute();
    context->set_materialize_grads(false);
    context->save_for_backward({gradient});
    context->saved_data["dtype"] = velocity.scalar_type();
    return {loss, gradient};
  }

  static variable_list backward(AutogradContext* context, const variable_list& gradients) {
    const at::Tensor& grad_loss = gradients[0];
    if (!grad_loss.defined() || !context->needs_input_grad(0)) return {at::Tensor(), at::Tensor()};
    at::Tensor saved = context->get_saved_variables()[0];
    const at::ScalarType dtype = context->saved_data["dtype"].toScalarType();
    if (at::GradMode::is_enabled()) {
      saved = Undifferentiable::apply(saved);
    } else if (is_plain(saved) && is_plain(grad_loss)) {
      const bool is_ours = !torch::autograd::get_current_graph_task_keep_graph();
      return {scaled(saved.detach(), grad_loss.item<double>(), dtype, is_ours), at::Tensor()};
    }
    // With the scale in its own dtype: as a tensor without dimensions it would be rounded to that of the gradient.
    return {grad_loss.mul(saved.to(grad_loss.scalar_type())).to(dtype), at::Tensor()};
  }
};

// The operator under autograd: whatever arguments star_kernels.h lists after the velocity are handed on.
template <typename Operator>
struct WithAutograd;

template <typename... Rest>
struct WithAutograd<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&, Rest...)> {
  static std::tuple<at::Tensor, at::Tensor, at::Tensor> call(const at::Tensor& velocity, Rest... rest) {
    // Past autograd: compiled autograd takes no function that marks an output as not differentiable.
    at::Tensor metrics;
    const variable_list output = PolicyLossAndGradient::apply(velocity, PolicyLossAndGradient::Compute([&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      auto [loss, measured, gradient] = policy_loss(velocity, rest...);
      metrics = std::move(measured);
      return std::make_tuple(std::move(loss), std::move(gradient));
    }));
    return {output[0], metrics, output[1]};
  }
};

}  // namespace
}  // namespace star_kernels

TORCH_LIBRARY_IMPL(star_kernels_cpu, AutogradCPU, m) {
  m.impl("policy_loss", star_kernels::WithAutograd<decltype(star_kernels::policy_loss)>::call);
}
