// The tiles of joint attention, written once over the vectors of an instruction set. Included by one source per set, after
// the switch to that set, hence the anonymous namespace: each source has its own copy, compiled for its own instructions.
//
// `Lanes` gives Vec (kWidth floats), aligned load and store, store_first (only the first lanes, unaligned), read (of any scalar,
// unaligned), turn (kWidth vectors transposed), first (the other lanes zero), if_below (the first vector where its magnitude is
// below a bound, else the second), arithmetic, min, max, sum and exp2, and the shape of a product tile: kRows rows by kColumns
// vectors of accumulators, chosen to fill the register file.
// `Element` is what products are made of: float, or Bf16Pair, two neighbours of the inner dimension in one 32-bit element.
#pragma once

#include "attention_kernel.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>

#define STAR_INLINE inline __attribute__((always_inline))

namespace star_kernels {
namespace {

constexpr int64_t kKeyBlock = 256;  // keys between two looks at the row maximum
constexpr int64_t kSubRows = 24;    // rows whose logits of one key block stay in the first level of cache
// Row stride of a block of logits, in floats. Not a power of two: rows would share cache sets.
constexpr int64_t kLogitsStride = kKeyBlock + 16;
// Of a row maximum before the first key: finite, so that a logit of -inf has a difference to it.
constexpr float kLowest = -3e38f;
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
// Of a scaled row maximum: from here on float32 is so coarse that its rounding moves every exponent of the row by up to 8,
// further up beyond what exp2 can take.
constexpr float kHuge = 268435456.0f;

struct Bf16Pair {
  uint32_t bits;
};

// Neighbours of the inner dimension in one element.
template <typename Element>
constexpr int64_t kPerElement = 1;
template <>
constexpr int64_t kPerElement<Bf16Pair> = 2;

// What logits are multiplied with, before exp2. In a row whose maximum would be huge the factor is a power of two, so that
// the maximum is exact and the largest exponent 0. Two logits that differ are then so far apart, by 16 or more in the
// exponent, that a factor up to twice as large changes no probability by more than 2^-16.
struct Scales {
  explicit Scales(float scale) : plain(scale * kLog2E), huge(std::exp2(std::ceil(std::log2(plain)))) {}
  float plain, huge;
  float of(float scaled_maximum) const { return std::abs(scaled_maximum) < kHuge ? plain : huge; }
  // The maximum by the plain factor.
  float plainly(float scaled_maximum) const {
    return std::abs(scaled_maximum) < kHuge ? scaled_maximum : scaled_maximum / huge * plain;
  }
};

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Element `index` of a row of n scalars, zero beyond its end.
template <typename Scalar>
STAR_INLINE void read(float& element, const Scalar* row, int64_t index, int64_t n) {
  element = index < n ? static_cast<float>(row[index]) : 0.0f;
}
STAR_INLINE void read(Bf16Pair& element, const c10::BFloat16* row, int64_t index, int64_t n) {
  const uint32_t low = 2 * index < n ? row[2 * index].x : 0, high = 2 * index + 1 < n ? row[2 * index + 1].x : 0;
  element.bits = low | high << 16;
}

// Element of row `first` and the row below it, in pairs along the rows.
STAR_INLINE void read_down(Bf16Pair& element, const c10::BFloat16* first, const c10::BFloat16* second, int64_t index, int64_t n) {
  const uint32_t low = index < n ? first[index].x : 0, high = index < n && second != nullptr ? second[index].x : 0;
  element.bits = low | high << 16;
}

// 2^x for x in [0, 1], relative error below 1.5e-7 in float32 arithmetic: the minimax polynomial of degree 5.
template <typename Lanes>
STAR_INLINE typename Lanes::Vec exp2_fraction(typename Lanes::Vec x) {
  typename Lanes::Vec y = Lanes::set1(1.877576811e-03f);
  y = Lanes::fma(y, x, Lanes::set1(8.989339694e-03f));
  y = Lanes::fma(y, x, Lanes::set1(5.582631752e-02f));
  y = Lanes::fma(y, x, Lanes::set1(2.401536107e-01f));
  y = Lanes::fma(y, x, Lanes::set1(6.931530833e-01f));
  return Lanes::fma(y, x, Lanes::set1(9.999999404e-01f));
}

template <typename Lanes, typename Scalar, typename Element>
struct Attention {
  using Vec = typename Lanes::Vec;
  static constexpr int64_t kWidth = Lanes::kWidth, kRows = Lanes::kRows, kColumns = Lanes::kColumns;
  static constexpr int64_t kPanel = kColumns * kWidth;
  static constexpr int64_t kPer = kPerElement<Element>;
  static constexpr bool kPairs = kPer == 2;
  static constexpr int64_t kMaxima = ceil_div(kSubRows, kWidth) * kWidth;
  static_assert(kColumns == 2, "a tail is one vector");
  static_assert(kTaskRows % kSubRows == 0 && kSubRows % kRows == 0 && kKeyBlock % kPanel == 0 && kPanel % kPer == 0);

  // One range of keys of one head, packed: keys in panels [depth][kPanel], values in blocks of panels [keys][kPanel].
  struct PackedKeys {
    Element* keys;
    Element* values;
    int64_t count;
  };

  struct Scratch {
    PackedKeys image, text;
    Element* query;        // [group][depth][kRows]
    float* logits;         // [kSubRows][kLogitsStride]; in the end probabilities
    Element* probability;  // the same in pairs
    float* row_largest;    // [kMaxima][kWidth]
    float* normaliser;     // [kTaskRows][kWidth], summed over the vector at the end
    float* largest;        // [sub-block][kMaxima], of the scaled logits, base 2
    float* rescale;        // [kMaxima]
    float* out;            // [kTaskRows][value_width]
    float* mass;           // [kTaskRows][units_stride]
  };

  // Takes memory off a block, or counts how much it takes where there is none.
  struct Arena {
    char* base;
    int64_t used;
    template <typename T>
    T* take(int64_t count) {
      T* start = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
      used += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
      return start;
    }
  };

  // Where the maximum of a row of the task stands in `largest`: each sub-block starts on a whole vector.
  static int64_t maximum_of(int64_t row) { return row / kSubRows * kMaxima + row % kSubRows; }
  template <typename Problem>
  static int64_t depth(const Problem& p) {
    return ceil_div(p.head_dim, kPer);
  }
  static int64_t value_width(const AttentionProblem& p) { return ceil_div(p.head_dim, kPanel) * kPanel; }

  static PackedKeys take_keys(const AttentionProblem& p, int64_t count, Arena& arena) {
    PackedKeys packed{};
    packed.count = count;
    packed.keys = arena.template take<Element>(ceil_div(count, kPanel) * kPanel * depth(p));
    packed.values = arena.template take<Element>(ceil_div(count, kKeyBlock) * kKeyBlock / kPer * value_width(p));
    return packed;
  }

  static Scratch take_scratch(const AttentionProblem& p, Arena& arena) {
    Scratch s{};
    s.image = take_keys(p, p.image_keys.size(), arena);
    s.text = take_keys(p, p.text_keys.size(), arena);
    s.query = arena.template take<Element>(kTaskRows * depth(p));
    s.logits = arena.template take<float>(kSubRows * kLogitsStride);
    s.probability = kPairs ? arena.template take<Element>(kSubRows * kLogitsStride / kPer) : nullptr;
    s.row_largest = arena.template take<float>(kMaxima * kWidth);
    s.normaliser = arena.template take<float>(kTaskRows * kWidth);
    s.largest = arena.template take<float>(kTaskRows / kSubRows * kMaxima);
    s.rescale = arena.template take<float>(kMaxima);
    s.out = arena.template take<float>(kTaskRows * value_width(p));
    s.mass = arena.template take<float>(kTaskRows * p.units_stride);
    return s;
  }

  static int64_t scratch_bytes(const AttentionProblem& p) {
    Arena arena{nullptr, 0};
    take_scratch(p, arena);
    return arena.used;
  }

  static const Scalar* row(const HeadsView& view, int64_t b, int64_t head, int64_t token) {
    return static_cast<const Scalar*>(view.data) + b * view.batch + head * view.head + token * view.token;
  }

  // kWidth elements of a row from `index` on, zero beyond its end.
  static STAR_INLINE Vec read_vector(const Scalar* row, int64_t index, int64_t n) {
    if ((index + kWidth) * kPer <= n) return Lanes::read(row + index * kPer, Element{});
    alignas(64) Element elements[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) star_kernels::read(elements[i], row, index + i, n);
    return Lanes::load(elements);
  }

  // `count` rows, which `row_at` finds, to groups [depth][kGroup] whose columns they are. The last row fills what is left of
  // the last group, so that no logit of a column beyond the end is larger than all others. Rows lie far from each other in
  // memory, so the next ones are asked for while these are turned.
  template <int64_t kGroup, typename Problem, typename RowAt>
  static void pack_turned(const Problem& p, const RowAt& row_at, int64_t count, Element* to) {
    const int64_t n = depth(p);
    for (int64_t group = 0; group < count; group += kGroup) {
      for (int64_t c = 0; c < kGroup; c += kWidth) {
        const int64_t lanes = smaller(kWidth, kGroup - c);
        for (int64_t d = 0; d < n; d += kWidth) {
          Vec rows[kWidth];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kWidth; ++i) {
            rows[i] = read_vector(row_at(smaller(group + c + i, count - 1)), d, p.head_dim);
            __builtin_prefetch(row_at(smaller(group + c + lanes + i, count - 1)) + d * kPer);
          }
          Lanes::turn(rows);
          Element* target = to + group * n + d * kGroup + c;
          for (int64_t i = 0; i < smaller(kWidth, n - d); ++i) Lanes::store_first(target + i * kGroup, rows[i], lanes);
        }
      }
    }
  }

  // `count` rows to [key block][panel][kKeyBlock / kPer][kPanel], zero beyond head_dim and, in pairs, beyond the last key.
  static void pack_values(const AttentionProblem& p, const Scalar* from, int64_t stride, int64_t count, Element* to) {
    const int64_t width = value_width(p);
    for (int64_t j = 0; j < count; j += kPer) {
      const Scalar* first = from + j * stride;
      const Scalar* second = j + 1 < count ? first + stride : nullptr;
      const Scalar* later = from + smaller(j + 8, count - 1) * stride;
      Element* block = to + j / kKeyBlock * kKeyBlock / kPer * width + j % kKeyBlock / kPer * kPanel;
      for (int64_t d = 0; d < width; d += kWidth) {
        __builtin_prefetch(later + smaller(d, p.head_dim - 1));
        if (kPairs) __builtin_prefetch(later + stride + smaller(d, p.head_dim - 1));
        Element* target = block + d / kPanel * (kKeyBlock / kPer * kPanel) + d % kPanel;
        Lanes::store_first(target, read_values(first, second, d, p.head_dim), kWidth);
      }
    }
  }
  static STAR_INLINE Vec read_values(const Scalar* first, const Scalar* second, int64_t d, int64_t n) {
    if constexpr (kPairs) {
      if (d + kWidth <= n && second != nullptr) return Lanes::read_down(first + d, second + d);
      alignas(64) Element elements[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) star_kernels::read_down(elements[i], first, second, d + i, n);
      return Lanes::load(elements);
    } else {
      return read_vector(first, d, n);
    }
  }

  // acc[r][v] += sum over i < n of a[r * row_stride + i * step] * b[i * b_stride + v * kWidth ...].
  template <int64_t kVectors, typename E>
  static STAR_INLINE void multiply(Vec (&acc)[kRows][kVectors], const E* a, int64_t row_stride, int64_t step, const E* b,
                                   int64_t b_stride, int64_t n) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < n; ++i) {
      Vec columns[kVectors];
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) columns[v] = Lanes::load(b + v * kWidth);
#pragma GCC unroll 16
      for (int64_t r = 0; r < kRows; ++r) {
        const Vec left = Lanes::set1(a[r * row_stride]);
#pragma GCC unroll 4
        for (int64_t v = 0; v < kVectors; ++v) acc[r][v] = Lanes::multiply_add(left, columns[v], acc[r][v], E{});
      }
      a += step;
      b += b_stride;
    }
  }

  // A tile of logits, and the running largest of each row and lane.
  template <int64_t kVectors, bool kLargest>
  static STAR_INLINE void logits_tile(const Element* query, const Element* keys, int64_t n, float* logits, float* row_largest) {
    Vec acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) acc[r][v] = Lanes::zero();
    }
    multiply<kVectors>(acc, query, 1, kRows, keys, kPanel, n);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      Vec largest = kLargest ? Lanes::load(row_largest + r * kWidth) : Lanes::zero();
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        Lanes::store(logits + r * kLogitsStride + v * kWidth, acc[r][v]);
        if (kLargest) largest = Lanes::max(largest, acc[r][v]);
      }
      if (kLargest) Lanes::store(row_largest + r * kWidth, largest);
    }
  }

  // Logits of `groups` groups of rows and `count` keys, from a panel boundary on.
  template <bool kLargest>
  static void logits_block(const Element* query, const Element* keys, int64_t n, int64_t groups, int64_t count, float* logits,
                           float* row_largest) {
    for (int64_t c = 0; c < count; c += kPanel) {
      const Element* panel = keys + c * n;
      for (int64_t g = 0; g < groups; ++g) {
        float* tile = logits + g * kRows * kLogitsStride + c;
        const Element* rows = query + g * kRows * n;
        float* largest = kLargest ? row_largest + g * kRows * kWidth : nullptr;
        if (count - c > kPanel - kWidth) {
          logits_tile<kColumns, kLargest>(rows, panel, n, tile, largest);
        } else {
          logits_tile<kColumns - 1, kLargest>(rows, panel, n, tile, largest);
        }
      }
    }
  }
  // out[r][...] = out[r][...] * rescale[r] + sum over i < n of a(r, i) * b[i][...], for one group of rows and one panel.
  template <int64_t kVectors, typename E>
  static STAR_INLINE void accumulate_tile(const E* a, int64_t row_stride, const E* b, int64_t b_stride, int64_t n,
                                          const float* rescale, float* out, int64_t out_stride) {
    Vec acc[kRows][kVectors];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
      const Vec factor = Lanes::set1(rescale[r]);
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) {
        acc[r][v] = Lanes::mul(Lanes::load(out + r * out_stride + v * kWidth), factor);
      }
    }
    multiply<kVectors>(acc, a, row_stride, 1, b, b_stride, n);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) Lanes::store(out + r * out_stride + v * kWidth, acc[r][v]);
    }
  }

  // `width` columns of b in panels of kPanel that stand panel_stride apart, row by row b_stride.
  template <typename E>
  static void accumulate(const E* a, int64_t row_stride, const E* b, int64_t b_stride, int64_t panel_stride, int64_t n,
                         int64_t groups, int64_t width, const float* rescale, float* out, int64_t out_stride) {
    for (int64_t c = 0; c < width; c += kPanel) {
      const E* panel = b + c / kPanel * panel_stride;
      for (int64_t g = 0; g < groups; ++g) {
        const E* rows = a + g * kRows * row_stride;
        float* tile = out + g * kRows * out_stride + c;
        const float* factors = rescale + g * kRows;
        if (width - c > kPanel - kWidth) {
          accumulate_tile<kColumns>(rows, row_stride, panel, b_stride, n, factors, tile, out_stride);
        } else {
          accumulate_tile<kColumns - 1>(rows, row_stride, panel, b_stride, n, factors, tile, out_stride);
        }
      }
    }
  }

  // New row maxima of `rows` rows from `first` on, and the factors that bring what was summed so far there.
  static void raise_maxima(const AttentionProblem& p, const Scratch& s, int64_t first, int64_t rows) {
    const Scales scales(p.scale);
    const Vec plain = Lanes::set1(scales.plain), huge = Lanes::set1(scales.huge);
    for (int64_t r = 0; r < rows; r += kWidth) {
      Vec lines[kWidth];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kWidth; ++i) lines[i] = Lanes::load(s.row_largest + (r + i) * kWidth);
      Lanes::turn(lines);
#pragma GCC unroll 4
      for (int64_t step = kWidth / 2; step > 0; step /= 2) {
#pragma GCC unroll 8
        for (int64_t i = 0; i < step; ++i) lines[i] = Lanes::max(lines[i], lines[i + step]);
      }
      float* largest = s.largest + maximum_of(first) + r;
      const Vec old_largest = Lanes::load(largest);
      const Vec scaled = Lanes::mul(lines[0], plain);
      const Vec new_largest = Lanes::max(Lanes::if_below(kHuge, scaled, Lanes::mul(lines[0], huge)), old_largest);
      Lanes::store(s.rescale + r, Lanes::exp2(Lanes::sub(old_largest, new_largest)));
      Lanes::store(largest, new_largest);
    }
  }

  template <bool kKeep>
  static STAR_INLINE void store_probabilities(float* line, Element* pairs, int64_t column, Vec probability) {
    if constexpr (!kPairs || kKeep) Lanes::store(line + column, probability);
    if constexpr (kPairs) Lanes::store_pairs(pairs + column / kPer, probability);
  }

  // Logits to probabilities relative to the row maxima. kKeep: leave float32 probabilities in `logits` also where the product
  // with the values takes pairs.
  template <bool kKeep>
  static void softmax_rows(const AttentionProblem& p, const Scratch& s, int64_t first, int64_t rows, int64_t count) {
    const Scales scales(p.scale);
    const int64_t whole = count / kWidth * kWidth;
    for (int64_t r = 0; r < rows; ++r) {
      float* line = s.logits + r * kLogitsStride;
      Element* pairs = kPairs ? s.probability + r * kLogitsStride / kPer : nullptr;
      const float row_largest = s.largest[maximum_of(first) + r];
      const Vec largest = Lanes::set1(row_largest), scale = Lanes::set1(scales.of(row_largest));
      float* normaliser = s.normaliser + (first + r) * kWidth;
      Vec sum = Lanes::mul(Lanes::load(normaliser), Lanes::set1(s.rescale[r]));
      for (int64_t c = 0; c < whole; c += kWidth) {
        const Vec probability = Lanes::exp2(Lanes::fms(Lanes::load(line + c), scale, largest));
        sum = Lanes::add(sum, probability);
        store_probabilities<kKeep>(line, pairs, c, probability);
      }
      if (whole < count) {
        const Vec last = Lanes::exp2(Lanes::fms(Lanes::load(line + whole), scale, largest));
        const Vec probability = Lanes::first(last, count - whole);
        sum = Lanes::add(sum, probability);
        store_probabilities<kKeep>(line, pairs, whole, probability);
      }
      Lanes::store(normaliser, sum);
    }
  }

  // All queries of one sub-block against one block of keys.
  template <bool kCapture>
  static void attend_keys(const AttentionProblem& p, const Scratch& s, const PackedKeys& packed, int64_t first_key,
                          int64_t first_row, int64_t rows, const float* unit_weights) {
    const int64_t n = depth(p), count = smaller(kKeyBlock, packed.count - first_key), groups = ceil_div(rows, kRows);
    const int64_t width = value_width(p);
    for (int64_t r = 0; r < ceil_div(groups * kRows, kWidth) * kWidth; ++r) {
      Lanes::store(s.row_largest + r * kWidth, Lanes::set1(kLowest));
    }
    logits_block<true>(s.query + first_row * n, packed.keys + first_key * n, n, groups, count, s.logits, s.row_largest);
    raise_maxima(p, s, first_row, groups * kRows);
    softmax_rows<kCapture>(p, s, first_row, groups * kRows, count);
    const Element* values = packed.values + first_key / kPer * width;
    float* out = s.out + first_row * width;
    if constexpr (kPairs) {
      accumulate(s.probability, kLogitsStride / kPer, values, kPanel, kKeyBlock / kPer * kPanel, ceil_div(count, kPer), groups,
                 p.head_dim, s.rescale, out, width);
    } else {
      accumulate(s.logits, kLogitsStride, values, kPanel, kKeyBlock * kPanel, count, groups, p.head_dim, s.rescale, out, width);
    }
    if constexpr (kCapture) {
      accumulate(s.logits, kLogitsStride, unit_weights + first_key * p.units_stride, p.units_stride, kPanel, count, groups,
                 p.units, s.rescale, s.mass + first_row * p.units_stride, p.units_stride);
    }
  }

  static bool captures(const AttentionProblem& p, int64_t b) {
    return p.unit_weights != nullptr && p.rows.begin <= b && b < p.rows.end;
  }

  static int64_t text_count(const AttentionProblem& p, int64_t b) {
    return p.text_lengths == nullptr ? p.text_keys.size() : p.text_lengths[b];
  }

  static void attend(const AttentionProblem& p, int64_t begin, int64_t end, void* memory) {
    Arena arena{static_cast<char*>(memory), 0};
    Scratch s = take_scratch(p, arena);
    const int64_t blocks = ceil_div(p.num_queries, kTaskRows);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / p.heads, head = task / blocks % p.heads;
      if (task / blocks != packed_head) {
        packed_head = task / blocks;
        s.text.count = text_count(p, b);
        for (const bool text : {false, true}) {
          const PackedKeys& packed = text ? s.text : s.image;
          const int64_t first = text ? p.text_keys.begin : p.image_keys.begin;
          if (packed.count == 0) continue;
          pack_turned<kPanel>(p, [&](int64_t i) { return row(p.key, b, head, first + i); }, packed.count, packed.keys);
          pack_values(p, row(p.value, b, head, first), p.value.token, packed.count, packed.values);
        }
      }
      attend_rows(p, s, b, head, task % blocks * kTaskRows);
    }
  }

  static void attend_rows(const AttentionProblem& p, const Scratch& s, int64_t b, int64_t head, int64_t first_query) {
    const int64_t rows = smaller(kTaskRows, p.num_queries - first_query), width = value_width(p);
    const Scales scales(p.scale);
    const float* unit_weights =
        captures(p, b) ? p.unit_weights + (b - p.rows.begin) * p.text_keys.size() * p.units_stride : nullptr;
    pack_turned<kRows>(p, [&](int64_t i) { return row(p.query, b, head, first_query + i); }, rows, s.query);
    for (int64_t i = 0; i < kTaskRows / kSubRows * kMaxima; ++i) s.largest[i] = kLowest;
    for (int64_t i = 0; i < kTaskRows * kWidth; ++i) s.normaliser[i] = 0.0f;
    for (int64_t i = 0; i < kTaskRows * width; ++i) s.out[i] = 0.0f;
    for (int64_t i = 0; i < kTaskRows * p.units_stride; ++i) s.mass[i] = 0.0f;

    for (int64_t key = 0; key < p.image_keys.size(); key += kKeyBlock) {
      for (int64_t r = 0; r < rows; r += kSubRows) {
        attend_keys<false>(p, s, s.image, key, r, smaller(kSubRows, rows - r), nullptr);
      }
    }
    for (int64_t key = 0; key < s.text.count; key += kKeyBlock) {
      for (int64_t r = 0; r < rows; r += kSubRows) {
        const int64_t count = smaller(kSubRows, rows - r), first = first_query + r;
        if (unit_weights != nullptr && first < p.image_queries.end && first + count > p.image_queries.begin) {
          attend_keys<true>(p, s, s.text, key, r, count, unit_weights);
        } else {
          attend_keys<false>(p, s, s.text, key, r, count, nullptr);
        }
      }
    }

    for (int64_t r = 0; r < rows; ++r) {
      const int64_t query = first_query + r;
      const float normaliser = Lanes::sum(Lanes::load(s.normaliser + r * kWidth));
      const float inverse = 1.0f / normaliser;
      const float largest = scales.plainly(s.largest[maximum_of(r)]);
      p.log_sum_exp[(b * p.heads + head) * p.num_queries + query] = (largest + std::log2(normaliser)) * kLn2;
      Scalar* out = static_cast<Scalar*>(p.out.data) + b * p.out.batch + head * p.out.head + query * p.out.token;
      for (int64_t d = 0; d < p.head_dim; ++d) out[d] = static_cast<Scalar>(s.out[r * width + d] * inverse);
      if (unit_weights == nullptr || query < p.image_queries.begin || query >= p.image_queries.end) continue;
      float* mass = p.head_mass + (((b - p.rows.begin) * p.heads + head) * p.image_queries.size() + query -
                                   p.image_queries.begin) * p.units;
      for (int64_t k = 0; k < p.units; ++k) mass[k] = s.mass[r * p.units_stride + k] * inverse;
    }
  }

  struct MassScratch {
    Element* text;    // panels [depth][kPanel]
    Element* image;   // [group][depth][kRows]
    float* logits;    // [kSubRows][kLogitsStride]; in the end probabilities
    float* ones;      // [kSubRows]
    float* mass;      // [kTaskRows][units_stride]
  };

  static MassScratch take_mass_scratch(const MassProblem& p, Arena& arena) {
    MassScratch s{};
    s.text = arena.template take<Element>(ceil_div(p.num_text, kPanel) * kPanel * depth(p));
    s.image = arena.template take<Element>(kTaskRows * depth(p));
    s.logits = arena.template take<float>(kSubRows * kLogitsStride);
    s.ones = arena.template take<float>(kSubRows);
    s.mass = arena.template take<float>(kTaskRows * p.units_stride);
    return s;
  }

  static int64_t mass_scratch_bytes(const MassProblem& p) {
    Arena arena{nullptr, 0};
    take_mass_scratch(p, arena);
    return arena.used;
  }

  // Tasks (row, head, block of image tokens): probabilities from log-sum-exps, times U.
  static void mass(const MassProblem& p, int64_t begin, int64_t end, void* memory) {
    Arena arena{static_cast<char*>(memory), 0};
    const MassScratch s = take_mass_scratch(p, arena);
    for (int64_t r = 0; r < kSubRows; ++r) s.ones[r] = 1.0f;
    const int64_t blocks = ceil_div(p.num_image, kTaskRows);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / blocks / p.heads, head = task / blocks % p.heads;
      if (task / blocks != packed_head && p.counts[b] > 0) {
        packed_head = task / blocks;
        const int64_t* tokens = p.tokens + b * p.num_text;
        pack_turned<kPanel>(p, [&](int64_t i) { return row(p.text, b, head, tokens[i]); }, p.counts[b], s.text);
      }
      const int64_t first = task % blocks * kTaskRows, rows = smaller(kTaskRows, p.num_image - first);
      if (p.of_text) {
        mass_rows<true>(p, s, b, head, first, rows);
      } else {
        mass_rows<false>(p, s, b, head, first, rows);
      }
    }
  }

  template <bool kOfText>
  static void mass_rows(const MassProblem& p, const MassScratch& s, int64_t b, int64_t head, int64_t first, int64_t rows) {
    const int64_t n = depth(p), text = p.counts[b];
    const int64_t* tokens = p.tokens + b * p.num_text;
    const float* unit_weights = p.unit_weights + b * p.num_text * p.units_stride;
    const float* log_sum_exp = p.log_sum_exp + b * p.log_sum_exp_row + head * p.log_sum_exp_head;
    const auto shift_of = [&](int64_t token) { return -log_sum_exp[token * p.log_sum_exp_token] * kLog2E; };
    const Vec scale = Lanes::set1(Scales(p.scale).plain);
    pack_turned<kRows>(p, [&](int64_t i) { return row(p.image, b, head, first + i); }, rows, s.image);
    for (int64_t i = 0; i < kTaskRows * p.units_stride; ++i) s.mass[i] = 0.0f;
    alignas(64) float shift[larger(kKeyBlock, kTaskRows)] = {};
    if (!kOfText) {
      for (int64_t r = 0; r < rows; ++r) shift[r] = shift_of(first + r);
    }
    for (int64_t key = 0; key < text; key += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, text - key);
      if (kOfText) {
        for (int64_t c = 0; c < count; ++c) shift[c] = shift_of(tokens[key + c]);
      }
      for (int64_t r = 0; r < rows; r += kSubRows) {
        const int64_t groups = ceil_div(smaller(kSubRows, rows - r), kRows);
        logits_block<false>(s.image + r * n, s.text + key * n, n, groups, count, s.logits, nullptr);
        for (int64_t i = 0; i < groups * kRows; ++i) {
          float* line = s.logits + i * kLogitsStride;
          const Vec row_shift = Lanes::set1(shift[r + i]);
          for (int64_t c = 0; c < count; c += kWidth) {
            // Above 0 by the rounding of the log-sum-exp alone.
            const Vec exponent = Lanes::fma(Lanes::load(line + c), scale, kOfText ? Lanes::load(shift + c) : row_shift);
            Lanes::store(line + c, Lanes::exp2(Lanes::min(Lanes::zero(), exponent)));
          }
        }
        accumulate(s.logits, kLogitsStride, unit_weights + key * p.units_stride, p.units_stride, kPanel, count, groups, p.units,
                   s.ones, s.mass + r * p.units_stride, p.units_stride);
      }
    }
    float* mass = p.head_mass + ((b * p.heads + head) * p.num_image + first) * p.units;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < p.units; ++k) mass[r * p.units + k] = s.mass[r * p.units_stride + k];
    }
  }

  static AttentionKernel kernel() { return {{scratch_bytes, attend}, {mass_scratch_bytes, mass}}; }
};

template <typename Lanes>
AttentionKernel attention_for(AttentionInput input) {
  switch (input) {
    case AttentionInput::bfloat16:
      return Attention<Lanes, c10::BFloat16, float>::kernel();
    case AttentionInput::float16:
      return Attention<Lanes, c10::Half, float>::kernel();
    default:
      return Attention<Lanes, float, float>::kernel();
  }
}

}  // namespace
}  // namespace star_kernels
