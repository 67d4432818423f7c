// Joint attention with AVX2 and FMA: vectors of eight floats, sixteen registers.

#include "attention_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#include "attention_tiles.h"

namespace star_kernels {
namespace {

struct Avx2Lanes {
  using Vec = __m256;
  static constexpr int64_t kWidth = 8, kRows = 6, kColumns = 2;

  static STAR_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static STAR_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static STAR_INLINE Vec load(const float* p) { return _mm256_load_ps(p); }
  static STAR_INLINE void store(float* p, Vec v) { _mm256_store_ps(p, v); }
  static STAR_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static STAR_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, float) { return fma(a, b, c); }
  static STAR_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static STAR_INLINE float largest(Vec v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  static STAR_INLINE float sum(Vec v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static STAR_INLINE Vec first(Vec v, int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), lane)));
  }
  static STAR_INLINE Vec exp2(Vec x) {
    // Below, the power would leave the range of normal numbers. NaN stays NaN: max gives its second operand.
    x = _mm256_max_ps(set1(-126.0f), x);
    const Vec power = _mm256_floor_ps(x);
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127));
    const Vec factor = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return mul(exp2_fraction<Avx2Lanes>(_mm256_sub_ps(x, power)), factor);
  }
};

}  // namespace

AttentionKernel attention_avx2(AttentionInput input) { return attention_for<Avx2Lanes>(input); }

}  // namespace star_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace star_kernels {

AttentionKernel attention_avx2(AttentionInput) { return {}; }

}  // namespace star_kernels

#endif
