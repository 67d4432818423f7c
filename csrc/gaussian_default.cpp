// The Gaussian kernels for any CPU: vectors of four floats, which every 64-bit target has, by the compiler's extension.

#include "gaussian_table.h"

#include <c10/util/Half.h>

namespace star_kernels {
namespace {

struct DefaultLanes {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  typedef uint16_t Short __attribute__((vector_size(8)));
  static constexpr int64_t kWidth = 4;

  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static STAR_INLINE Vec evens(Vec a, Vec b) { return Vec{a[0], a[2], b[0], b[2]}; }
  static STAR_INLINE Vec odds(Vec a, Vec b) { return Vec{a[1], a[3], b[1], b[3]}; }
  static STAR_INLINE Vec low_pairs(Vec a, Vec b) { return Vec{a[0], b[0], a[1], b[1]}; }
  static STAR_INLINE Vec high_pairs(Vec a, Vec b) { return Vec{a[2], b[2], a[3], b[3]}; }
  static STAR_INLINE Vec from_half(Short values) {
    Vec result;
    for (int i = 0; i < 4; ++i) result[i] = c10::detail::fp16_ieee_to_fp32_value(values[i]);
    return result;
  }
  static STAR_INLINE Short to_half(Vec value) {
    Short result;
    for (int i = 0; i < 4; ++i) result[i] = c10::detail::fp16_ieee_from_fp32_value(value[i]);
    return result;
  }
  static STAR_INLINE void stream(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }
  static STAR_INLINE void fence() {}
};

}  // namespace

GaussianKernels gaussian_default() { return gaussian_kernels<DefaultLanes>(); }

}  // namespace star_kernels
