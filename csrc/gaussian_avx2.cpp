// The Gaussian kernels with AVX2, fused multiply-add and fp16 conversion: vectors of eight floats.

#include "gaussian_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "gaussian_table.h"

namespace star_kernels {
namespace {

struct Avx2Lanes {
  typedef float Vec __attribute__((vector_size(32)));
  typedef int32_t Int __attribute__((vector_size(32)));
  typedef uint16_t Short __attribute__((vector_size(16)));
  static constexpr int64_t kWidth = 8;

  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  // The shuffles work on halves of 128 bits: order the halves after taking apart, and before joining.
  static STAR_INLINE Vec evens(Vec a, Vec b) { return ordered(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0))); }
  static STAR_INLINE Vec odds(Vec a, Vec b) { return ordered(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1))); }
  static STAR_INLINE Vec low_pairs(Vec a, Vec b) { return joined<0x20>(a, b); }
  static STAR_INLINE Vec high_pairs(Vec a, Vec b) { return joined<0x31>(a, b); }
  static STAR_INLINE Vec from_half(Short values) { return _mm256_cvtph_ps((__m128i)values); }
  static STAR_INLINE Short to_half(Vec value) {
    __m128i values = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (Short)values;
  }
  static STAR_INLINE void stream(float* to, Vec value) { _mm256_stream_ps(to, value); }
  static STAR_INLINE void fence() { _mm_sfence(); }

 private:
  static STAR_INLINE Vec ordered(__m256 value) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(value), _MM_SHUFFLE(3, 1, 2, 0)));
  }
  template <int kHalf>
  static STAR_INLINE Vec joined(Vec a, Vec b) {
    return _mm256_permute2f128_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b), kHalf);
  }
};

}  // namespace

GaussianKernels gaussian_avx2() { return gaussian_kernels<Avx2Lanes>(); }

}  // namespace star_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace star_kernels {

GaussianKernels gaussian_avx2() { return {}; }

}  // namespace star_kernels

#endif
