// Latents as tiles of floats, and the arithmetic of the deviation x' - mu: what the transition and the policy loss share.
// Written once over the vectors of an instruction set and included by one source per set, after the switch to that
// set, hence the anonymous namespace.
//
// `Lanes` gives Vec (kWidth floats), Int (as many 32-bit integers), fma, evens, odds, low_pairs, high_pairs, from_half,
// to_half and stream.
#pragma once

#include "gaussian_kernels.h"

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

inline Range block_at(const LatentShape& shape, int64_t index) {
  const int64_t first = index % shape.blocks() * kBlock, left = shape.positions() - first;
  return {index / shape.blocks(), first, left < kBlock ? left : kBlock};
}

inline Range tile_at(const Range& block, int64_t offset) {
  const int64_t left = block.count - offset;
  return {block.sample, block.first + offset, left < kTile ? left : kTile};
}

// Where a channel's positions begin in memory; for channels_last, where all channels of the position do.
inline int64_t index_of(const LatentView& view, const LatentShape& shape, const Range& range, int64_t channel) {
  if (view.channels_last) return (range.sample * shape.positions() + range.first) * shape.channels;
  return (range.sample * shape.channels + channel) * shape.positions() + range.first;
}

// Whether the numbers of a tile lie in memory as the loops want them.
inline bool in_place(const LatentView& view, const Range& tile) {
  return view.format == Format::float32 && !view.channels_last && tile.count == kTile;
}

// Channels of kTile floats each.
struct Tile {
  float* data = nullptr;
  int64_t stride = kTile;

  float* at(int64_t channel, int64_t position) const { return data + channel * stride + position; }
};

// The tile where it lies in memory.
inline Tile direct_tile(const LatentView& view, const LatentShape& shape, const Range& tile) {
  return {static_cast<float*>(view.data) + index_of(view, shape, tile, 0), shape.positions()};
}

// A tile of a latent: straight from memory where that holds it, else converted into `buffer`, with zeros beyond its end. Both
// buffers hold [channels][kTile] floats; `spare` is free again afterwards.
template <typename Lanes>
Tile read_tile(const LatentView& view, const LatentShape& shape, const Range& tile, float* buffer, float* spare) {
  if (in_place(view, tile)) return direct_tile(view, shape, tile);
  const int64_t begin = index_of(view, shape, tile, 0);
  if (tile.count < kTile) std::memset(buffer, 0, shape.channels * kTile * sizeof(float));
  if (view.channels_last) {
    const float* floats = static_cast<const float*>(view.data) + begin;
    if (view.format != Format::float32) {
      read_floats<Lanes>(spare, view.data, view.format, begin, tile.count * shape.channels);
      floats = spare;
    }
    split_channels<Lanes>(floats, shape.channels, tile.count, buffer);
  } else {
    for (int64_t c = 0; c < shape.channels; ++c) {
      read_floats<Lanes>(buffer + c * kTile, view.data, view.format, begin + c * shape.positions(), tile.count);
    }
  }
  return {buffer};
}

// Where to write a tile of a latent: in memory where that can hold it, else in `buffer`, from where `write_tile` takes it.
inline Tile tile_to_write(const LatentView& view, const LatentShape& shape, const Range& tile, float* buffer) {
  return in_place(view, tile) ? direct_tile(view, shape, tile) : Tile{buffer};
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

// Vectors of positions that are worked on together, their sums over channels in registers, and the positions they cover.
constexpr int kTogether = 8;
template <typename Lanes>
constexpr int64_t kSpan = kTogether * Lanes::kWidth;

// The block that comes next, of latents that are read in place. It is asked for while this one is worked on, in the order in
// which it lies in memory: then the hardware's prefetchers run ahead within each page. They would not with a few lines of every
// channel at a time, and the requests that a core itself can have in flight do not fill the bandwidth of memory.
class BlockAhead {
  static constexpr int kMost = 4;

 public:
  void add(const LatentView& view, const LatentShape& shape, const Range& block) {
    if (view.data == nullptr || view.channels_last || block.count < kBlock) return;
    const int64_t bytes = bytes_of(view.format);
    const char* data = static_cast<const char*>(view.data) + index_of(view, shape, block, 0) * bytes;
    latents_[count_++] = {data, shape.positions() * bytes, kTile * bytes, bytes};
  }

  bool empty() const { return count_ == 0; }

  // Chunk kBlock / kTile * c + i is tile i of channel c; a block has as many chunks as its tiles have channels in all.
  STAR_INLINE void fetch(int64_t chunk) const {
    constexpr int64_t kLine = 64, kChunks = kBlock / kTile;
    for (int i = 0; i < count_; ++i) {
      const Latent& latent = latents_[i];
      const char* from = latent.data + chunk / kChunks * latent.channel_bytes + chunk % kChunks * latent.chunk_bytes;
      for (int64_t byte = 0; byte < latent.chunk_bytes; byte += kLine) __builtin_prefetch(from + byte, 0, 2);
    }
  }

  // Chunk `chunk` of every latent, from number `index` on, to be fetched with the vectors of a loop.
  template <int64_t kWidth>
  class Chunks {
   public:
    STAR_INLINE Chunks(const BlockAhead& ahead, int64_t chunk, int64_t index) : count_(ahead.count_) {
      constexpr int64_t kChunks = kBlock / kTile;
      for (int i = 0; i < count_; ++i) {
        const Latent& latent = ahead.latents_[i];
        from_[i] = latent.data + chunk / kChunks * latent.channel_bytes + chunk % kChunks * latent.chunk_bytes +
                   index * latent.number_bytes;
        step_[i] = kWidth * latent.number_bytes;
      }
    }

    // What lies beside vector `vector` of the loop.
    STAR_INLINE void fetch(int64_t vector) const {
      for (int i = 0; i < kMost; ++i) {
        if (i < count_) __builtin_prefetch(from_[i] + vector * step_[i], 0, 2);
      }
    }

   private:
    const char* from_[kMost] = {};
    int64_t step_[kMost] = {};
    int count_;
  };

 private:
  struct Latent {
    const char* data;
    int64_t channel_bytes, chunk_bytes, number_bytes;
  };

  Latent latents_[kMost];
  int count_ = 0;
};

// v_u + g (v - v_u) in `other`, or v where there is no v_u.
template <typename Lanes>
Tile guided_tile(const TransitionInputs& inputs, const Range& tile, float* buffer, float* other, float* spare) {
  using V = Vectors<Lanes>;
  const Tile velocity = read_tile<Lanes>(inputs.velocity, inputs.shape, tile, buffer, spare);
  if (inputs.unconditional_velocity.data == nullptr) return velocity;
  const Tile unconditional = read_tile<Lanes>(inputs.unconditional_velocity, inputs.shape, tile, other, spare);
  for (int64_t c = 0; c < inputs.shape.channels; ++c) {
    for (int64_t p = 0; p < kTile; p += V::kWidth) {
      const typename V::Vec conditional = V::load(velocity.at(c, p)), base = V::load(unconditional.at(c, p));
      V::store(other + c * kTile + p, Lanes::fma(V::set(inputs.guidance_scale), conditional - base, base));
    }
  }
  return {other};
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
