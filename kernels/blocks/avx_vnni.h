// Tiles of 6 rows and 16 columns for x86 with AVX-VNNI.
#pragma once

#if __has_include(<avxvnniintrin.h>)
#define IVE_HAS_AVX_VNNI 1

#include <cpuid.h>

#include "avx2_few.h"

namespace ive::blocks::avx_vnni {

#define IVE_AVX_VNNI __attribute__((target("avx2,fma,avxvnni")))

using avx2::kColumns;
using avx2::kRows;

inline bool runs_here() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx2::runs_here() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

// As in avx512.h: the sums stay in registers.
IVE_AVX_VNNI IVE_INLINE void dot(__m256i& sum, __m256i weights, __m256i inputs) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs));
}

// Adds the products of one block.
template <int R>
IVE_AVX_VNNI IVE_INLINE void add(__m256i (&sums)[R][2], const int8_t* x, const uint8_t* w,
                                 const uint8_t* ahead, int64_t block) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < block; k += 8) {
    fetch(ahead);
    const __m256i v0 = avx2::load(w), v1 = avx2::load(w + 32);
    const __m256i even0 = _mm256_and_si256(v0, low), even1 = _mm256_and_si256(v1, low);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i given = _mm256_set1_epi32(four(x + 4 * r));
      dot(sums[r][0], even0, given);
      dot(sums[r][1], even1, given);
    }
    x += 4 * kRows;
    const __m256i odd0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low);
    const __m256i odd1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m256i given = _mm256_set1_epi32(four(x + 4 * r));
      dot(sums[r][0], odd0, given);
      dot(sums[r][1], odd1, given);
    }
    x += 4 * kRows;
    w += 64;
    ahead += 64;
  }
}

template <int R>
IVE_AVX_VNNI void multiply(const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                           int64_t apart) {
  __m256 results[R][2];
  avx2::begin(results, y, apart, span.first);
  for (int64_t b = 0; b < span.blocks; ++b) {
    const int64_t before = b * span.block;
    __m256i sums[R][2];
    avx2::start(sums, inputs.starts + b * kRows);
    add(sums, inputs.values + before * kRows, panel.values + before / 2 * kColumns,
        panel.ahead + before / 2 * kColumns, span.block);
    avx2::finish(results, sums, inputs.scales + b * kRows, panel.scales + b * kColumns);
  }
  avx2::store(results, y, apart);
}

inline void multiply_rows(int rows, const Inputs& inputs, const Panel& panel, const Span& span,
                          float* y, int64_t apart) {
  constexpr void (*kMultiply[kRows])(const Inputs&, const Panel&, const Span&, float*, int64_t) = {
      multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};
  kMultiply[rows - 1](inputs, panel, span, y, apart);
}

constexpr Path kPath = {
    "AVX-VNNI",      kRows,         kColumns,        runs_here,          avx2::round_inputs,
    avx2::transpose, multiply_rows, avx2::round_few, avx2::multiply_few, 3};

}  // namespace ive::blocks::avx_vnni

#endif
