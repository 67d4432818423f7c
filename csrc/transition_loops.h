// One block of a transition, tile by tile: the next sample, drawn or given, and its log-prob. See csrc/transition.cpp.
#pragma once

#include "gaussian_loops.h"

namespace star_kernels {
namespace {

template <typename Lanes>
struct Transition {
  using V = Vectors<Lanes>;
  using Vec = typename V::Vec;
  static constexpr int64_t kWidth = V::kWidth;

  const TransitionProblem& problem;
  const LatentShape& shape = problem.inputs.shape;

  static int64_t scratch_floats(const LatentShape& shape) { return (6 * shape.channels + 1) * kTile; }

  void run(int64_t begin, int64_t end, float* memory) const {
    for (int64_t index = begin; index < end; ++index) {
      const Range block = block_at(shape, index);
      const BlockAhead ahead = index + 1 < end ? block_ahead(block_at(shape, index + 1)) : BlockAhead();
      for (int64_t offset = 0; offset < block.count; offset += kTile) {
        run(tile_at(block, offset), memory, ahead, offset / kTile * shape.channels);
      }
    }
  }

  BlockAhead block_ahead(const Range& block) const {
    BlockAhead ahead;
    const TransitionInputs& inputs = problem.inputs;
    if (!inputs.beyond_cache) return ahead;
    const LatentView& given = problem.draws ? problem.noise : inputs.next_sample;
    for (const LatentView* view : {&inputs.velocity, &inputs.sample, &given}) ahead.add(*view, shape, block);
    return ahead;
  }

  // Meanwhile the next block's chunks from `chunk` on are fetched.
  void run(const Range& tile, float* memory, const BlockAhead& ahead, int64_t chunk) const {
    const TransitionInputs& inputs = problem.inputs;
    const TransitionScalars& scalars = inputs.scalars[tile.sample];
    float* buffers[6];
    for (float*& buffer : buffers) {
      buffer = memory;
      memory += shape.channels * kTile;
    }
    float* spare = buffers[5];
    const Tile velocity = guided_tile<Lanes>(inputs, tile, buffers[0], buffers[1], spare),
               sample = read_tile<Lanes>(inputs.sample, shape, tile, buffers[2], spare);
    const LatentView& given_view = problem.draws ? problem.noise : inputs.next_sample;
    Tile given, drawn;
    if (given_view.data != nullptr) given = read_tile<Lanes>(given_view, shape, tile, buffers[3], spare);
    if (problem.draws) drawn = tile_to_write(inputs.next_sample, shape, tile, buffers[4]);
    const Gaussian<Lanes> gaussian(scalars);
    const Vec std = V::set(scalars.std);
    const bool has_given = given.data != nullptr, draws = problem.draws;
    const Format format = inputs.next_sample.format;
    for (int64_t first = 0; first < kTile; first += kSpan<Lanes>) {
      Vec squares[kTogether] = {};
      for (int64_t c = 0; c < shape.channels; ++c) {
        if (first == 0) ahead.fetch(chunk + c);
        const float *v = velocity.at(c, first), *x = sample.at(c, first);
        const float* givens = has_given ? given.at(c, first) : nullptr;
        float* to = draws ? drawn.at(c, first) : nullptr;
#pragma GCC unroll 8
        for (int i = 0; i < kTogether; ++i) {
          const Vec from = V::load(x + i * kWidth), shift = gaussian.shift(V::load(v + i * kWidth), from);
          Vec next{};
          if (has_given) next = V::load(givens + i * kWidth);
          if (draws) {
            next = V::rounded(Lanes::fma(std, next, from + shift), format);
            V::store(to + i * kWidth, next);
          }
          const Vec deviation = gaussian.deviation(next, from, shift);
          squares[i] = Lanes::fma(deviation, deviation, squares[i]);
        }
      }
      for (int i = 0; i < kTogether; ++i) {
        V::store(memory + first + i * kWidth, Gaussian<Lanes>::log_prob(squares[i], scalars));
      }
    }
    if (problem.draws) write_tile<Lanes>(inputs.next_sample, shape, tile, buffers[4], spare);
    if (problem.log_prob == nullptr) return;
    std::memcpy(problem.log_prob + tile.sample * shape.positions() + tile.first, memory, tile.count * sizeof(float));
  }
};

}  // namespace
}  // namespace star_kernels
