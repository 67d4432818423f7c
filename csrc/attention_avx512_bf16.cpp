// Joint attention of bfloat16 tensors with AVX512-BF16: two products of bf16 neighbours per lane and instruction, summed in
// float32. Probabilities are rounded to bf16 for the product with the values; the sum that normalises them and the mass are
// made of the float32 ones.

#include "attention_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#include "attention_avx512_lanes.h"

namespace star_kernels {
namespace {

struct Bf16Lanes : Avx512Lanes {
  using Avx512Lanes::load;
  using Avx512Lanes::multiply_add;
  using Avx512Lanes::read;
  using Avx512Lanes::set1;

  static STAR_INLINE Vec set1(Bf16Pair x) { return _mm512_castsi512_ps(_mm512_set1_epi32(static_cast<int>(x.bits))); }
  static STAR_INLINE Vec load(const Bf16Pair* p) { return _mm512_load_ps(p); }
  static STAR_INLINE Vec read(const c10::BFloat16* p, Bf16Pair) { return _mm512_loadu_ps(p); }
  static STAR_INLINE Vec read_down(const c10::BFloat16* first, const c10::BFloat16* second) {
    const __m512i low = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)));
    const __m512i high = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_maskz_slli_epi32(0xffff, high, 16)));
  }
  static STAR_INLINE Vec multiply_add(Vec a, Vec b, Vec c, Bf16Pair) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
  static STAR_INLINE void store_pairs(Bf16Pair* p, Vec v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
};

}  // namespace

AttentionKernel attention_avx512_bf16() { return Attention<Bf16Lanes, c10::BFloat16, Bf16Pair>::kernel(); }

}  // namespace star_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace star_kernels {

AttentionKernel attention_avx512_bf16() { return {}; }

}  // namespace star_kernels

#endif
