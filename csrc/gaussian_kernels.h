// The loops over latents [B, C, H, W] that csrc/policy_loss.cpp and csrc/transition.cpp ask for: no PyTorch in here.
//
// Both operators look at the deviation x' - mu of a Gaussian transition, docs/method.md, section 2. They share its
// arithmetic, operation by operation, because a ratio is exactly 1 on policy only if the rollout and the loss compute the
// same bits. Positions are worked on in blocks that follow from one sample's shape alone, and sums are taken block by block:
// neither the batch nor the number of threads changes a bit.
#pragma once

#include <cstdint>

namespace star_kernels {

enum class Format { float32, bfloat16, float16 };

// [B, C, H, W], contiguous or channels_last; without data where an argument was not given.
struct LatentView {
  void* data = nullptr;
  Format format = Format::float32;
  bool channels_last = false;
};

// Positions whose sums are taken together, the least that a thread is given; and those whose terms are computed together.
constexpr int64_t kBlock = 1024, kTile = 128;

struct LatentShape {
  int64_t batch, channels, height, width;

  int64_t positions() const { return height * width; }
  int64_t blocks() const { return (positions() + kBlock - 1) / kBlock; }
};

// The scalars of one sample's transition and of its log-prob.
struct TransitionScalars {
  float sample_drift, velocity_scale, std;       // a - 1, b, s
  float log_prob_scale, log_prob_offset;         // -1/(2 s^2 C), -log s - log(2 pi)/2
};

// What makes a deviation of latents: x' - mu, mu - x = (a - 1) x + b (v_u + g (v - v_u)).
struct TransitionInputs {
  LatentShape shape;
  LatentView velocity, unconditional_velocity, sample, next_sample;
  float guidance_scale;
  const TransitionScalars* scalars;  // [B]
  bool beyond_cache;                 // too large to be found in a cache: read in long rows, and write past it

  bool any_channels_last() const {
    return velocity.channels_last || unconditional_velocity.channels_last || sample.channels_last || next_sample.channels_last;
  }
};

struct TransitionProblem {
  TransitionInputs inputs;  // next_sample: the one that is given, or the one to write
  LatentView noise;         // with it the next sample is drawn, and without any next sample given it is the mean
  bool draws;               // whether the next sample is written
  float* log_prob;          // [B, H, W], or null
};

// Sums over the positions of one block, or over more.
struct PolicyLossSums {
  double policy = 0, kl = 0, divergence = 0, ratio = 0, squared_log_ratio = 0;
  double log_ratio = 0, squared_weight = 0;  // of an image: weighted log-ratios, and what scales its clip range
  double ratio_min = 0, ratio_max = 0;
  int64_t counted = 0, clipped = 0;
  bool negative_weight = false;
};

// The scalars of one sample's loss. Gradient = pull * deviation_factor * (x' - mu) + drift_factor * (mu - mu_ref).
struct PolicyLossScalars {
  float advantage, kl_scale, divergence_scale;
  float guard_scale;  // 1/(s C), what takes the product of x' - mu_old and mu - mu_old to guard's log-ratio
  float deviation_factor, drift_factor;
  float image_pull = 0;  // the pull of a position of weight 1 at image granularity, once the sums are known
};

enum class PolicyLossPass {
  position,        // sums and gradient with a ratio per position
  image_sums,      // the sums that the image's ratio is made of
  image_gradient,  // the gradient, with image_pull times the weight at every counted position
};

struct PolicyLossProblem {
  TransitionInputs inputs;
  LatentView reference_velocity, old_velocity, gradient;
  const PolicyLossScalars* scalars;  // [B]
  const float* old_log_prob;         // [B, H, W]
  const float* weights;              // [B, rows, columns], or null
  int64_t weight_rows, weight_columns;
  const uint8_t* mask;               // [B, H, W] of bytes, zero where not valid, or null
  bool guards;                       // deviations are x' - mu_old
  bool drops;                        // a position drops out, and no ratio is clipped
  float ratio_low, ratio_high, divergence_limit;
  PolicyLossSums* sums;              // [B, blocks]
};

constexpr float kLogRatioLimit = 20.0f;

// 2^64 takes an advantage times a weight to infinity where it is 2^64 or more, so that its position does not count. What is
// below gives, with the largest ratio, terms of which 2^35 add up to a finite number.
constexpr float kWeightedAdvantageToInfinity = 0x1p64f;

// Work on blocks [begin, end), numbered (sample, block); any cut among threads gives the same bits. `scratch` is 64-byte
// aligned, belongs to the caller's thread and holds `scratch_floats`.
struct GaussianKernels {
  int64_t (*scratch_floats)(const LatentShape&, bool beyond_cache);
  void (*transition)(const TransitionProblem&, int64_t begin, int64_t end, float* scratch);
  void (*policy_loss)(const PolicyLossProblem&, PolicyLossPass pass, int64_t begin, int64_t end, float* scratch);
};

GaussianKernels gaussian_default();
GaussianKernels gaussian_avx2();
GaussianKernels gaussian_avx512();

}  // namespace star_kernels
