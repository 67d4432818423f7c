// The spatially resolved objectives and their gradient on the CPU, docs/method.md, section 5.
//
// Floor in fp32: velocity, sample and next sample read once and the gradient written once, 16 bytes per latent element,
// against some ten operations per element and sixty per position (one exponential): bound by memory, by the third-level cache
// at [9, 16, 64, 64] (9.4 MB) and by DRAM at [64, 16, 64, 64] (67 MB). Old log-probs, weights and mask are 1/C of that.
//
// A piece of a sample is read channel by channel. Its deviations x' - mu stay in cache, where the gradient finds them once the
// ratios are known; it is written while the next piece is measured into their place, because memory reads and writes at a time.
// What is in a cache is worked on two tiles at a time, whose deviations stay in the first level. What comes from memory is
// worked on in pieces of up to four blocks, whose deviations fill half of a common second level, because memory is read fastest
// in long rows (docs/results.md). Waiting for the next piece needs floats, every position of the piece and no KL. Nothing of
// size [B, C, H, W] exists beside arguments and gradient. Sums of a block of tiles are added up in the order of blocks and samples,
// in double: bits depend neither on the threads nor, for a sample's gradient, on its batch. At image granularity the ratio
// needs all positions of a sample first: one thread makes both passes over it, the second of them from the second-level cache.

#include "gaussian.h"
#include "star_kernels.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace star_kernels {
namespace {

// Adds `more` to `sums`; the extremes start from infinity.
void add(PolicyLossSums& sums, const PolicyLossSums& more) {
  sums.policy += more.policy;
  sums.kl += more.kl;
  sums.divergence += more.divergence;
  sums.ratio += more.ratio;
  sums.squared_log_ratio += more.squared_log_ratio;
  sums.log_ratio += more.log_ratio;
  sums.squared_weight += more.squared_weight;
  sums.ratio_min = std::min(sums.ratio_min, more.ratio_min);
  sums.ratio_max = std::max(sums.ratio_max, more.ratio_max);
  sums.counted += more.counted;
  sums.clipped += more.clipped;
  sums.negative_weight |= more.negative_weight;
}

PolicyLossSums no_sums() {
  PolicyLossSums sums;
  sums.ratio_min = std::numeric_limits<double>::infinity();
  sums.ratio_max = -sums.ratio_min;
  return sums;
}

PolicyLossSums total(const PolicyLossSums* parts, int64_t count) {
  return std::accumulate(parts, parts + count, no_sums(), [](PolicyLossSums sums, const PolicyLossSums& part) {
    add(sums, part);
    return sums;
  });
}

// Whether an image can be judged: in float32, in which the other backends add up.
bool is_finite_image(const PolicyLossSums& sums) {
  return std::isfinite(static_cast<float>(sums.log_ratio)) && std::isfinite(static_cast<float>(sums.squared_weight));
}

// Turns the sums over a sample's positions into those of its image, whose ratio is that of the weighted mean of log-ratios, and
// returns the pull of a position of weight 1: -A ratio where the unclipped branch is active. The clip range grows with the root
// of the mean squared weight, as the spread of a weighted mean does.
float judge_image(PolicyLossSums& sums, double advantage, double divisor, double clip_low, double clip_high,
                  const PolicyLossProblem& problem) {
  if (sums.counted == 0) return 0.0f;
  const double limit = kLogRatioLimit, log_ratio = sums.log_ratio / divisor;
  const double clamped = std::clamp(log_ratio, -limit, limit), ratio = std::exp(clamped);
  const double spread = std::sqrt(sums.squared_weight / static_cast<double>(sums.counted));
  // In single precision, in which the other backends hold the bounds.
  const double low = static_cast<float>(1.0 - clip_low * spread), high = static_cast<float>(1.0 + clip_high * spread);
  const double unclipped = -advantage * ratio, clipped = -advantage * std::clamp(ratio, low, high);
  const bool outward = (ratio > 1.0 && advantage > 0.0) || (ratio < 1.0 && advantage < 0.0);
  const bool dropped = problem.drops && outward && sums.divergence / divisor >= problem.divergence_limit;
  sums.policy = dropped ? 0.0 : std::max(unclipped, clipped);
  sums.ratio = sums.ratio_min = sums.ratio_max = ratio;
  sums.squared_log_ratio = clamped * clamped;
  sums.clipped = dropped || ratio < low || ratio > high;
  sums.counted = 1;
  const bool active = !dropped && unclipped >= clipped && std::abs(log_ratio) <= limit;
  return active ? static_cast<float>(unclipped) : 0.0f;
}

void refuse_weights(const at::Tensor& weights) {
  const float* data = weights.const_data_ptr<float>();
  const float least = std::accumulate(data, data + weights.numel(), 0.0f, [](float a, float b) { return std::min(a, b); });
  TORCH_CHECK_VALUE(false, "weights: expected numbers of at least 0, got ", least);
}

// Valid positions of each sample.
std::vector<int64_t> valid_positions(const uint8_t* mask, const LatentShape& shape) {
  std::vector<int64_t> valid(shape.batch, shape.positions());
  if (mask == nullptr) return valid;
  for (int64_t& count : valid) {
    count -= std::count(mask, mask + shape.positions(), uint8_t{0});
    mask += shape.positions();
  }
  return valid;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> policy_loss(
    const at::Tensor& velocity, const at::Tensor& sample, const at::Tensor& next_sample, const at::Tensor& old_log_prob,
    const at::Tensor& advantage, const at::Tensor& sample_drift, const at::Tensor& velocity_scale, const at::Tensor& std,
    const at::Tensor& kl_std, const std::optional<at::Tensor>& weights, const std::optional<at::Tensor>& mask,
    const std::optional<at::Tensor>& reference_velocity, const std::optional<at::Tensor>& unconditional_velocity,
    const std::optional<at::Tensor>& old_velocity, double clip_low, double clip_high, int64_t objective,
    double divergence_limit, bool per_image, double kl_weight, double guidance_scale, bool with_gradient) {
  const LatentShape shape = latent_shape(velocity);
  check_latent("velocity", velocity, velocity);
  check_latent("sample", sample, velocity);
  check_latent("next_sample", next_sample, velocity);
  check_latent("reference_velocity", reference_velocity, velocity);
  check_latent("unconditional_velocity", unconditional_velocity, velocity);
  check_latent("old_velocity", old_velocity, velocity);
  TORCH_CHECK_VALUE(objective >= 0 && objective <= 3, "objective: expected a number from 0 to 3, got ", objective);
  const auto chosen = static_cast<PolicyLossObjective>(objective);
  const bool guards = chosen == PolicyLossObjective::guard, drops = chosen == PolicyLossObjective::dppo;
  TORCH_CHECK_VALUE(old_velocity.has_value() || !(guards || drops), "old_velocity: expected a tensor because objective is ",
                    objective, ", got None");
  // Without a clip the range holds every ratio, also times the root of a mean squared weight that is very small.
  if (drops || chosen == PolicyLossObjective::none) clip_low = clip_high = 1e30;
  const at::Tensor v = dense_latent(velocity), x = dense_latent(sample), next = dense_latent(next_sample),
                   reference = dense_latent(reference_velocity), u = dense_latent(unconditional_velocity),
                   before = dense_latent(old_velocity);
  const at::Tensor old = dense_floats("old_log_prob", old_log_prob, {shape.batch, shape.height, shape.width});
  at::Tensor grid, valid_mask;
  if (weights.has_value()) {
    TORCH_CHECK_VALUE(weights->dim() == 3 && weights->numel() > 0 && shape.height % weights->size(1) == 0 &&
                          shape.width % weights->size(2) == 0,
                      "weights: expected a grid [", shape.batch, ", h, w] that divides the latent's, got ", weights->sizes());
    grid = dense_floats("weights", *weights, {shape.batch, weights->size(1), weights->size(2)});
  }
  if (mask.has_value()) {
    TORCH_CHECK_VALUE(mask->sizes() == old.sizes() && mask->scalar_type() == at::kBool, "mask: expected a bool tensor ",
                      old.sizes(), ", got ", mask->scalar_type(), " with shape ", mask->sizes());
    // Bytes, because those of a bool tensor that was viewed as one need not be 0 and 1.
    valid_mask = mask->contiguous().view(at::kByte);
  }
  const uint8_t* mask_data = mask.has_value() ? valid_mask.const_data_ptr<uint8_t>() : nullptr;

  const std::vector<TransitionScalars> transitions = transition_scalars(sample_drift, velocity_scale, std, shape);
  const std::vector<double> advantages = numbers("advantage", advantage, shape.batch),
                            kl_stds = numbers("kl_std", kl_std, shape.batch);
  const std::vector<int64_t> valid = valid_positions(mask_data, shape);
  // A sample without valid positions has only zero terms; 1 keeps them from becoming 0/0.
  std::vector<double> divisors(shape.batch);
  std::transform(valid.begin(), valid.end(), divisors.begin(), [](int64_t count) { return std::max(1.0, double(count)); });
  const double channels = static_cast<double>(shape.channels), batch = static_cast<double>(shape.batch);
  std::vector<PolicyLossScalars> scalars;
  scalars.reserve(shape.batch);
  for (int64_t b = 0; b < shape.batch; ++b) {
    const double s = transitions[b].std, scale = transitions[b].velocity_scale, k = kl_stds[b];
    const double mean_gradient = guidance_scale * scale / (batch * channels * divisors[b]);
    scalars.push_back({static_cast<float>(advantages[b]), static_cast<float>(1.0 / (2.0 * channels * k * k)),
                       static_cast<float>(1.0 / (2.0 * channels * s * s)), static_cast<float>(1.0 / (channels * s)),
                       static_cast<float>(mean_gradient / (guards ? s : s * s)),
                       reference.defined() ? static_cast<float>(mean_gradient * kl_weight / (k * k)) : 0.0f});
  }

  // float16 cannot hold the gradient of one of many positions before a loss scale is applied, in backward.
  const at::ScalarType type = velocity.scalar_type() == at::kHalf ? at::kFloat : velocity.scalar_type();
  // Laid out like the velocity: autograd copies the gradient of a leaf that is not.
  const auto format = is_channels_last(velocity) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const at::Tensor gradient = with_gradient ? at::empty(velocity.sizes(), velocity.options().dtype(type), format)
                                            : at::empty({0}, at::kFloat);

  std::vector<PolicyLossSums> sums(shape.batch * shape.blocks());
  PolicyLossProblem problem{{shape, view_latent(v), view_latent(u), view_latent(x), view_latent(next),
                             static_cast<float>(guidance_scale), transitions.data(), is_beyond_cache(v)},
                            view_latent(reference),
                            view_latent(before),
                            with_gradient ? view_latent(gradient) : LatentView{},
                            scalars.data(),
                            old.const_data_ptr<float>(),
                            grid.defined() ? grid.const_data_ptr<float>() : nullptr,
                            grid.defined() ? grid.size(1) : 1,
                            grid.defined() ? grid.size(2) : 1,
                            mask_data,
                            guards,
                            drops,
                            static_cast<float>(1.0 - clip_low),
                            static_cast<float>(1.0 + clip_high),
                            static_cast<float>(divergence_limit),
                            sums.data()};
  const GaussianKernels kernels = gaussian_kernels();
  const bool beyond_cache = problem.inputs.beyond_cache;
  const int64_t blocks = shape.blocks();
  std::vector<PolicyLossSums> by_sample(shape.batch);
  std::vector<int64_t> left_out(shape.batch);
  const auto add_blocks = [&](int64_t b) {
    by_sample[b] = total(&sums[b * blocks], blocks);
    left_out[b] = valid[b] - by_sample[b].counted;
  };
  const auto leave_out = [&](int64_t b) {
    const bool negative_weight = by_sample[b].negative_weight;
    by_sample[b] = no_sums();
    by_sample[b].negative_weight = negative_weight;
    left_out[b] = valid[b];
    // The second pass then counts none of its positions either.
    scalars[b].advantage = std::numeric_limits<float>::quiet_NaN();
  };
  if (per_image) {
    for_each_cut(kernels, shape, beyond_cache, shape.batch, blocks, [&](int64_t begin, int64_t end, float* scratch) {
      for (int64_t b = begin; b < end; ++b) {
        kernels.policy_loss(problem, PolicyLossPass::image_sums, b * blocks, (b + 1) * blocks, scratch);
        add_blocks(b);
        if (!is_finite_image(by_sample[b])) leave_out(b);
        scalars[b].image_pull = judge_image(by_sample[b], advantages[b], divisors[b], clip_low, clip_high, problem);
        if (!with_gradient) continue;
        kernels.policy_loss(problem, PolicyLossPass::image_gradient, b * blocks, (b + 1) * blocks, scratch);
      }
    });
  } else {
    for_each_cut(kernels, shape, beyond_cache, shape.batch * blocks, 1, [&](int64_t begin, int64_t end, float* scratch) {
      kernels.policy_loss(problem, PolicyLossPass::position, begin, end, scratch);
    });
    for (int64_t b = 0; b < shape.batch; ++b) {
      add_blocks(b);
      by_sample[b].policy /= divisors[b];
    }
  }

  double policy = 0.0, kl = 0.0, divergence = 0.0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    policy += by_sample[b].policy / batch;
    kl += by_sample[b].kl / divisors[b] / batch;
    divergence += by_sample[b].divergence / divisors[b] / batch;
  }
  const PolicyLossSums all = total(by_sample.data(), shape.batch);
  if (all.negative_weight) refuse_weights(grid);
  const double number = static_cast<double>(std::max<int64_t>(all.counted, 1));
  const bool none = all.counted == 0;
  const at::Tensor loss = at::empty({}, at::kFloat), metrics = at::empty({9}, at::kFloat);
  *loss.mutable_data_ptr<float>() = static_cast<float>(policy + kl_weight * kl);
  const double values[9] = {policy,
                            kl,
                            static_cast<double>(all.clipped) / number,
                            none ? 1.0 : all.ratio / number,
                            none ? 1.0 : all.ratio_min,
                            none ? 1.0 : all.ratio_max,
                            all.squared_log_ratio / (2.0 * number),
                            static_cast<double>(std::accumulate(left_out.begin(), left_out.end(), int64_t{0})),
                            divergence};
  std::copy(values, values + 9, metrics.mutable_data_ptr<float>());
  return {loss, metrics, gradient};
}

}  // namespace star_kernels
