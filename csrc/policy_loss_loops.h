// The spatially resolved objective, piece by piece: deviations once into cache, the terms of every position, and the gradient
// from what is in cache, written while the next piece is read. See csrc/policy_loss.cpp for the floor and the design.
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

  // What is known of every position of a piece: [positions].
  struct Terms {
    float *log_ratio, *kl, *divergence, *weight, *pull, *counted;

    Terms from(int64_t position) const {
      return {log_ratio + position, kl + position,   divergence + position,
              weight + position,    pull + position, counted + position};
    }
  };

  // Sums over the positions of a block, lane by lane.
  struct LaneSums {
    Vec policy{}, kl{}, divergence{}, ratio{}, squared_log_ratio{}, log_ratio{}, squared_weight{}, smallest, largest;
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
        sums.divergence += divergence[lane];
        sums.ratio += ratio[lane];
        sums.squared_log_ratio += squared_log_ratio[lane];
        sums.log_ratio += log_ratio[lane];
        sums.squared_weight += squared_weight[lane];
        if (smallest[lane] < sums.ratio_min) sums.ratio_min = smallest[lane];
        if (largest[lane] > sums.ratio_max) sums.ratio_max = largest[lane];
        sums.counted += counted[lane];
        sums.clipped += clipped[lane];
      }
      return sums;
    }
  };

  // A gradient of floats that is still to be made of deviation and pull, `count` positions of every channel.
  struct Waiting {
    Rows to;
    int64_t count = 0;
  };

  // The scratch of a thread.
  struct Work {
    float *deviation, *drift;  // [channels][positions of the piece]
    float *velocity, *unconditional, *sample, *next_sample, *reference, *old_velocity, *gradient, *spare;  // [channels][kTile]
    float *velocity_floats, *unconditional_floats, *sample_floats, *next_sample_floats, *reference_floats,
        *old_velocity_floats;  // [kAhead]
    Terms terms;
    float* old_log_prob;  // [kTile]
    float* token_row;     // [width]
    int64_t token_row_index = -1;
    Waiting waiting;
    LaneSums sums;
    bool negative_weight = false;

    Work(float* memory, const LatentShape& shape, int64_t longest, bool has_reference) {
      const auto take = [&memory](int64_t floats) { return (memory += floats) - floats; };
      deviation = take(shape.channels * longest);
      drift = has_reference ? take(shape.channels * longest) : nullptr;
      for (float** buffer : {&velocity, &unconditional, &sample, &next_sample, &reference, &old_velocity, &gradient, &spare}) {
        *buffer = take(shape.channels * kTile);
      }
      for (float** stretch : {&velocity_floats, &unconditional_floats, &sample_floats, &next_sample_floats, &reference_floats,
                              &old_velocity_floats}) {
        *stretch = take(kAhead);
      }
      for (float** row : {&terms.log_ratio, &terms.kl, &terms.divergence, &terms.weight, &terms.pull, &terms.counted}) {
        *row = take(longest);
      }
      old_log_prob = take(kTile);
      token_row = memory;
    }
  };

  static int64_t scratch_floats(const LatentShape& shape, bool beyond_cache) {
    const int64_t channels = shape.channels, longest = longest_piece(channels, beyond_cache);
    const int64_t held = channels * std::max(longest, 2 * longest_piece(2 * channels, beyond_cache));
    return held + 6 * longest + (8 * channels + 1) * kTile + 6 * kAhead + shape.width;
  }

  const PolicyLossProblem& problem;
  const PolicyLossPass pass;
  const LatentShape& shape = problem.inputs.shape;
  const bool has_reference = problem.reference_velocity.data != nullptr;
  const bool has_old = problem.old_velocity.data != nullptr;
  const bool writes = pass != PolicyLossPass::image_sums && problem.gradient.data != nullptr;

  void run(int64_t begin, int64_t end, float* memory) const {
    const TransitionInputs& inputs = problem.inputs;
    const bool flat = !(inputs.any_channels_last() || problem.reference_velocity.channels_last ||
                        problem.old_velocity.channels_last || problem.gradient.channels_last);
    const int64_t floats = shape.channels * (has_reference ? 2 : 1);
    const int64_t longest = flat ? longest_piece(floats, inputs.beyond_cache) : kTile;
    Work work(memory, shape, longest, has_reference);
    for_each_piece(shape, begin, end, longest, [&](const Range& piece) {
      measure(piece, work);
      bool all = true;
      for (int64_t offset = 0; offset < piece.count; offset += kTile) {
        const Range tile{piece.sample, piece.first + offset, std::min(piece.count - offset, kTile)};
        all &= judge(tile, work.terms.from(offset), work);
      }
      if (!writes) return;
      if (all && can_wait(piece)) {
        work.waiting = {direct_rows(problem.gradient, shape, piece), piece.count};
      } else {
        all ? write_gradient<true>(piece, work) : write_gradient<false>(piece, work);
      }
    });
    finish(work);
    if (inputs.beyond_cache) Lanes::fence();
  }

  // The terms of a tile, and its share of the sums. Whether every position counts.
  bool judge(const Range& tile, const Terms& terms, Work& work) const {
    read_weights(tile, terms, work);
    const bool all = compare(tile, terms, work);
    if (pass == PolicyLossPass::position) {
      if (problem.drops) {
        all ? weigh<true, true>(tile, terms, work.sums) : weigh<false, true>(tile, terms, work.sums);
      } else {
        all ? weigh<true, false>(tile, terms, work.sums) : weigh<false, false>(tile, terms, work.sums);
      }
    } else if (pass == PolicyLossPass::image_sums) {
      all ? add_up<true>(terms, work.sums) : add_up<false>(terms, work.sums);
    } else {
      spread_pull(tile, terms);
    }
    const int64_t stop = tile.first + tile.count;
    if (pass != PolicyLossPass::image_gradient && (stop % kBlock == 0 || stop == shape.positions())) {
      PolicyLossSums& sums = problem.sums[tile.sample * shape.blocks() + tile.first / kBlock];
      sums = work.sums.total();
      sums.negative_weight = work.negative_weight;
      work.sums = LaneSums();
    }
    return all;
  }

  // x' - mu and mu - mu_ref of every channel; the sums of their squares stand where log-ratio and KL will be, those of
  // mu - mu_old where the divergence will be. With guard it is x' - mu_old, and where the log-ratio will be stands the sum of
  // its products with mu - mu_old. Meanwhile the gradient that waits is written.
  void measure(const Range& piece, Work& work) const {
    if (work.waiting.count != piece.count) finish(work);
    const TransitionInputs& inputs = problem.inputs;
    const auto rows = [&](const LatentView& view, float* buffer) {
      return read_rows<Lanes>(view, shape, piece, buffer, work.spare);
    };
    const Rows velocity = rows(inputs.velocity, work.velocity),
               unconditional = rows(inputs.unconditional_velocity, work.unconditional),
               sample = rows(inputs.sample, work.sample), next_sample = rows(inputs.next_sample, work.next_sample),
               reference = rows(problem.reference_velocity, work.reference),
               old_velocity = rows(problem.old_velocity, work.old_velocity);
    const Gaussian<Lanes> gaussian(inputs.scalars[piece.sample]);
    const int64_t length = whole_tiles(piece.count);
    std::memset(work.terms.log_ratio, 0, length * sizeof(float));
    if (reference) std::memset(work.terms.kl, 0, length * sizeof(float));
    if (old_velocity) std::memset(work.terms.divergence, 0, length * sizeof(float));
    for_each_stretch(shape.channels, length, [&](const Stretch& stretch) {
      const Floats v = guided_floats<Lanes>(velocity, unconditional, inputs.guidance_scale, stretch, work.velocity_floats,
                                            work.unconditional_floats),
                   x = floats_of<Lanes>(sample, stretch, work.sample_floats),
                   next = floats_of<Lanes>(next_sample, stretch, work.next_sample_floats),
                   old = old_velocity ? floats_of<Lanes>(old_velocity, stretch, work.old_velocity_floats) : v;
      const int64_t held = stretch.channel * length + stretch.position;
      const Terms terms = work.terms.from(stretch.position);
      float* to = reinterpret_cast<float*>(work.waiting.to.at(stretch.channel, stretch.position));
      const auto deviate = to == nullptr         ? &PolicyLoss::deviate<Late::nothing>
                           : inputs.beyond_cache ? &PolicyLoss::deviate<Late::streamed>
                                                 : &PolicyLoss::deviate<Late::stored>;
      Terms squares = terms;
      // Guard has no use for the squares: they go where it will be noted which positions count.
      if (problem.guards) squares.log_ratio = terms.counted;
      deviate(gaussian, problem.guards ? old : v, x, next, stretch.count, squares, work.deviation + held, to);
      if (old_velocity) {
        find_move(gaussian, v, old, stretch.count, terms, problem.guards ? work.deviation + held : nullptr);
      }
      if (!reference) return;
      const Floats anchor = floats_of<Lanes>(reference, stretch, work.reference_floats);
      find_drift(gaussian, v, anchor, stretch.count, terms, work.drift + held);
    });
    work.waiting = {};
  }

  // What becomes of the gradient of the piece before.
  enum class Late { nothing, stored, streamed };

  // Lines are asked for one by one, between the vectors that are worked on: a core's requests would wait for each other if they
  // came together. So would reads and writes: memory has both at a time.
  template <Late kLate>
  static void deviate(Gaussian<Lanes> gaussian, Floats v, Floats x, Floats next, int64_t count, Terms terms,
                      float* deviations, float* to) {
    for (int64_t line = 0; line < count; line += kLine) {
      for (const float* ahead : {v.ahead, x.ahead, next.ahead}) __builtin_prefetch(ahead + line, 0, 2);
#pragma GCC unroll 4
      for (int64_t p = line; p < line + kLine; p += kWidth) {
        if (kLate != Late::nothing) {
          const Vec gradient = V::load(terms.pull + p) * V::load(deviations + p);
          kLate == Late::streamed ? Lanes::stream(to + p, gradient) : V::store(to + p, gradient);
        }
        const Vec from = V::load(x.now + p);
        const Vec deviation = gaussian.deviation(V::load(next.now + p), from, gaussian.shift(V::load(v.now + p), from));
        V::store(deviations + p, deviation);
        V::store(terms.log_ratio + p, Lanes::fma(deviation, deviation, V::load(terms.log_ratio + p)));
      }
    }
  }

  static void find_drift(Gaussian<Lanes> gaussian, Floats v, Floats anchor, int64_t count, Terms terms, float* drifts) {
    for (int64_t line = 0; line < count; line += kLine) {
      __builtin_prefetch(anchor.ahead + line, 0, 2);
      for (int64_t p = line; p < line + kLine; p += kWidth) {
        const Vec drift = gaussian.velocity_scale * (V::load(v.now + p) - V::load(anchor.now + p));
        V::store(drifts + p, drift);
        V::store(terms.kl + p, Lanes::fma(drift, drift, V::load(terms.kl + p)));
      }
    }
  }

  // The squares of mu - mu_old, and its products with the deviations that are given.
  static void find_move(Gaussian<Lanes> gaussian, Floats v, Floats old, int64_t count, Terms terms, const float* deviations) {
    for (int64_t line = 0; line < count; line += kLine) {
      for (const float* ahead : {v.ahead, old.ahead}) __builtin_prefetch(ahead + line, 0, 2);
      for (int64_t p = line; p < line + kLine; p += kWidth) {
        const Vec move = gaussian.velocity_scale * (V::load(v.now + p) - V::load(old.now + p));
        V::store(terms.divergence + p, Lanes::fma(move, move, V::load(terms.divergence + p)));
        if (deviations == nullptr) continue;
        V::store(terms.log_ratio + p, Lanes::fma(V::load(deviations + p), move, V::load(terms.log_ratio + p)));
      }
    }
  }

  // The weight of each position's token.
  void read_weights(const Range& tile, const Terms& terms, Work& work) const {
    if (problem.weights == nullptr || tile.count < kTile) {
      for (int64_t p = 0; p < kTile; p += kWidth) V::store(terms.weight + p, V::set(1.0f));
    }
    if (problem.weights == nullptr) return;
    const int64_t patch = shape.height / problem.weight_rows;
    int64_t y = tile.first / shape.width, x = tile.first % shape.width;
    for (int64_t p = 0; p < tile.count; ++y, x = 0) {
      const int64_t left = tile.count - p, count = left < shape.width - x ? left : shape.width - x;
      spread_tokens(tile.sample * problem.weight_rows + y / patch, work);
      std::memcpy(terms.weight + p, work.token_row + x, count * sizeof(float));
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

  // From sums of squares to log-ratios, KL and divergence. Whether every position counts; `counted` says which do, and
  // log-ratio, KL, divergence and weight of the others become zero.
  bool compare(const Range& tile, const Terms& terms, const Work& work) const {
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
              kl_scale = V::set(scalars.kl_scale), divergence_scale = V::set(scalars.divergence_scale),
              guard_scale = V::set(scalars.guard_scale), zero{};
    Vec probe{};  // a number times zero is zero if it is finite, and NaN if not
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Vec summed = V::load(terms.log_ratio + p);
      const Vec log_ratio = problem.guards ? summed * guard_scale
                                           : Gaussian<Lanes>::log_prob(summed, transition) - V::load(old + p);
      V::store(terms.log_ratio + p, log_ratio);
      probe += log_ratio * zero + advantage * V::load(terms.weight + p) * beyond * zero;
      if (has_old) probe += scale(terms.divergence + p, divergence_scale) * zero;
      if (has_reference) probe += scale(terms.kl + p, kl_scale) * zero;
    }
    bool all = tile.count == kTile && problem.mask == nullptr;
    for (int64_t lane = 0; lane < kWidth; ++lane) all &= probe[lane] == 0.0f;
    if (all) {
      for (int64_t p = 0; p < kTile; p += kWidth) V::store(terms.counted + p, V::floats(Int{} - 1));
      return true;
    }

    int32_t inside[kTile] = {};
    for (int64_t p = 0; p < tile.count; ++p) inside[p] = problem.mask == nullptr ? -1 : -(problem.mask[begin + p] != 0);
    std::memcpy(terms.counted, inside, sizeof inside);
    for (int64_t p = 0; p < kTile; p += kWidth) {
      Int counted = V::bits(V::load(terms.counted + p)) & V::is_finite(V::load(terms.log_ratio + p)) &
                    V::is_finite(advantage * V::load(terms.weight + p) * beyond);
      if (has_old) counted &= V::is_finite(V::load(terms.divergence + p));
      if (has_reference) counted &= V::is_finite(V::load(terms.kl + p));
      V::store(terms.counted + p, V::floats(counted));
      for (float* row : {terms.log_ratio, terms.kl, terms.divergence, terms.weight}) {
        V::store(row + p, V::keep(counted, V::load(row + p)));
      }
    }
    return false;
  }

  static STAR_INLINE Vec scale(float* at, Vec factor) {
    const Vec scaled = V::load(at) * factor;
    V::store(at, scaled);
    return scaled;
  }

  // The terms of every position into the sums, and into `pull` what the gradient needs.
  template <bool kAll, bool kDrops>
  void weigh(const Range& tile, const Terms& terms, LaneSums& sums) const {
    const PolicyLossScalars& scalars = problem.scalars[tile.sample];
    const Vec minus_advantage = -V::set(scalars.advantage), low = V::set(problem.ratio_low),
              high = V::set(problem.ratio_high), limit = V::set(problem.divergence_limit),
              factor = V::set(scalars.deviation_factor);
    Vec policy{}, ratios{}, squares{}, smallest = sums.smallest, largest = sums.largest;
    Int clips{};
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Int counted = kAll ? Int{} - 1 : V::bits(V::load(terms.counted + p));
      const Vec log_ratio = V::load(terms.log_ratio + p), weight = V::load(terms.weight + p);
      const Vec clamped = clamp(log_ratio), ratio = V::exp(clamped);
      const Vec unclipped = minus_advantage * ratio, pull = weight * unclipped * factor;
      Vec term;
      Int outside, active;
      if constexpr (kDrops) {
        const Int outward = ((ratio > 1.0f) & (minus_advantage < 0.0f)) | ((ratio < 1.0f) & (minus_advantage > 0.0f));
        outside = outward & (V::load(terms.divergence + p) >= limit);
        term = V::keep(~outside, weight * unclipped);
        active = ~outside & (clamped == log_ratio);
      } else {
        const Vec bounded = V::max(V::min(ratio, high), low), clipped = minus_advantage * bounded;
        outside = bounded != ratio;
        term = weight * V::max(unclipped, clipped);
        active = (unclipped >= clipped) & (clamped == log_ratio);
      }
      policy += kAll ? term : V::keep(counted, term);
      ratios += kAll ? ratio : V::keep(counted, ratio);
      squares = Lanes::fma(clamped, clamped, squares);
      smallest = V::min(smallest, kAll ? ratio : (counted ? ratio : smallest));
      largest = V::max(largest, kAll ? ratio : (counted ? ratio : largest));
      clips -= counted & outside;
      V::store(terms.pull + p, V::keep(active & counted, pull));
    }
    sums.policy += policy;
    sums.ratio += ratios;
    sums.squared_log_ratio += squares;
    sums.smallest = smallest;
    sums.largest = largest;
    sums.clipped += clips;
    count_up<kAll>(terms, sums);
  }

  // What an image's ratio is made of.
  template <bool kAll>
  void add_up(const Terms& terms, LaneSums& sums) const {
    Vec log_ratios{}, squares{};
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Vec weight = V::load(terms.weight + p);
      log_ratios = Lanes::fma(weight, clamp(V::load(terms.log_ratio + p)), log_ratios);
      squares = Lanes::fma(weight, weight, squares);
    }
    sums.log_ratio += log_ratios;
    sums.squared_weight += squares;
    count_up<kAll>(terms, sums);
  }

  // The image's pull by position, in proportion to the weight and none where the log-ratio is beyond its limit.
  void spread_pull(const Range& tile, const Terms& terms) const {
    const Vec pull = V::set(problem.scalars[tile.sample].image_pull * problem.scalars[tile.sample].deviation_factor);
    for (int64_t p = 0; p < kTile; p += kWidth) {
      const Vec log_ratio = V::load(terms.log_ratio + p);
      V::store(terms.pull + p, V::keep(clamp(log_ratio) == log_ratio, V::load(terms.weight + p) * pull));
    }
  }

  static STAR_INLINE Vec clamp(Vec log_ratio) {
    const Vec limit = V::set(kLogRatioLimit);
    return V::max(V::min(log_ratio, limit), -limit);
  }

  template <bool kAll>
  void count_up(const Terms& terms, LaneSums& sums) const {
    Vec kl{};
    for (int64_t p = 0; has_reference && p < kTile; p += kWidth) kl += V::load(terms.kl + p);
    sums.kl += kl;
    Vec divergence{};
    for (int64_t p = 0; has_old && p < kTile; p += kWidth) divergence += V::load(terms.divergence + p);
    sums.divergence += divergence;
    if (kAll) sums.counted += static_cast<int32_t>(kTile / kWidth);
    for (int64_t p = 0; !kAll && p < kTile; p += kWidth) sums.counted -= V::bits(V::load(terms.counted + p));
  }

  // Whether the gradient of a piece whose positions all count can be written with the next piece: floats where they belong, past
  // the caches if they are too large for them, and no KL.
  bool can_wait(const Range& piece) const {
    if (problem.scalars[piece.sample].drift_factor != 0.0f) return false;
    if (problem.inputs.beyond_cache) return streamable<Lanes>(problem.gradient, shape, piece);
    return in_place(problem.gradient, piece) && problem.gradient.format == Format::float32;
  }

  void finish(Work& work) const {
    const Waiting& waiting = work.waiting;
    if (waiting.to && problem.inputs.beyond_cache) make_gradient<true, true>(waiting.to, waiting.count, 0.0f, work);
    if (waiting.to && !problem.inputs.beyond_cache) make_gradient<true, false>(waiting.to, waiting.count, 0.0f, work);
    work.waiting = {};
  }

  template <bool kAll>
  void write_gradient(const Range& piece, const Work& work) const {
    const Rows to = rows_to_write(problem.gradient, shape, piece, work.gradient);
    const float drift_factor = problem.scalars[piece.sample].drift_factor;
    if (problem.inputs.beyond_cache && streamable<Lanes>(problem.gradient, shape, piece)) {
      make_gradient<kAll, true>(to, piece.count, drift_factor, work);
    } else {
      make_gradient<kAll, false>(to, whole_tiles(piece.count), drift_factor, work);
    }
    write_tile<Lanes>(problem.gradient, shape, piece, work.gradient, work.spare);
  }

  // Zeros where a position does not count, whatever pull, factors and deviations are: a product with zero would leave NaN.
  template <bool kAll, bool kStreams>
  void make_gradient(const Rows& gradient, int64_t count, float drift_factor, const Work& work) const {
    const bool drifts_too = drift_factor != 0.0f;
    for (int64_t c = 0; c < shape.channels; ++c) {
      const float *deviations = work.deviation + c * count, *drifts = drifts_too ? work.drift + c * count : nullptr;
      char* to = gradient.at(c, 0);
      for (int64_t p = 0; p < count; p += kWidth) {
        Vec value = V::load(work.terms.pull + p) * V::load(deviations + p);
        if (drifts_too) value = Lanes::fma(V::set(drift_factor), V::load(drifts + p), value);
        if (!kAll) value = V::keep(V::bits(V::load(work.terms.counted + p)), value);
        kStreams ? Lanes::stream(reinterpret_cast<float*>(to) + p, value) : V::write(to, gradient.format, p, value);
      }
    }
  }
};

}  // namespace
}  // namespace star_kernels
