// The arguments of the policy loss, read and checked in C++. In Python the checks take longer than all the rest of the call where
// latents are small, and longer yet where they are large and have swept the interpreter's code and objects out of the caches.

#include "policy_loss_python.h"

#include "star_kernels.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace py = pybind11;

namespace star_kernels {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Reads arguments that are as they should be. After the first that is not, `plain` is false and what is read means nothing.
class Reader {
 public:
  bool require(bool condition) { return plain_ = plain_ && condition; }

  bool plain() const { return plain_; }

  at::Tensor tensor(py::handle value) {
    if (!require(THPVariable_CheckExact(value.ptr()))) return {};
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    require(tensor.device().is_cpu() && tensor.layout() == at::kStrided);
    return tensor;
  }

  at::Tensor floats(py::handle value, int64_t dimensions) {
    const at::Tensor read = tensor(value);
    if (!plain_) return {};
    const at::ScalarType type = read.scalar_type();
    require(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble);
    return require(read.dim() == dimensions) ? read : at::Tensor();
  }

  // A tensor that the kernel reads where it lies: it has no float64.
  at::Tensor latent(py::handle value) {
    const at::Tensor read = floats(value, 4);
    require(plain_ && read.numel() > 0 && read.scalar_type() != at::kDouble);
    return read;
  }

  at::Tensor latent_like(const at::Tensor& velocity, py::handle value) {
    const at::Tensor read = latent(value);
    require(plain_ && read.sizes() == velocity.sizes());
    return read;
  }

  std::optional<at::Tensor> optional_latent_like(const at::Tensor& velocity, py::handle value) {
    return value.is_none() ? std::nullopt : std::optional(latent_like(velocity, value));
  }

  // Numbers by sample, also out of one for all of them.
  at::Tensor row(const py::object& value, int64_t batch) {
    const at::Tensor read = floats(value, 1);
    if (!plain_ || read.size(0) == batch) return read;
    return require(read.size(0) == 1) ? read.expand({batch}) : at::Tensor();
  }

  // In [0, end).
  double number(py::handle value, double end) {
    if (!require(PyFloat_CheckExact(value.ptr()))) return 0.0;
    const double read = PyFloat_AS_DOUBLE(value.ptr());
    require(read >= 0.0 && read < end);
    return read;
  }

  std::array<double, 2> clip_range(py::handle value) {
    if (!PyTuple_CheckExact(value.ptr())) {
      const double bound = number(value, 1.0);
      return {bound, bound};
    }
    if (!require(PyTuple_GET_SIZE(value.ptr()) == 2)) return {};
    return {number(PyTuple_GET_ITEM(value.ptr(), 0), 1.0), number(PyTuple_GET_ITEM(value.ptr(), 1), 1.0)};
  }

  // The place of `value` among `names`.
  int64_t choice(py::handle value, std::initializer_list<const char*> names) {
    if (!require(PyUnicode_CheckExact(value.ptr()))) return 0;
    const auto found = std::find_if(names.begin(), names.end(), [value](const char* name) {
      return PyUnicode_CompareWithASCIIString(value.ptr(), name) == 0;
    });
    require(found != names.end());
    return found - names.begin();
  }

 private:
  bool plain_ = true;
};

py::object as_python(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

}  // namespace

py::object plain_policy_loss(py::handle velocity, py::handle sample, py::handle next_sample, py::handle old_log_prob,
                             py::handle advantage, py::handle coefficients, py::handle weights, py::handle mask,
                             py::handle objective, py::handle old_velocity, py::handle clip_range,
                             py::handle divergence_limit, py::handle granularity, py::handle reference_velocity,
                             py::handle kl_weight, py::handle kl_scale, py::handle unconditional_velocity,
                             py::handle guidance_scale) {
  Reader read;
  const at::Tensor v = read.latent(velocity);
  if (!read.plain()) return py::none();
  const int64_t batch = v.size(0), height = v.size(2), width = v.size(3);
  const at::Tensor x = read.latent_like(v, sample), next = read.latent_like(v, next_sample);
  const at::Tensor old = read.floats(old_log_prob, 3);
  read.require(read.plain() && old.sizes() == at::IntArrayRef({batch, height, width}));
  const at::Tensor advantages = read.floats(advantage, 1);
  read.require(read.plain() && advantages.size(0) == batch);
  const std::optional<at::Tensor> reference = read.optional_latent_like(v, reference_velocity),
                                  unconditional = read.optional_latent_like(v, unconditional_velocity),
                                  before = read.optional_latent_like(v, old_velocity);

  const py::object stochastic = coefficients.attr("stochastic");
  read.require(stochastic.ptr() == Py_True);
  const at::Tensor sample_drift = read.row(coefficients.attr("sample_drift"), batch),
                   velocity_scale = read.row(coefficients.attr("velocity_scale"), batch),
                   std = read.row(coefficients.attr("std"), batch);
  const py::object noise_rate = coefficients.attr("noise_rate");
  const at::Tensor rate = noise_rate.is_none() ? at::Tensor() : read.row(noise_rate, batch);
  const int64_t scale = read.choice(kl_scale, {"variance", "std_dev", "velocity"});
  read.require(scale != 1 || rate.defined());

  std::optional<at::Tensor> grid, valid;
  if (!weights.is_none()) {
    grid = read.floats(weights, 3);
    read.require(read.plain() && grid->numel() > 0 && grid->size(0) == batch && height % grid->size(1) == 0 &&
                 width % grid->size(2) == 0);
  }
  if (!mask.is_none()) {
    valid = read.tensor(mask);
    read.require(read.plain() && valid->scalar_type() == at::kBool && valid->sizes() == old.sizes());
  }

  const int64_t chosen = read.choice(objective, {"clip", "none", "guard", "dppo"});
  read.require(chosen < 2 || before.has_value());
  const double limit = divergence_limit.is_none() ? 0.0 : read.number(divergence_limit, kInfinity);
  read.require(chosen != 3 || !divergence_limit.is_none());
  const auto [clip_low, clip_high] = read.clip_range(clip_range);
  const bool per_image = read.choice(granularity, {"position", "image"}) == 1;
  const double beta = read.number(kl_weight, kInfinity), guidance = read.number(guidance_scale, kInfinity);
  read.require((beta == 0.0 || reference.has_value()) && (guidance == 1.0 || unconditional.has_value()));
  if (!read.plain()) return py::none();

  // Through the dispatcher, where autograd and profilers are.
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("star_kernels_cpu::policy_loss", "").typed<decltype(policy_loss)>();
  at::Tensor loss, metrics;
  std::vector<at::Tensor> values;
  {
    const py::gil_scoped_release no_gil;
    const bool with_gradient = at::GradMode::is_enabled() && v.requires_grad();
    const at::Tensor kl_std = scale == 0 ? std : scale == 1 ? rate : velocity_scale.abs().mul(std::sqrt(0.5));
    std::tie(loss, metrics, std::ignore) =
        op.call(v, x, next, old, advantages, sample_drift, velocity_scale, std, kl_std, grid, valid, reference, unconditional,
                before, clip_low, clip_high, chosen, limit, per_image, beta, guidance, with_gradient);
    at::AutoDispatchBelowADInplaceOrView guard;
    values = metrics.unbind();
  }
  py::tuple result(1 + values.size());
  result[0] = as_python(loss);
  for (size_t i = 0; i < values.size(); ++i) result[1 + i] = as_python(values[i]);
  return result;
}

}  // namespace star_kernels
