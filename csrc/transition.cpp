// One step of a sampler and the log-prob of a step on the CPU, docs/method.md, section 2.
//
// Floor of transition_step in fp32: velocity, sample and noise read once, the next sample written once, 16 bytes per latent
// element against some ten operations: bound by memory. transition_log_prob: three reads, 12 bytes. The design is therefore
// one pass over all of them, channel by channel, in long rows where they come from memory, with the sums of squares of a piece
// of positions in cache; nothing of the latent's size exists beside the arguments and the result.
//
// The next sample is rounded to its dtype before its deviation is taken: the log-prob is that of what is stored.

#include "gaussian.h"
#include "star_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

namespace star_kernels {
namespace {

void run(const TransitionProblem& problem) {
  const GaussianKernels kernels = gaussian_kernels();
  const LatentShape& shape = problem.inputs.shape;
  for_each_cut(kernels, shape, problem.inputs.beyond_cache, shape.batch * shape.blocks(), 1,
               [&](int64_t begin, int64_t end, float* scratch) { kernels.transition(problem, begin, end, scratch); });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> transition_step(const at::Tensor& velocity, const at::Tensor& sample,
                                                   const std::optional<at::Tensor>& noise,
                                                   const std::optional<at::Tensor>& unconditional_velocity,
                                                   const at::Tensor& sample_drift, const at::Tensor& velocity_scale,
                                                   const at::Tensor& std, double guidance_scale) {
  const LatentShape shape = latent_shape(velocity);
  check_latent("velocity", velocity, velocity);
  check_latent("sample", sample, velocity);
  check_latent("noise", noise, velocity);
  check_latent("unconditional_velocity", unconditional_velocity, velocity);
  const at::Tensor v = dense_latent(velocity), x = dense_latent(sample), epsilon = dense_latent(noise),
                   u = dense_latent(unconditional_velocity);
  const std::vector<TransitionScalars> scalars = transition_scalars(sample_drift, velocity_scale, std, shape);
  const at::Tensor next_sample = at::empty(sample.sizes(), sample.options(), at::MemoryFormat::Contiguous);
  const at::Tensor log_prob = noise.has_value() ? at::empty({shape.batch, shape.height, shape.width}, at::kFloat)
                                                : at::empty({0}, at::kFloat);
  run({{shape, view_latent(v), view_latent(u), view_latent(x), view_latent(next_sample), static_cast<float>(guidance_scale),
        scalars.data(), is_beyond_cache(v)},
       view_latent(epsilon),
       true,
       noise.has_value() ? log_prob.mutable_data_ptr<float>() : nullptr});
  return {next_sample, log_prob};
}

at::Tensor transition_log_prob(const at::Tensor& velocity, const at::Tensor& sample, const at::Tensor& next_sample,
                               const std::optional<at::Tensor>& unconditional_velocity, const at::Tensor& sample_drift,
                               const at::Tensor& velocity_scale, const at::Tensor& std, double guidance_scale) {
  const LatentShape shape = latent_shape(velocity);
  check_latent("velocity", velocity, velocity);
  check_latent("sample", sample, velocity);
  check_latent("next_sample", next_sample, velocity);
  check_latent("unconditional_velocity", unconditional_velocity, velocity);
  const at::Tensor v = dense_latent(velocity), x = dense_latent(sample), next = dense_latent(next_sample),
                   u = dense_latent(unconditional_velocity);
  const std::vector<TransitionScalars> scalars = transition_scalars(sample_drift, velocity_scale, std, shape);
  const at::Tensor log_prob = at::empty({shape.batch, shape.height, shape.width}, at::kFloat);
  run({{shape, view_latent(v), view_latent(u), view_latent(x), view_latent(next), static_cast<float>(guidance_scale),
        scalars.data(), is_beyond_cache(v)},
       {},
       false,
       log_prob.mutable_data_ptr<float>()});
  return log_prob;
}

}  // namespace star_kernels
