// A transition, piece by piece: the next sample, drawn or given, and its log-prob. See csrc/transition.cpp.
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

  static int64_t scratch_floats(const LatentShape& shape, bool beyond_cache) {
    return 6 * shape.channels * kTile + 4 * kAhead + longest_piece(1, beyond_cache);
  }

  void run(int64_t begin, int64_t end, float* memory) const {
    const TransitionInputs& inputs = problem.inputs;
    const bool flat = !(inputs.any_channels_last() || problem.noise.channels_last);
    for_each_piece(shape, begin, end, flat ? longest_piece(1, inputs.beyond_cache) : kTile,
                   [&](const Range& piece) { run_piece(piece, memory); });
    if (inputs.beyond_cache) Lanes::fence();
  }

  void run_piece(const Range& piece, float* memory) const {
    const TransitionInputs& inputs = problem.inputs;
    const auto take = [&memory](int64_t floats) { return (memory += floats) - floats; };
    float *tiles[6], *stretches[4];
    for (float*& tile : tiles) tile = take(shape.channels * kTile);
    for (float*& stretch : stretches) stretch = take(kAhead);
    float *spare = tiles[5], *squares = memory;
    const auto rows = [&](const LatentView& view, float* tile) { return read_rows<Lanes>(view, shape, piece, tile, spare); };
    const Rows velocity = rows(inputs.velocity, tiles[0]), unconditional = rows(inputs.unconditional_velocity, tiles[1]),
               sample = rows(inputs.sample, tiles[2]),
               given = rows(problem.draws ? problem.noise : inputs.next_sample, tiles[3]),
               drawn = problem.draws ? rows_to_write(inputs.next_sample, shape, piece, tiles[4]) : Rows();
    const bool streams = problem.draws && inputs.beyond_cache && streamable<Lanes>(inputs.next_sample, shape, piece);
    if (!given) std::memset(stretches[3], 0, kAhead * sizeof(float));
    const TransitionScalars& scalars = inputs.scalars[piece.sample];
    const Gaussian<Lanes> gaussian(scalars);
    const int64_t length = whole_tiles(piece.count);
    std::memset(squares, 0, length * sizeof(float));
    for_each_stretch(shape.channels, length, [&](const Stretch& stretch) {
      const Floats v = guided_floats<Lanes>(velocity, unconditional, inputs.guidance_scale, stretch, stretches[0], stretches[1]),
                   x = floats_of<Lanes>(sample, stretch, stretches[2]),
                   next = given ? floats_of<Lanes>(given, stretch, stretches[3]) : Floats{stretches[3], stretches[3]};
      float* sums = squares + stretch.position;
      if (!drawn) {
        advance<false, false>(gaussian, scalars.std, v, x, next, stretch.count, sums, nullptr, {}, {});
        return;
      }
      char* to = drawn.at(stretch.channel, stretch.position);
      if (streams) {
        advance<true, true>(gaussian, scalars.std, v, x, next, stretch.count, sums, to, drawn.format, drawn.format);
      } else {
        advance<true, false>(gaussian, scalars.std, v, x, next, stretch.count, sums, to, drawn.format, inputs.next_sample.format);
      }
    });
    if (problem.draws) write_tile<Lanes>(inputs.next_sample, shape, piece, tiles[4], spare);
    if (problem.log_prob == nullptr) return;
    for (int64_t p = 0; p < length; p += kWidth) {
      V::store(squares + p, Gaussian<Lanes>::log_prob(V::load(squares + p), scalars));
    }
    std::memcpy(problem.log_prob + piece.sample * shape.positions() + piece.first, squares, piece.count * sizeof(float));
  }

  // Adds the squares of the deviations of the next sample: the one given, or the one drawn with the noise given, as numbers of the
  // format `rounded`, and written in that of `to`.
  template <bool kDraws, bool kStreams>
  static void advance(Gaussian<Lanes> gaussian, float std, Floats v, Floats x, Floats given, int64_t count, float* squares,
                      char* to, Format written, Format rounded) {
    for (int64_t line = 0; line < count; line += kLine) {
      for (const float* ahead : {v.ahead, x.ahead, given.ahead}) __builtin_prefetch(ahead + line, 0, 2);
#pragma GCC unroll 4
      for (int64_t p = line; p < line + kLine; p += kWidth) {
        const Vec from = V::load(x.now + p), shift = gaussian.shift(V::load(v.now + p), from);
        Vec next = V::load(given.now + p);
        if (kDraws) {
          next = Lanes::fma(V::set(std), next, from + shift);
          if (kStreams) {
            Lanes::stream(reinterpret_cast<float*>(to) + p, next);
          } else {
            next = V::rounded(next, rounded);
            V::write(to, written, p, next);
          }
        }
        const Vec deviation = gaussian.deviation(next, from, shift);
        V::store(squares + p, Lanes::fma(deviation, deviation, V::load(squares + p)));
      }
    }
  }
};

}  // namespace
}  // namespace star_kernels
