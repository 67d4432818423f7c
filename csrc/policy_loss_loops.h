// One block of the spatially resolved objective, tile by tile: deviations once into cache, the terms of every position, and the
// gradient from what is in cache, where it goes past the caches while the next tile is read. See csrc/policy_loss.cpp for the
// floor and the design.
#pragma once

#include "gaussian_loops.h"

#include <limits>

namespace star_kernels {
namespace {

template <typename Lanes>
struct PolicyLoss {
  using V = Vectors<Lanes>;
  using Vec = typename V::Vec;
  using Int = typename V::Int;
  static constexpr int64_t kWidth = V::kWidth;

  // The scratch of a thread. Buffers are [channels][kTile], rows [kTile].
  struct Work {
    float *deviation, *previous_deviation, *drift;
    float *velocity, *unconditional, *sample, *next_sample, *reference, *gradient, *spare;
    float *log_ratio, *kl, *weight, *old_log_prob, *pull, *counted;
    float* token_row;  // [width]
    int64_t token_row_index = -1;
    Tile waiting;  // the gradient of the tile before, still to be made of previous_deviation and pull
    bool negative_weight = false;

    Work(float* memory, const LatentShape& shape) {
      for (float** buffer : {&deviation, &previous_deviation, &drift, &velocity, &unconditional, &sample, &next_sample,
                             &reference, &gradient, &spare}) {
        *buffer = memory;
        memory += shape.channels * kTile;
      }
      for (float** row : {&log_ratio, &kl, &weight, &old_log_prob, &pull, &counted}) {
        *row = memory;
        memory += kTile;
      }
      token_row = memory;
    }

    // Leaves the tile's gradient to be written with the next tile.
    void leave(const Tile& tile) {
      waiting = tile;
      float* free = previous_deviation;
      previous_deviation = deviation;
      deviation = free;
    }
  };

  static int64_t scratch_floats(const LatentShape& shape) { return (10 * shape.channels + 6) * kTile + shape.width; }

  // Sums over the positions of a block, lane by lane.
  struct LaneSums {
    Vec policy{}, kl{}, ratio{}, squared_log_ratio{}, log_ratio{}, weight{}, smallest, largest;
    Int counted{}, clipped{};

    // Written out: an implicit constructor would not be compiled for the instruction set.
    LaneSums() {
      smallest = V::set(std::numeric_limits<float>::infinity());
      largest = -smallest;
    }

    PolicyLossSums total() const {
      PolicyLossSums sums;
      sums.ratio_min = smallest[0];
      sums.ratio_max = largest[0];
      for (int64_t lane = 0; lane < kWidth; ++lane) {
        sums.policy += policy[lane];
        sums.kl += kl[lane];
        sums.ratio += ratio[lane];
        sums.squared_log_ratio += squared_log_ratio[lane];
        sums.log_ratio += log_ratio[lane];
        sums.weight += weight[lane];
        if (smallest[lane] < sums.ratio_min) sums.ratio_min = smallest[lane];
        if (largest[lane] > sums.ratio_max) sums.ratio_max = largest[lane];
        sums.counted += counted[lane];
        sums.clipped += clipped[lane];
      }
      return sums;
    }
  };

  const PolicyLossProblem& problem;
  const PolicyLossPass pass;
  const LatentShape& shape = problem.inputs.shape;
  const bool has_reference = problem.reference_velocity.data != nullptr;
  const bool writes = pass != PolicyLossPass::image_sums && problem.gradient.data != nullptr;

  void run(int64_t begin, int64_t end, float* memory) const {
    Work work(memory, shape);
    for (int64_t index = begin; index < end; ++index) {
      const Range block = block_at(shape, index);
      const BlockAhead ahead = index + 1 < end ? block_ahead(block_at(shape, index + 1)) : BlockAhead();
      LaneSums sums;
      for (int64_t offset = 0; offset < block.count; offset += kTile) {
        const Range tile = tile_at(block, offset);
        measure(tile, work, ahead, offset / kTile * shape.channels);
        read_weights(tile, work);
        const bool all = compare(tile, work);
        if (pass == PolicyLossPass::position) {
          all ? weigh<true>(tile, work, sums) : weigh<false>(tile, work, sums);
        } else if (pass == PolicyLossPass::image_sums) {
          all ? add_up<true>(work, sums) : add_up<false>(work, sums);
        } else {
          const float pull = problem.scalars[tile.sample].image_pull * problem.scalars[tile.sample].deviation_factor;
          for (int64_t p = 0; p < kTile; p += kWidth) V::store(work.pull + p, V::set(pull));
        }
        if (!writes) continue;
        all ? write_gradient<true>(tile, work) : write_gradient<false>(tile, work);
      }
      if (pass == PolicyLossPass::image_gradient) continue;
      problem.sums[index] = sums.total();
      problem.sums[index].negative_weight = work.negative_weight;
    }
    if (work.waiting.data != nullptr) make_gradient<true, true>(work.waiting, work.previous_deviation, 0.0f, work);
    if (problem.inputs.beyond_cache) Lanes::fence();
  }

  BlockAhead block_ahead(const Range& block) const {
    BlockAhead ahead;
    const TransitionInputs& inputs = problem.inputs;
    if (!inputs.beyond_cache) return ahead;
    for (const LatentView* view : {&inputs.velocity, &inputs.sample, &inputs.next_sample, &problem.reference_velocity}) {
      ahead.add(*view, shape, block);
    }
    return ahead;
  }

  // x' - mu and mu - mu_ref of every channel; the sums of their squares stand where log-ratio and KL will be. Meanwhile the next
  // block's chunks from `chunk` on are fetched, and the gradient that waits is written.
  void measure(const Range& tile, Work& work, const BlockAhead& ahead, int64_t chunk) const {
    const TransitionInputs& inputs = problem.inputs;
    const Tile velocity = guided_tile<Lanes>(inputs, tile, work.velocity, work.unconditional, work.spare),
               sample = read_tile<Lanes>(inputs.sample, shape, tile, work.sample, work.spare),
               next_sample = read_tile<Lanes>(inputs.next_sample, shape, tile, work.next_sample, work.spare);
    if (work.waiting.data != nullptr) {
      deviate<true, true>(velocity, sample, next_sample, tile.sample, work, ahead, chunk);
      work.waiting = {};
    } else if (!ahead.empty()) {
      deviate<true, false>(velocity, sample, next_sample, tile.sample, work, ahead, chunk);
    } else {
      deviate<false, false>(velocity, sample, next_sample, tile.sample, work, ahead, chunk);
    }
    if (!has_reference) return;
    const Gaussian<Lanes> gaussian(inputs.scalars[tile.sample]);
    const int64_t channels = shape.channels;
    const Tile reference = read_tile<Lanes>(problem.reference_velocity, shape, tile, work.reference, work.spare);
    for (int64_t first = 0; first < kTile; first += kSpan<Lanes>) {
      Vec squares[kTogether] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const float *v = velocity.at(c, first), *anchor = reference.at(c, first);
        float* drifts = work.drift + c * kTile + first;
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const Vec drift = gaussian.velocity_scale * (V::load(v + i * kWidth) - V::load(anchor + i * kWidth));
          V::store(drifts + i * kWidth, drift);
          squares[i] = Lanes::fma(drift, drift, squares[i]);
        }
      }
      for (int i = 0; i < kTogether; ++i) V::store(work.kl + first + i * kWidth, squares[i]);
    }
  }

  // x' - mu and its squares. The lines of the next block are asked for one by one, between the vectors of this one: a core's
  // requests would wait for each other if they came together. So would reads and writes: memory has both at a time.
  template <bool kAhead, bool kWrites>
  void deviate(const Tile& velocity, const Tile& sample, const Tile& next_sample, int64_t index, const Work& work,
               const BlockAhead& ahead, int64_t chunk) const {
    const Gaussian<Lanes> gaussian(problem.inputs.scalars[index]);
    const int64_t channels = shape.channels;
    for (int64_t first = 0; first < kTile; first += kSpan<Lanes>) {
      Vec squares[kTogether] = {};
      for (int64_t c = 0; c < channels; ++c) {
        const BlockAhead::Chunks<kWidth> chunks(ahead, chunk + c, first);
        const float *v = velocity.at(c, first), *x = sample.at(c, first), *next = next_sample.at(c, first);
        float* deviations = work.deviation + c * kTile + first;
        const float *previous = work.previous_deviation + c * kTile + first, *pulls = work.pull + first;
        float* to = kWrites ? work.waiting.at(c, first) : nullptr;
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const int64_t p = i * kWidth;
          const Vec from = V::load(x + p), shift = gaussian.shift(V::load(v + p), from);
          const Vec deviation = gaussian.deviation(V::load(next + p), from, shift);
          V::store(deviations + p, deviation);
          if (kAhead) chunks.fetch(i);
          if (kWrites) Lanes::stream(to + p, V::load(pulls + p) * V::load(previous + p));
          squares[i] = Lanes::fma(deviation, deviation, squares[i]);
        }
      }
      for (int i = 0; i < kTogether; ++i) V::store(work.log_ratio + first + i * kWidth, squares[i]);
    }
  }

  // The weight of each position's token.
  void read_weights(const Range& tile, Work& work) const {
    if (problem.weights == nullptr || tile.count < kTile) {
      for (int64_t p = 0; p < kTile; p += kWidth) V::store(work.weight + p, V::set(1.0f));
    }
    if (problem.weights == nullptr) return;
    const int64_t patch = shape.height / problem.weight_rows;
    int64_t y = tile.first / shape.width, x = tile.first % shape.width;
    for (int64_t p = 0; p < tile.count; ++y, x = 0) {
      const int64_t left = tile.count - p, count = left < shape.width - x ? left : shape.width - x;
      spread_tokens(tile.sample * problem.weight_rows + y / patch, work);
      std::memcpy(work.weight + p, work.token_row + x, count * sizeof(float));
      p += count;
    }
  }

  // One row of the token grid, each weight as often as its token is wide.
  void spread_tokens(int64_t row, Work& work) const {
    if (row == work.token_row_index) return;
    work.token_row_index = row;
    const int64_t columns = problem.weight_columns, patch = shape.width / columns;
    const float* tokens = problem.weights + row * columns;
    int64_t token = 0;
    Int negative{};
    for (; patch == 2 && token + kWidth <= columns; token += kWidth) {
      const Vec weights = V::load(tokens + token);
      negative |= weights < 0.0f;
      V::store(work.token_row + 2 * token, Lanes::low_pairs(weights, weights));
      V::store(work.token_row + 2 * token + kWidth, Lanes::high_pairs(weights, weights));
    }
    for (int64_t lane = 0; lane < kWidth; ++lane) work.negative_weight |= negative[lane] != 0;
    for (; token < columns; ++token) {
      work.negative_weight |= tokens[token] < 0.0f;
      for (int64_t x = 0; x < patch; ++x) work.token_row[token * patch + x] = tokens[token];
    }
  }

  // From sums of squares to log-ratios and KL. Whether every position counts; where not, `counted` says which do, and log-ratio,
  // KL and weight of the others become zero.
  bool compare(const Range& tile, const Work& work) const {
    const PolicyLossScalars& scalars = problem.scalars[tile.sample];
    const TransitionScalars transition = problem.inputs.scalars[tile.sample];
    const int64_t begin = tile.sample * shape.positions() + tile.first;
    const float* old = problem.old_log_prob + begin;
    if (tile.count < kTile) {
      std::memset(work.old_log_prob, 0, kTile * sizeof(float));
      std::memcpy(work.old_log_prob, old, tile.count * sizeof(float));
      old = work.old_log_prob;
    }
    const Vec advantage = V::set(scalars.advantage), beyond = V::set(kWeightedAdvantageToInfinity),
              kl_scale = V::set(scalars.kl_scale), zero{};
    Vec probe{};  // a number times zero is zero if it is finite, and NaN if not
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Vec log_prob = Gaussian<Lanes>::log_prob(V::load(work.log_ratio + p), transition);
      const Vec log_ratio = log_prob - V::load(old + p);
      V::store(work.log_ratio + p, log_ratio);
      probe += log_ratio * zero + advantage * V::load(work.weight + p) * beyond * zero;
      if (!has_reference) continue;
      const Vec distance = V::load(work.kl + p) * kl_scale;
      V::store(work.kl + p, distance);
      probe += distance * zero;
    }
    bool all = tile.count == kTile && problem.mask == nullptr;
    for (int64_t lane = 0; lane < kWidth; ++lane) all &= probe[lane] == 0.0f;
    if (all) return true;

    int32_t inside[kTile] = {};
    for (int64_t p = 0; p < tile.count; ++p) inside[p] = problem.mask == nullptr ? -1 : -(problem.mask[begin + p] != 0);
    std::memcpy(work.counted, inside, sizeof inside);
    for (int64_t p = 0; p < kTile; p += kWidth) {
      Int counted = V::bits(V::load(work.counted + p)) & V::is_finite(V::load(work.log_ratio + p)) &
                    V::is_finite(advantage * V::load(work.weight + p) * beyond);
      if (has_reference) counted &= V::is_finite(V::load(work.kl + p));
      V::store(work.counted + p, V::floats(counted));
      for (float* row : {work.log_ratio, work.kl, work.weight}) V::store(row + p, V::keep(counted, V::load(row + p)));
    }
    return false;
  }

  // The terms of every position into the sums, and into `pull` what the gradient needs.
  template <bool kAll>
  void weigh(const Range& tile, const Work& work, LaneSums& sums) const {
    const PolicyLossScalars& scalars = problem.scalars[tile.sample];
    const Vec minus_advantage = -V::set(scalars.advantage), low = V::set(problem.ratio_low),
              high = V::set(problem.ratio_high), limit = V::set(kLogRatioLimit),
              factor = V::set(scalars.deviation_factor);
    Vec policy{}, ratios{}, squares{}, smallest = sums.smallest, largest = sums.largest;
    Int clips{};
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Int counted = kAll ? Int{} - 1 : V::bits(V::load(work.counted + p));
      const Vec log_ratio = V::load(work.log_ratio + p), weight = V::load(work.weight + p);
      const Vec clamped = V::max(V::min(log_ratio, limit), -limit), ratio = V::exp(clamped);
      const Vec bounded = V::max(V::min(ratio, high), low);
      const Vec unclipped = minus_advantage * ratio, clipped = minus_advantage * bounded;
      const Vec term = weight * V::max(unclipped, clipped), pull = weight * unclipped * factor;
      const Int active = (unclipped >= clipped) & (clamped == log_ratio);
      policy += kAll ? term : V::keep(counted, term);
      ratios += kAll ? ratio : V::keep(counted, ratio);
      squares = Lanes::fma(clamped, clamped, squares);
      smallest = V::min(smallest, kAll ? ratio : (counted ? ratio : smallest));
      largest = V::max(largest, kAll ? ratio : (counted ? ratio : largest));
      clips -= counted & (bounded != ratio);
      V::store(work.pull + p, V::keep(active & counted, pull));
    }
    sums.policy += policy;
    sums.ratio += ratios;
    sums.squared_log_ratio += squares;
    sums.smallest = smallest;
    sums.largest = largest;
    sums.clipped += clips;
    count_up<kAll>(work, sums);
  }

  // What an image's ratio is made of.
  template <bool kAll>
  void add_up(const Work& work, LaneSums& sums) const {
    Vec log_ratios{}, weights{};
    for (int64_t p = 0; p < kTile; p += kWidth) {
      log_ratios += V::load(work.log_ratio + p);
      weights += V::load(work.weight + p);
    }
    sums.log_ratio += log_ratios;
    sums.weight += weights;
    count_up<kAll>(work, sums);
  }

  template <bool kAll>
  void count_up(const Work& work, LaneSums& sums) const {
    Vec kl{};
    for (int64_t p = 0; has_reference && p < kTile; p += kWidth) kl += V::load(work.kl + p);
    sums.kl += kl;
    if (kAll) sums.counted += static_cast<int32_t>(kTile / kWidth);
    for (int64_t p = 0; !kAll && p < kTile; p += kWidth) sums.counted -= V::bits(V::load(work.counted + p));
  }

  template <bool kAll>
  void write_gradient(const Range& tile, Work& work) const {
    const Tile gradient = tile_to_write(problem.gradient, shape, tile, work.gradient);
    const float drift_factor = problem.scalars[tile.sample].drift_factor;
    const bool streams = problem.inputs.beyond_cache && in_place(problem.gradient, tile) && gradient.stride % kWidth == 0 &&
                         reinterpret_cast<uintptr_t>(gradient.data) % sizeof(Vec) == 0;
    if (streams && kAll && drift_factor == 0.0f) return work.leave(gradient);
    if (streams) {
      make_gradient<kAll, true>(gradient, work.deviation, drift_factor, work);
    } else {
      make_gradient<kAll, false>(gradient, work.deviation, drift_factor, work);
    }
    write_tile<Lanes>(problem.gradient, shape, tile, work.gradient, work.spare);
  }

  // Zeros where a position does not count, whatever pull, factors and deviations are: a product with zero would leave NaN.
  template <bool kAll, bool kStreams>
  void make_gradient(const Tile& gradient, const float* deviation, float drift_factor, const Work& work) const {
    const bool drifts_too = drift_factor != 0.0f;
    const int64_t channels = shape.channels;
    for (int64_t first = 0; first < kTile; first += kSpan<Lanes>) {
      Vec pulls[kTogether];
      for (int i = 0; i < kTogether; ++i) pulls[i] = V::load(work.pull + first + i * kWidth);
      for (int64_t c = 0; c < channels; ++c) {
        const float *deviations = deviation + c * kTile + first, *drifts = work.drift + c * kTile + first;
        float* to = gradient.at(c, first);
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const int64_t p = i * kWidth;
          Vec value = pulls[i] * V::load(deviations + p);
          if (drifts_too) value = Lanes::fma(V::set(drift_factor), V::load(drifts + p), value);
          if (!kAll) value = V::keep(V::bits(V::load(work.counted + first + p)), value);
          if (kStreams) {
            Lanes::stream(to + p, value);
          } else {
            V::store(to + p, value);
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace star_kernels
