// Vectors of sixteen floats, thirty-two registers: shared by the two sources that have AVX-512.
#pragma once

#include "attention_tiles.h"

namespace star_kernels {
namespace {

struct Avx512Lanes {
  using Vec = __m512;
  static constexpr int64_t kWidth = 16, kRows = 12, kColumns = 2;

  static STAR_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static STAR_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static STAR_INLINE Vec load(const float* p) { return _mm512_load_ps(p); }
  static STAR_INLINE void store(float* p, Vec v) { _mm512_store_ps(p, v); }
  static STAR_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
  static STAR_INLINE void store_first(void* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  static STAR_INLINE Vec read(const float* p, float) { return _mm512_loadu_ps(p); }
  static STAR_INLINE Vec read(const c10::Half* p, float) {
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static STAR_INLINE Vec read(const c10::BFloat16* p, float) {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, wide, 16));
  }
  static STAR_INLINE void turn(Vec (&rows)[16]) {
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_maskz_unpacklo_ps(0xffff, rows[i], rows[i + 1]);
      t[i + 1] = _mm512_maskz_unpackhi_ps(0xffff, rows[i], rows[i + 1]);
    }
    Vec u[16];
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        u[i + 2 * j] = _mm512_maskz_shuffle_ps(0xffff, t[i + j], t[i + j + 2], _MM_SHUFFLE(1, 0, 1, 0));
        u[i + 2 * j + 1] = _mm512_maskz_shuffle_ps(0xffff, t[i + j], t[i + j + 2], _MM_SHUFFLE(3, 2, 3, 2));
      }
    }
    // u[4 * i + j] now holds column 4 q + j of rows 4 i ... 4 i + 3 in its quarter q.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec even_low = _mm512_maskz_shuffle_f32x4(0xffff, u[j], u[j + 4], _MM_SHUFFLE(2, 0, 2, 0));
      const Vec odd_low = _mm512_maskz_shuffle_f32x4(0xffff, u[j], u[j + 4], _MM_SHUFFLE(3, 1, 3, 1));
      const Vec even_high = _mm512_maskz_shuffle_f32x4(0xffff, u[j + 8], u[j + 12], _MM_SHUFFLE(2, 0, 2, 0));
      const Vec odd_high = _mm512_maskz_shuffle_f32x4(0xffff, u[j + 8], u[j + 12], _MM_SHUFFLE(3, 1, 3, 1));
      rows[j] = _mm512_maskz_shuffle_f32x4(0xffff, even_low, even_high, _MM_SHUFFLE(2, 0, 2, 0));
      rows[j + 4] = _mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, _MM_SHUFFLE(2, 0, 2, 0));
      rows[j + 8] = _mm512_maskz_shuffle_f32x4(0xffff, even_low, even_high, _MM_SHUFFLE(3, 1, 3, 1));
      rows[j + 12] = _mm512_maskz_shuffle_f32x4(0xffff, odd_low, odd_high, _MM_SHUFFLE(3, 1, 3, 1));
    }
  }
  static STAR_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static STAR_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  static STAR_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static STAR_INLINE Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, float) { return fma(a, b, c); }
  // Zero-masked forms under a full mask: the plain ones make GCC 12 warn of its own header's undefined vectors.
  static STAR_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  static STAR_INLINE Vec min(Vec a, Vec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
  static STAR_INLINE Vec if_below(float bound, Vec a, Vec b) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(a), set1(bound), _CMP_LT_OQ), b, a);
  }
  template <int kOrder>
  static STAR_INLINE Vec quarters(Vec v) {
    return _mm512_maskz_shuffle_f32x4(0xffff, v, v, kOrder);
  }
  template <int kOrder>
  static STAR_INLINE Vec within_quarters(Vec v) {
    return _mm512_maskz_permute_ps(0xffff, v, kOrder);
  }
  static STAR_INLINE float sum(Vec v) {
    v = add(v, quarters<_MM_PERM_BADC>(v));
    v = add(v, quarters<_MM_PERM_CDAB>(v));
    v = add(v, within_quarters<_MM_PERM_BADC>(v));
    return _mm512_cvtss_f32(add(v, within_quarters<_MM_PERM_CDAB>(v)));
  }
  static STAR_INLINE Vec first(Vec v, int64_t n) { return _mm512_maskz_mov_ps(first_lanes(n), v); }
  static STAR_INLINE Vec exp2(Vec x) {
    // x minus its floor, 0 for -inf; scalef multiplies by two to the floor of its second operand, over the whole range.
    const Vec fraction = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);
    return _mm512_maskz_scalef_ps(0xffff, exp2_fraction<Avx512Lanes>(fraction), x);
  }
};

}  // namespace
}  // namespace star_kernels
