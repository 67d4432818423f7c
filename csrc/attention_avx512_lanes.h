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
  static STAR_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static STAR_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, float) { return fma(a, b, c); }
  // Zero-masked forms under a full mask: the plain ones make GCC 12 warn of its own header's undefined vectors.
  static STAR_INLINE Vec max(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
  template <int kOrder>
  static STAR_INLINE Vec quarters(Vec v) {
    return _mm512_maskz_shuffle_f32x4(0xffff, v, v, kOrder);
  }
  template <int kOrder>
  static STAR_INLINE Vec within_quarters(Vec v) {
    return _mm512_maskz_permute_ps(0xffff, v, kOrder);
  }
  static STAR_INLINE float largest(Vec v) {
    v = max(v, quarters<_MM_PERM_BADC>(v));
    v = max(v, quarters<_MM_PERM_CDAB>(v));
    v = max(v, within_quarters<_MM_PERM_BADC>(v));
    return _mm512_cvtss_f32(max(v, within_quarters<_MM_PERM_CDAB>(v)));
  }
  static STAR_INLINE float sum(Vec v) {
    v = add(v, quarters<_MM_PERM_BADC>(v));
    v = add(v, quarters<_MM_PERM_CDAB>(v));
    v = add(v, within_quarters<_MM_PERM_BADC>(v));
    return _mm512_cvtss_f32(add(v, within_quarters<_MM_PERM_CDAB>(v)));
  }
  static STAR_INLINE Vec first(Vec v, int64_t n) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << n) - 1u), v);
  }
  static STAR_INLINE Vec exp2(Vec x) {
    // x minus its floor, 0 for -inf; scalef multiplies by two to the floor of its second operand, over the whole range.
    const Vec fraction = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF);
    return _mm512_maskz_scalef_ps(0xffff, exp2_fraction<Avx512Lanes>(fraction), x);
  }
};

}  // namespace
}  // namespace star_kernels
