// Joint attention with AVX2 and FMA: vectors of eight floats, sixteen registers.

#include "attention_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
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
  static STAR_INLINE void store_first(float* p, Vec v, int64_t n) {
    if (n == kWidth) return _mm256_storeu_ps(p, v);
    _mm256_maskstore_ps(p, first_lanes(n), v);
  }
  static STAR_INLINE Vec read(const float* p, float) { return _mm256_loadu_ps(p); }
  static STAR_INLINE Vec read(const c10::Half* p, float) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static STAR_INLINE Vec read(const c10::BFloat16* p, float) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static STAR_INLINE void turn(Vec (&rows)[8]) {
    Vec t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    Vec u[8];
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        u[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], _MM_SHUFFLE(1, 0, 1, 0));
        u[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], _MM_SHUFFLE(3, 2, 3, 2));
      }
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }
  static STAR_INLINE __m256i first_lanes(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static STAR_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static STAR_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
  static STAR_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static STAR_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, float) { return fma(a, b, c); }
  static STAR_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static STAR_INLINE Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
  static STAR_INLINE Vec if_below(float bound, Vec a, Vec b) {
    const Vec magnitude = _mm256_andnot_ps(set1(-0.0f), a);
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(magnitude, set1(bound), _CMP_LT_OQ));
  }
  static STAR_INLINE float sum(Vec v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static STAR_INLINE Vec first(Vec v, int64_t n) {
    return _mm256_and_ps(v, _mm256_castsi256_ps(first_lanes(n)));
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
