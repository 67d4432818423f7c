// What the sources of star_kernels._C offer each other: one function per operator, and what this CPU can do.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>

namespace star_kernels {

enum class Combine { mean, max };

// Mass to allocation map, docs/method.md, section 4. See allocation_map.cpp.
at::Tensor allocation_map(const at::Tensor& mass, const std::optional<at::Tensor>& mask, int64_t height, int64_t width,
                          Combine combine, double sharpness, bool smooth, double strength,
                          std::optional<std::array<double, 2>> clamp);

// Attention (tokens outside heads in memory), the mass of this layer (empty without unit weights) and log-sum-exp,
// docs/method.md, section 3. See attention.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> joint_attention(const at::Tensor& query, const at::Tensor& key,
                                                               const at::Tensor& value,
                                                               const std::optional<at::Tensor>& unit_weights,
                                                               int64_t num_image_tokens, bool text_first, double scale,
                                                               int64_t first_row, int64_t end_row, bool text_to_image,
                                                               const std::optional<at::Tensor>& text_lengths);

// The mass from log-sum-exps: of image queries and text keys, or of text queries and image keys. See attention_mass.cpp.
at::Tensor attention_mass(const at::Tensor& query, const at::Tensor& key, const at::Tensor& unit_weights,
                          const at::Tensor& log_sum_exp, double scale, const std::optional<at::Tensor>& text_lengths,
                          bool text_to_image);

// One step of a sampler, docs/method.md, section 2: the next sample in the sample's dtype, and its log-prob [B, H, W] or,
// without noise, an empty tensor. See transition.cpp.
std::tuple<at::Tensor, at::Tensor> transition_step(const at::Tensor& velocity, const at::Tensor& sample,
                                                   const std::optional<at::Tensor>& noise,
                                                   const std::optional<at::Tensor>& unconditional_velocity,
                                                   const at::Tensor& sample_drift, const at::Tensor& velocity_scale,
                                                   const at::Tensor& std, double guidance_scale);

// The log-prob [B, H, W] of a given next sample.
at::Tensor transition_log_prob(const at::Tensor& velocity, const at::Tensor& sample, const at::Tensor& next_sample,
                               const std::optional<at::Tensor>& unconditional_velocity, const at::Tensor& sample_drift,
                               const at::Tensor& velocity_scale, const at::Tensor& std, double guidance_scale);

// The objectives of docs/method.md, section 5, numbered as in star_kernels/policy_loss/reference.py.
enum class PolicyLossObjective : int64_t { clip, none, guard, dppo };

// Loss [], metrics [9] and, if asked for, the gradient with respect to the velocity, in its dtype (float32 for float16),
// channels_last where the velocity is and only that, else contiguous; without it an empty tensor. See policy_loss.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> policy_loss(
    const at::Tensor& velocity, const at::Tensor& sample, const at::Tensor& next_sample, const at::Tensor& old_log_prob,
    const at::Tensor& advantage, const at::Tensor& sample_drift, const at::Tensor& velocity_scale, const at::Tensor& std,
    const at::Tensor& kl_std, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference_velocity, const std::optional<at::Tensor>& unconditional_velocity,
    const std::optional<at::Tensor>& old_velocity, double clip_low, double clip_high, int64_t objective,
    double divergence_limit, bool per_image, double kl_weight, double guidance_scale, bool with_gradient);

struct CpuCapability {
  bool avx2 = false;         // with fused multiply-add and conversion from and to fp16
  bool avx512 = false;       // F, BW, DQ and VL, and all of avx2
  bool avx512_bf16 = false;  // dot products of bf16 pairs
  bool amx = false;          // tiles with bf16 products; a process still has to ask the kernel for the tile state
};

CpuCapability cpu_capability();

// The instructions that a kernel may use, each level with those before it.
enum class CpuLevel { generic, avx2, avx512, avx512_bf16 };

// The fastest level that this CPU has, which on Intel's is at most avx512; or the highest up to the one that
// STAR_KERNELS_CPU_CAPABILITY names (default, avx2, avx512 or avx512_bf16). Reads the environment at every call, so that
// tests can change it.
CpuLevel cpu_level();

}  // namespace star_kernels
