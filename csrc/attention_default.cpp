// Joint attention for any CPU: vectors of four floats, which every 64-bit target has, through the compiler's vector extension.

#include "attention_tiles.h"

namespace star_kernels {
namespace {

struct DefaultLanes {
  typedef float Vec __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  static constexpr int64_t kWidth = 4, kRows = 6, kColumns = 2;

  static STAR_INLINE Vec zero() { return Vec{}; }
  static STAR_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
  static STAR_INLINE Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
  static STAR_INLINE void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
  static STAR_INLINE void store_first(float* p, Vec v, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
  template <typename Scalar>
  static STAR_INLINE Vec read(const Scalar* p, float) {
    return Vec{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
  }
  static STAR_INLINE void turn(Vec (&rows)[4]) {
    for (int64_t i = 0; i < 4; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const float upper = rows[j][i];
        rows[j][i] = rows[i][j];
        rows[i][j] = upper;
      }
    }
  }
  static STAR_INLINE Vec add(Vec a, Vec b) { return a + b; }
  static STAR_INLINE Vec sub(Vec a, Vec b) { return a - b; }
  static STAR_INLINE Vec mul(Vec a, Vec b) { return a * b; }
  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
  static STAR_INLINE Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, float) { return a * b + c; }
  static STAR_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }
  static STAR_INLINE Vec min(Vec a, Vec b) { return a < b ? a : b; }
  static STAR_INLINE Vec if_below(float bound, Vec a, Vec b) {
    const Vec limit = set1(bound);
    return (a < limit) & (a > -limit) ? a : b;
  }
  static STAR_INLINE float sum(Vec v) { return (v[0] + v[1]) + (v[2] + v[3]); }
  static STAR_INLINE Vec first(Vec v, int64_t n) {
    for (int64_t i = n; i < kWidth; ++i) v[i] = 0.0f;
    return v;
  }
  static STAR_INLINE Vec exp2(Vec x) {
    const Vec low = set1(-126.0f), shifter = set1(12582912.0f);
    // Below, the power would leave the range of normal numbers. NaN stays NaN.
    x = x < low ? low : x;
    const Vec shifted = (x - 0.5f) + shifter;  // 1.5 * 2^23 + floor(x), up to a tie: the integer stands in the low bits
    const Int power = ((Int)shifted - 0x4b400000 + 127) << 23;
    return exp2_fraction<DefaultLanes>(x - (shifted - shifter)) * (Vec)power;
  }
};

}  // namespace

AttentionKernel attention_default(AttentionInput input) { return attention_for<DefaultLanes>(input); }

}  // namespace star_kernels
