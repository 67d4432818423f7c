// PyTorch's side of the Gaussian kernels: checks, views, and the choice of the instruction set.

#include "gaussian.h"
#include "star_kernels.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

namespace star_kernels {
namespace {

// Blocks that make a second thread worth waking.
constexpr int64_t kBlocksPerThread = 2;

// Bytes of one latent above which an operator's three or four do not fit the last cache of common CPUs.
constexpr size_t kCachedBytes = 4 << 20;

bool is_latent_type(at::ScalarType type) { return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf; }

}  // namespace

GaussianKernels gaussian_kernels() {
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::avx512) return gaussian_avx512();
  return level == CpuLevel::avx2 ? gaussian_avx2() : gaussian_default();
}

bool is_channels_last(const at::Tensor& latent) {
  return !latent.is_contiguous() && latent.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor dense_latent(const at::Tensor& latent) { return is_channels_last(latent) ? latent : latent.contiguous(); }

at::Tensor dense_latent(const std::optional<at::Tensor>& latent) {
  return latent.has_value() ? dense_latent(*latent) : at::Tensor();
}

LatentView view_latent(const at::Tensor& latent) {
  if (!latent.defined()) return {};
  const at::ScalarType type = latent.scalar_type();
  const Format format = type == at::kFloat ? Format::float32 : type == at::kHalf ? Format::float16 : Format::bfloat16;
  return {latent.data_ptr(), format, is_channels_last(latent)};
}

bool is_beyond_cache(const at::Tensor& latent) { return latent.nbytes() > kCachedBytes; }

LatentShape latent_shape(const at::Tensor& velocity) {
  TORCH_CHECK_VALUE(velocity.dim() == 4 && velocity.numel() > 0,
                    "velocity: expected shape [B, C, H, W] without zero sizes, got ", velocity.sizes());
  return {velocity.size(0), velocity.size(1), velocity.size(2), velocity.size(3)};
}

void check_latent(const char* name, const at::Tensor& latent, const at::Tensor& velocity) {
  TORCH_CHECK_VALUE(latent.sizes() == velocity.sizes(), name, ": expected shape ", velocity.sizes(), ", got ", latent.sizes());
  TORCH_CHECK_VALUE(latent.device().is_cpu(), name, ": expected a tensor on the CPU, got one on ", latent.device());
  TORCH_CHECK_TYPE(is_latent_type(latent.scalar_type()), name, ": expected dtype float32, bfloat16 or float16, got ",
                   latent.scalar_type());
}

void check_latent(const char* name, const std::optional<at::Tensor>& latent, const at::Tensor& velocity) {
  if (latent.has_value()) check_latent(name, *latent, velocity);
}

at::Tensor dense_floats(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, name, ": expected shape ", shape, ", got ", tensor.sizes());
  return tensor.to(at::kFloat).contiguous();
}

std::vector<double> numbers(const char* name, const at::Tensor& tensor, int64_t batch) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == batch, name, ": expected shape [", batch, "], got ", tensor.sizes());
  const at::Tensor floats = tensor.scalar_type() == at::kDouble ? tensor : tensor.to(at::kFloat);
  const int64_t stride = floats.stride(0);
  std::vector<double> values(batch);
  if (floats.scalar_type() == at::kDouble) {
    // Rounded like a conversion of the tensor, so that the result does not depend on who converts.
    for (int64_t b = 0; b < batch; ++b) values[b] = static_cast<float>(floats.const_data_ptr<double>()[b * stride]);
  } else {
    for (int64_t b = 0; b < batch; ++b) values[b] = floats.const_data_ptr<float>()[b * stride];
  }
  return values;
}

std::vector<TransitionScalars> transition_scalars(const at::Tensor& sample_drift, const at::Tensor& velocity_scale,
                                                  const at::Tensor& std, const LatentShape& shape) {
  const std::vector<double> drifts = numbers("sample_drift", sample_drift, shape.batch),
                            scales = numbers("velocity_scale", velocity_scale, shape.batch),
                            stds = numbers("std", std, shape.batch);
  constexpr double kHalfLogTwoPi = 0.91893853320467274178;
  std::vector<TransitionScalars> scalars;
  scalars.reserve(shape.batch);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const double s = stds[b];
    scalars.push_back({static_cast<float>(drifts[b]), static_cast<float>(scales[b]), static_cast<float>(s),
                       static_cast<float>(-1.0 / (2.0 * s * s * static_cast<double>(shape.channels))),
                       static_cast<float>(-std::log(s) - kHalfLogTwoPi)});
  }
  return scalars;
}

void for_each_cut(const GaussianKernels& kernels, const LatentShape& shape, bool beyond_cache, int64_t count,
                  int64_t blocks, const std::function<void(int64_t begin, int64_t end, float* scratch)>& work) {
  const int64_t grain = std::max<int64_t>(1, kBlocksPerThread / blocks);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const at::Tensor scratch = at::empty({kernels.scratch_floats(shape, beyond_cache)}, at::kFloat);
    work(begin, end, scratch.mutable_data_ptr<float>());
  });
}

}  // namespace star_kernels
