// What csrc/policy_loss.cpp and csrc/transition.cpp share on PyTorch's side of csrc/gaussian_kernels.h.
#pragma once

#include "gaussian_kernels.h"

#include <ATen/core/Tensor.h>

#include <functional>
#include <vector>

namespace star_kernels {

// The kernels of the instructions that this CPU has (cpu_level).
GaussianKernels gaussian_kernels();

// `latent`, or a contiguous copy of it where it is neither contiguous nor channels_last.
at::Tensor dense_latent(const at::Tensor& latent);
at::Tensor dense_latent(const std::optional<at::Tensor>& latent);

// Whether a tensor counts as channels_last: one that is both counts as contiguous.
bool is_channels_last(const at::Tensor& latent);

// The view of a dense latent, or of none where the tensor is undefined.
LatentView view_latent(const at::Tensor& latent);

LatentShape latent_shape(const at::Tensor& velocity);

// Errors that name the argument, for latents that are not [B, C, H, W] like the velocity, on the CPU, of a format above.
void check_latent(const char* name, const at::Tensor& latent, const at::Tensor& velocity);
void check_latent(const char* name, const std::optional<at::Tensor>& latent, const at::Tensor& velocity);

// Whether tensors of this size are not found in a cache when they are read again.
bool is_beyond_cache(const at::Tensor& latent);

// A floating tensor of `shape` as contiguous float32.
at::Tensor dense_floats(const char* name, const at::Tensor& tensor, at::IntArrayRef shape);

// [batch] numbers of any floating dtype.
std::vector<double> numbers(const char* name, const at::Tensor& tensor, int64_t batch);

std::vector<TransitionScalars> transition_scalars(const at::Tensor& sample_drift, const at::Tensor& velocity_scale,
                                                  const at::Tensor& std, const LatentShape& shape);

// Calls work(begin, end, scratch) on cuts of [0, count), where each of `count` is made of `blocks` blocks of `shape`.
void for_each_cut(const GaussianKernels& kernels, const LatentShape& shape, bool beyond_cache, int64_t count,
                  int64_t blocks, const std::function<void(int64_t begin, int64_t end, float* scratch)>& work);

}  // namespace star_kernels
