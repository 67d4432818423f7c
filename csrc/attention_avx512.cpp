// Joint attention with AVX-512 (F, BW, DQ, VL).

#include "attention_kernel.h"

#if defined(__x86_64__) && defined(__GNUC__)

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include <cmath>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif

#include "attention_avx512_lanes.h"

namespace star_kernels {

AttentionKernel attention_avx512(AttentionInput input) { return attention_for<Avx512Lanes>(input); }

}  // namespace star_kernels

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

namespace star_kernels {

AttentionKernel attention_avx512(AttentionInput) { return {}; }

}  // namespace star_kernels

#endif
