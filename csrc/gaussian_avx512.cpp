// The Gaussian kernels with AVX-512: vectors of sixteen floats.

#include "gaussian_kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <limits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#include "gaussian_table.h"

namespace star_kernels {
namespace {

struct Avx512Lanes {
  typedef float Vec __attribute__((vector_size(64)));
  typedef int32_t Int __attribute__((vector_size(64)));
  typedef uint16_t Short __attribute__((vector_size(32)));
  static constexpr int64_t kWidth = 16;

  static STAR_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static STAR_INLINE Vec evens(Vec a, Vec b) { return picked(a, b, numbers() * 2); }
  static STAR_INLINE Vec odds(Vec a, Vec b) { return picked(a, b, numbers() * 2 + 1); }
  static STAR_INLINE Vec low_pairs(Vec a, Vec b) { return picked(a, b, numbers() / 2 + numbers() % 2 * 16); }
  static STAR_INLINE Vec high_pairs(Vec a, Vec b) { return picked(a, b, numbers() / 2 + numbers() % 2 * 16 + 8); }
  static STAR_INLINE Vec from_half(Short values) { return _mm512_maskz_cvtph_ps(-1, (__m256i)values); }
  static STAR_INLINE Short to_half(Vec value) {
    __m256i values = _mm512_maskz_cvtps_ph(-1, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return (Short)values;
  }
  static STAR_INLINE void stream(float* to, Vec value) { _mm512_stream_ps(to, value); }
  static STAR_INLINE void fence() { _mm_sfence(); }

 private:
  static STAR_INLINE Int numbers() { return Int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
  static STAR_INLINE Vec picked(Vec a, Vec b, Int index) {
    return _mm512_permutex2var_ps(a, (__m512i)index, b);
  }
};

}  // namespace

GaussianKernels gaussian_avx512() { return gaussian_kernels<Avx512Lanes>(); }

}  // namespace star_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace star_kernels {

GaussianKernels gaussian_avx512() { return {}; }

}  // namespace star_kernels

#endif
