// Latents as pieces of rows of floats, and the arithmetic of the deviation x' - mu: what the transition and the policy loss
// share. Written once over the vectors of an instruction set and included by one source per set, after the switch to that
// set, hence the anonymous namespace.
//
// `Lanes` gives Vec (kWidth floats), Int (as many 32-bit integers), fma, evens, odds, low_pairs, high_pairs, from_half,
// to_half, stream and fence.
#pragma once

#include "gaussian_kernels.h"

#include <algorithm>
#include <cstring>

#define STAR_INLINE inline __attribute__((always_inline))

namespace star_kernels {
namespace {

template <typename Lanes>
struct Vectors {
  using Vec = typename Lanes::Vec;
  using Int = typename Lanes::Int;
  using Short = typename Lanes::Short;
  static constexpr int64_t kWidth = Lanes::kWidth;

  static STAR_INLINE Vec load(const float* from) {
    Vec value;
    std::memcpy(&value, from, sizeof value);
    return value;
  }
  static STAR_INLINE void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
  static STAR_INLINE Vec set(float value) { return value - Vec{}; }
  static STAR_INLINE Int bits(Vec value) { return (Int)value; }
  static STAR_INLINE Vec floats(Int bits) { return (Vec)bits; }
  // A vector of all ones or all zeros in each lane picks the value or 0.
  static STAR_INLINE Vec keep(Int mask, Vec value) { return floats(mask & bits(value)); }
  static STAR_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static STAR_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static STAR_INLINE Int is_finite(Vec value) { return (bits(value) & 0x7fffffff) < 0x7f800000; }

  // e^x for |x| <= 20, to 2e-7 of it, and exactly 1 at 0.
  static STAR_INLINE Vec exp(Vec x) {
    const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec shifted = Lanes::fma(x, set(1.44269504088896341f), set(shifter)), power = shifted - shifter;
    Vec rest = Lanes::fma(power, set(-0.693145751953125f), x);
    rest = Lanes::fma(power, set(-1.42860682030941723e-6f), rest);
    Vec series = set(1.0f / 720);
    series = Lanes::fma(series, rest, set(1.0f / 120));
    series = Lanes::fma(series, rest, set(1.0f / 24));
    series = Lanes::fma(series, rest, set(1.0f / 6));
    series = Lanes::fma(series, rest, set(0.5f));
    series = Lanes::fma(series, rest, set(1.0f));
    series = Lanes::fma(series, rest, set(1.0f));
    return floats(bits(series) + ((bits(shifted) - 0x4b400000) << 23));
  }

  static STAR_INLINE Vec from_brain(Short values) {
    return floats(__builtin_convertvector(values, Int) << 16);
  }
  static STAR_INLINE Short to_brain(Vec value) {
    const Int all = bits(value), half_up = ((all >> 16) & 1) + 0x7fff;
    const Int rounded = value == value ? (all + half_up) >> 16 : (all >> 16) | 0x40;
    return __builtin_convertvector(rounded & 0xffff, Short);
  }

  // kWidth numbers of any format from memory, and back.
  static STAR_INLINE Vec read(const void* from, Format format, int64_t index) {
    if (format == Format::float32) return load(static_cast<const float*>(from) + index);
    Short values;
    std::memcpy(&values, static_cast<const uint16_t*>(from) + index, sizeof values);
    return format == Format::bfloat16 ? from_brain(values) : Lanes::from_half(values);
  }
  static STAR_INLINE void write(void* to, Format format, int64_t index, Vec value) {
    if (format == Format::float32) return store(static_cast<float*>(to) + index, value);
    const Short values = format == Format::bfloat16 ? to_brain(value) : Lanes::to_half(value);
    std::memcpy(static_cast<uint16_t*>(to) + index, &values, sizeof values);
  }
  // What reading gives after writing.
  static STAR_INLINE Vec rounded(Vec value, Format format) {
    if (format == Format::float32) return value;
    return format == Format::bfloat16 ? from_brain(to_brain(value)) : Lanes::from_half(Lanes::to_half(value));
  }
};

inline int64_t bytes_of(Format format) { return format == Format::float32 ? 4 : 2; }

// `count` numbers from position `index` of `from`, as floats, followed by zeros up to whole vectors.
template <typename Lanes>
void read_floats(float* to, const void* from, Format format, int64_t index, int64_t count) {
  using V = Vectors<Lanes>;
  const int64_t whole = count / V::kWidth * V::kWidth;
  for (int64_t i = 0; i < whole; i += V::kWidth) V::store(to + i, V::read(from, format, index + i));
  if (whole == count) return;
  alignas(64) char rest[4 * V::kWidth] = {};
  const int64_t bytes = bytes_of(format);
  std::memcpy(rest, static_cast<const char*>(from) + (index + whole) * bytes, (count - whole) * bytes);
  V::store(to + whole, V::read(rest, format, 0));
}

// The way back. `from` is readable up to whole vectors.
template <typename Lanes>
void write_floats(void* to, Format format, int64_t index, const float* from, int64_t count) {
  using V = Vectors<Lanes>;
  const int64_t whole = count / V::kWidth * V::kWidth;
  for (int64_t i = 0; i < whole; i += V::kWidth) V::write(to, format, index + i, V::load(from + i));
  if (whole == count) return;
  alignas(64) char rest[4 * V::kWidth];
  V::write(rest, format, 0, V::load(from + whole));
  const int64_t bytes = bytes_of(format);
  std::memcpy(static_cast<char*>(to) + (index + whole) * bytes, rest, (count - whole) * bytes);
}

// [kWidth, kChannels] -> [kChannels][stride]: each round sends the even lanes to the first half of the vectors and the odd
// ones to the second, which moves the lowest bit of the index to the top; after log2(kChannels) rounds the channel is there.
template <typename Lanes, int kChannels>
STAR_INLINE void split_channels(const float* from, float* to, int64_t stride) {
  using V = Vectors<Lanes>;
  typename V::Vec values[kChannels], next[kChannels];
  for (int i = 0; i < kChannels; ++i) values[i] = V::load(from + i * V::kWidth);
  for (int rounds = 1; rounds < kChannels; rounds *= 2) {
    for (int i = 0; i < kChannels / 2; ++i) {
      next[i] = Lanes::evens(values[2 * i], values[2 * i + 1]);
      next[i + kChannels / 2] = Lanes::odds(values[2 * i], values[2 * i + 1]);
    }
    std::memcpy(values, next, sizeof values);
  }
  for (int i = 0; i < kChannels; ++i) V::store(to + i * stride, values[i]);
}

// [count, channels] -> [channels][kTile].
template <typename Lanes>
void split_channels(const float* from, int64_t channels, int64_t count, float* to) {
  int64_t done = count / Lanes::kWidth * Lanes::kWidth;
  for (int64_t p = 0; p + Lanes::kWidth <= count; p += Lanes::kWidth) {
    const float* block = from + p * channels;
    switch (channels) {
      case 2: split_channels<Lanes, 2>(block, to + p, kTile); break;
      case 4: split_channels<Lanes, 4>(block, to + p, kTile); break;
      case 8: split_channels<Lanes, 8>(block, to + p, kTile); break;
      case 16: split_channels<Lanes, 16>(block, to + p, kTile); break;
      case 32: split_channels<Lanes, 32>(block, to + p, kTile); break;
      default: done = 0;
    }
  }
  for (int64_t p = done; p < count; ++p) {
    for (int64_t c = 0; c < channels; ++c) to[c * kTile + p] = from[p * channels + c];
  }
}

// [kChannels][stride] -> [kWidth, kChannels]: the rounds of split_channels backwards.
template <typename Lanes, int kChannels>
STAR_INLINE void join_channels(const float* from, int64_t stride, float* to) {
  using V = Vectors<Lanes>;
  typename V::Vec values[kChannels], next[kChannels];
  for (int i = 0; i < kChannels; ++i) values[i] = V::load(from + i * stride);
  for (int rounds = 1; rounds < kChannels; rounds *= 2) {
    for (int i = 0; i < kChannels / 2; ++i) {
      next[2 * i] = Lanes::low_pairs(values[i], values[i + kChannels / 2]);
      next[2 * i + 1] = Lanes::high_pairs(values[i], values[i + kChannels / 2]);
    }
    std::memcpy(values, next, sizeof values);
  }
  for (int i = 0; i < kChannels; ++i) V::store(to + i * V::kWidth, values[i]);
}

// [channels][kTile] -> [count, channels].
template <typename Lanes>
void join_channels(const float* from, int64_t channels, int64_t count, float* to) {
  int64_t done = count / Lanes::kWidth * Lanes::kWidth;
  for (int64_t p = 0; p + Lanes::kWidth <= count; p += Lanes::kWidth) {
    float* block = to + p * channels;
    switch (channels) {
      case 2: join_channels<Lanes, 2>(from + p, kTile, block); break;
      case 4: join_channels<Lanes, 4>(from + p, kTile, block); break;
      case 8: join_channels<Lanes, 8>(from + p, kTile, block); break;
      case 16: join_channels<Lanes, 16>(from + p, kTile, block); break;
      case 32: join_channels<Lanes, 32>(from + p, kTile, block); break;
      default: done = 0;
    }
  }
  for (int64_t p = done; p < count; ++p) {
    for (int64_t c = 0; c < channels; ++c) to[p * channels + c] = from[c * kTile + p];
  }
}

// Positions [first, first + count) of one sample.
struct Range {
  int64_t sample, first, count;
};

// Where a channel's positions begin in memory; for channels_last, where all channels of the position do.
inline int64_t index_of(const LatentView& view, const LatentShape& shape, const Range& range, int64_t channel) {
  if (view.channels_last) return (range.sample * shape.positions() + range.first) * shape.channels;
  return (range.sample * shape.channels + channel) * shape.positions() + range.first;
}

// `count` positions rounded up to whole tiles.
inline int64_t whole_tiles(int64_t count) { return (count + kTile - 1) / kTile * kTile; }

// Floats of a piece that stay in the second-level cache until its gradient is made of them, and the most blocks of a piece.
constexpr int64_t kHeldFloats = 1 << 16, kMostBlocks = 4;

// The most positions of flat channels that are worked on at a time, `floats` numbers each being held: what comes from memory in
// long rows, which the hardware's prefetchers follow, and what is in a cache two tiles at a time, from the first level.
inline int64_t longest_piece(int64_t floats, bool beyond_cache) {
  return beyond_cache ? std::clamp<int64_t>(kHeldFloats / (floats * kBlock), 1, kMostBlocks) * kBlock : 2 * kTile;
}

// Calls work(piece) on the positions of blocks [begin, end), in order: whole tiles of one sample, `longest` positions at most
// (kTile where channels are not flat), or what is left of a tile at a sample's end.
template <typename Work>
void for_each_piece(const LatentShape& shape, int64_t begin, int64_t end, int64_t longest, const Work& work) {
  for (int64_t sample = begin / shape.blocks(); sample * shape.blocks() < end; ++sample) {
    const int64_t before = sample * shape.blocks();
    const int64_t stop = std::min((end - before) * kBlock, shape.positions());
    for (int64_t first = std::max<int64_t>(begin - before, 0) * kBlock; first < stop;) {
      const int64_t left = std::min(stop - first, longest), count = left < kTile ? left : left / kTile * kTile;
      work(Range{sample, first, count});
      first += count;
    }
  }
}

// Channels of a piece: numbers of a format, `stride` of them from channel to channel. Without data where there are none.
struct Rows {
  char* data = nullptr;
  Format format = Format::float32;
  int64_t stride = kTile;

  explicit operator bool() const { return data != nullptr; }
  char* at(int64_t channel, int64_t position) const {
    return data == nullptr ? nullptr : data + (channel * stride + position) * bytes_of(format);
  }
};

// Whether the numbers of a piece lie in memory as the loops want them.
inline bool in_place(const LatentView& view, const Range& piece) {
  return !view.channels_last && piece.count % kTile == 0;
}

inline Rows direct_rows(const LatentView& view, const LatentShape& shape, const Range& piece) {
  const int64_t begin = index_of(view, shape, piece, 0);
  return {static_cast<char*>(view.data) + begin * bytes_of(view.format), view.format, shape.positions()};
}

inline Rows buffer_rows(float* buffer) { return {reinterpret_cast<char*>(buffer)}; }

// A piece of a latent, or none: straight from memory where that holds it, else, for one tile, as floats in `buffer`, with zeros
// beyond its end. Both buffers hold [channels][kTile] floats; `spare` is free again afterwards.
template <typename Lanes>
Rows read_rows(const LatentView& view, const LatentShape& shape, const Range& piece, float* buffer, float* spare) {
  if (view.data == nullptr) return {};
  if (in_place(view, piece)) return direct_rows(view, shape, piece);
  const int64_t begin = index_of(view, shape, piece, 0);
  if (piece.count < kTile) std::memset(buffer, 0, shape.channels * kTile * sizeof(float));
  if (view.channels_last) {
    const float* floats = static_cast<const float*>(view.data) + begin;
    if (view.format != Format::float32) {
      read_floats<Lanes>(spare, view.data, view.format, begin, piece.count * shape.channels);
      floats = spare;
    }
    split_channels<Lanes>(floats, shape.channels, piece.count, buffer);
  } else {
    for (int64_t c = 0; c < shape.channels; ++c) {
      read_floats<Lanes>(buffer + c * kTile, view.data, view.format, begin + c * shape.positions(), piece.count);
    }
  }
  return buffer_rows(buffer);
}

// Where to write a piece of a latent: in memory where that can hold it, else in `buffer`, from where `write_tile` takes it.
inline Rows rows_to_write(const LatentView& view, const LatentShape& shape, const Range& piece, float* buffer) {
  return in_place(view, piece) ? direct_rows(view, shape, piece) : buffer_rows(buffer);
}

// `spare` holds [channels][kTile] floats, like `buffer`.
template <typename Lanes>
void write_tile(const LatentView& view, const LatentShape& shape, const Range& tile, const float* buffer, float* spare) {
  if (in_place(view, tile)) return;
  if (view.channels_last) {
    const int64_t begin = index_of(view, shape, tile, 0);
    const bool is_float = view.format == Format::float32;
    join_channels<Lanes>(buffer, shape.channels, tile.count, is_float ? static_cast<float*>(view.data) + begin : spare);
    if (!is_float) write_floats<Lanes>(view.data, view.format, begin, spare, tile.count * shape.channels);
    return;
  }
  for (int64_t c = 0; c < shape.channels; ++c) {
    write_floats<Lanes>(view.data, view.format, index_of(view, shape, tile, c), buffer + c * kTile, tile.count);
  }
}

// Whether a piece of a latent can be written past the caches.
template <typename Lanes>
bool streamable(const LatentView& view, const LatentShape& shape, const Range& piece) {
  if (view.format != Format::float32 || !in_place(view, piece)) return false;
  const Rows rows = direct_rows(view, shape, piece);
  return rows.stride % Lanes::kWidth == 0 && reinterpret_cast<uintptr_t>(rows.data) % sizeof(typename Lanes::Vec) == 0;
}

// The numbers of a cache line, and the positions that are asked for ahead of those that are read: the prefetchers lose track
// between the pages of a row and from row to row.
constexpr int64_t kLine = 16, kAhead = 512;

// Positions of one channel of a piece, and the place of the stretch that is read after it: its own, where it is the last.
struct Stretch {
  int64_t channel, position, count, next_channel, next_position;
};

// Calls work(stretch) for stretches of at most kAhead positions, channel by channel.
template <typename Work>
void for_each_stretch(int64_t channels, int64_t positions, const Work& work) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t p = 0; p < positions; p += kAhead) {
      Stretch stretch{c, p, std::min(kAhead, positions - p), c, p};
      if (p + kAhead < positions) {
        stretch.next_position = p + kAhead;
      } else if (c + 1 < channels) {
        stretch.next_channel = c + 1;
        stretch.next_position = 0;
      }
      work(stretch);
    }
  }
}

// A stretch as floats, and what to ask memory for meanwhile, number by number.
struct Floats {
  const float *now, *ahead;
};

// A stretch of a latent: where it is, or converted into `buffer` [kAhead].
template <typename Lanes>
Floats floats_of(const Rows& rows, const Stretch& stretch, float* buffer) {
  using V = Vectors<Lanes>;
  const char *from = rows.at(stretch.channel, stretch.position), *ahead = rows.at(stretch.next_channel, stretch.next_position);
  if (rows.format == Format::float32) return {reinterpret_cast<const float*>(from), reinterpret_cast<const float*>(ahead)};
  for (int64_t line = 0; line < stretch.count; line += kLine) {
    __builtin_prefetch(ahead + line * bytes_of(rows.format), 0, 2);
    for (int64_t p = line; p < line + kLine; p += V::kWidth) V::store(buffer + p, V::read(from, rows.format, p));
  }
  return {buffer, buffer};
}

// Of v_u + g (v - v_u), or of v where there is no v_u. Both buffers hold [kAhead].
template <typename Lanes>
Floats guided_floats(const Rows& velocity, const Rows& unconditional, float guidance_scale, const Stretch& stretch,
                     float* buffer, float* other) {
  using V = Vectors<Lanes>;
  const Floats v = floats_of<Lanes>(velocity, stretch, buffer);
  if (!unconditional) return v;
  const Floats u = floats_of<Lanes>(unconditional, stretch, other);
  for (int64_t line = 0; line < stretch.count; line += kLine) {
    for (const float* ahead : {v.ahead, u.ahead}) __builtin_prefetch(ahead + line, 0, 2);
    for (int64_t p = line; p < line + kLine; p += V::kWidth) {
      const typename V::Vec base = V::load(u.now + p);
      V::store(buffer + p, Lanes::fma(V::set(guidance_scale), V::load(v.now + p) - base, base));
    }
  }
  return {buffer, buffer};
}

// The arithmetic of docs/method.md, section 2, for one vector. The two latents are subtracted first: they are close where s
// is small.
template <typename Lanes>
struct Gaussian {
  using V = Vectors<Lanes>;
  using Vec = typename V::Vec;
  Vec sample_drift, velocity_scale;

  explicit Gaussian(const TransitionScalars& scalars)
      : sample_drift(V::set(scalars.sample_drift)), velocity_scale(V::set(scalars.velocity_scale)) {}

  STAR_INLINE Vec shift(Vec velocity, Vec sample) const {
    return Lanes::fma(velocity_scale, velocity, sample_drift * sample);
  }
  STAR_INLINE Vec deviation(Vec next_sample, Vec sample, Vec shift) const { return (next_sample - sample) - shift; }
  static STAR_INLINE Vec log_prob(Vec squares, const TransitionScalars& scalars) {
    return Lanes::fma(squares, V::set(scalars.log_prob_scale), V::set(scalars.log_prob_offset));
  }
};

}  // namespace
}  // namespace star_kernels
