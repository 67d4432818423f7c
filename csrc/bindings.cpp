// star_kernels._C: TORCH_LIBRARY for the operators, pybind11 for what is no operator.

#include "policy_loss_python.h"
#include "star_kernels.h"

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <c10/util/Exception.h>

#include <string>
#include <vector>

#ifndef STAR_KERNELS_FLAGS
#define STAR_KERNELS_FLAGS ""
#endif

namespace py = pybind11;

namespace {

at::Tensor allocation_map(const at::Tensor& mass, const std::optional<at::Tensor>& mask, int64_t height, int64_t width,
                          const std::string& combine, double sharpness, bool smooth, double strength,
                          const std::optional<std::vector<double>>& clamp) {
  TORCH_CHECK_VALUE(combine == "mean" || combine == "max", "combine: expected one of mean, max, got '", combine, "'");
  std::optional<std::array<double, 2>> range;
  if (clamp.has_value()) {
    TORCH_CHECK_VALUE(clamp->size() == 2 && (*clamp)[0] <= (*clamp)[1], "clamp: expected (w_min, w_max)");
    range = {(*clamp)[0], (*clamp)[1]};
  }
  return star_kernels::allocation_map(mass, mask, height, width,
                                      combine == "max" ? star_kernels::Combine::max : star_kernels::Combine::mean, sharpness,
                                      smooth, strength, range);
}

py::dict cpu_capability() {
  const star_kernels::CpuCapability capability = star_kernels::cpu_capability();
  py::dict result;
  result["avx2"] = capability.avx2;
  result["avx512"] = capability.avx512;
  result["avx512_bf16"] = capability.avx512_bf16;
  result["amx"] = capability.amx;
  return result;
}

std::string cpu_level() {
  switch (star_kernels::cpu_level()) {
    case star_kernels::CpuLevel::generic: return "default";
    case star_kernels::CpuLevel::avx2: return "avx2";
    case star_kernels::CpuLevel::avx512: return "avx512";
    case star_kernels::CpuLevel::avx512_bf16: return "avx512_bf16";
  }
  TORCH_INTERNAL_ASSERT(false);
}

// What star_kernels/backends.py expects of an extension; both are raised where one cannot do with the other's old one.
constexpr int64_t kInterface = 6;

// star_kernels/backends.py looks for it in the file before it loads it: under another PyTorch that could crash.
[[gnu::used]] constexpr char kBuiltWith[] = "star_kernels._C was built with torch " TORCH_VERSION;

py::dict build_info() {
  py::dict result;
#if defined(__clang__)
  result["compiler"] = std::string("clang ") + __clang_version__;
#else
  result["compiler"] = std::string("gcc ") + __VERSION__;
#endif
  result["flags"] = STAR_KERNELS_FLAGS;
  result["cpp_standard"] = static_cast<int64_t>(__cplusplus);
  result["torch_version"] = TORCH_VERSION;
  result["interface"] = kInterface;
#if defined(_OPENMP)
  result["openmp"] = true;
#else
  result["openmp"] = false;
#endif
  return result;
}

}  // namespace

TORCH_LIBRARY(star_kernels_cpu, m) {
  m.def(
      "allocation_map(Tensor mass, Tensor? mask, int height, int width, str combine, float sharpness, bool smooth, "
      "float strength, float[]? clamp) -> Tensor");
  m.def(
      "joint_attention(Tensor query, Tensor key, Tensor value, Tensor? unit_weights, int num_image_tokens, bool text_first, "
      "float scale, int first_row, int end_row, bool text_to_image, Tensor? text_lengths) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_mass(Tensor query, Tensor key, Tensor unit_weights, Tensor log_sum_exp, float scale, Tensor? text_lengths, "
      "bool text_to_image) -> Tensor");
  m.def(
      "transition_step(Tensor velocity, Tensor sample, Tensor? noise, Tensor? unconditional_velocity, Tensor sample_drift, "
      "Tensor velocity_scale, Tensor std, float guidance_scale) -> (Tensor, Tensor)");
  m.def(
      "transition_log_prob(Tensor velocity, Tensor sample, Tensor next_sample, Tensor? unconditional_velocity, "
      "Tensor sample_drift, Tensor velocity_scale, Tensor std, float guidance_scale) -> Tensor");
  m.def(
      "policy_loss(Tensor velocity, Tensor sample, Tensor next_sample, Tensor old_log_prob, Tensor advantage, "
      "Tensor sample_drift, Tensor velocity_scale, Tensor std, Tensor kl_std, Tensor? weights, Tensor? mask, "
      "Tensor? reference_velocity, Tensor? unconditional_velocity, Tensor? old_velocity, float clip_low, float clip_high, "
      "int objective, float divergence_limit, bool per_image, float kl_weight, float guidance_scale, bool with_gradient) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(star_kernels_cpu, CPU, m) {
  m.impl("allocation_map", allocation_map);
  m.impl("joint_attention", star_kernels::joint_attention);
  m.impl("attention_mass", star_kernels::attention_mass);
  m.impl("transition_step", star_kernels::transition_step);
  m.impl("transition_log_prob", star_kernels::transition_log_prob);
  m.impl("policy_loss", star_kernels::policy_loss);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "C++ kernels of star_kernels for the CPU. Importing it registers torch.ops.star_kernels_cpu.";
  m.def("cpu_capability", &cpu_capability, "Instruction sets by name (avx2, avx512, avx512_bf16, amx) and whether this CPU has them.");
  m.def("cpu_level", &cpu_level,
        "The instructions that kernels use here: the most this CPU has, or less by STAR_KERNELS_CPU_CAPABILITY.");
  m.def("plain_policy_loss", &star_kernels::plain_policy_loss,
        "The policy loss and its metrics as a tuple, or None for arguments that need a conversion or an error.");
  m.def("build_info", &build_info, "Compiler, flags, C++ standard, PyTorch version and whether OpenMP was on at build time.");
}
