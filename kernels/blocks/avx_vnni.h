// Tiles of 6 rows and 16 columns for x86 with AVX-VNNI.
#pragma once

#if __has_include(<avxvnniintrin.h>)
#define IVE_HAS_AVX_VNNI 1

#include <cpuid.h>

#include "avx2_few.h"

namespace ive::blocks::avx_vnni {

#define IVE_AVX_VNNI __attribute__((target("avx2,fma,avxvnni")))

using avx2::all, avx2::converted, avx2::fma, avx2::load_floats, avx2::store_floats;
using avx2::Floats, avx2::Ints, avx2::kColumns, avx2::kLanes, avx2::kRows, avx2::kUnit;
constexpr bool kSignedBytes = false;

inline bool runs_here() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return avx2::runs_here() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

// As in avx512.h: the sums stay in registers.
IVE_AVX_VNNI IVE_INLINE void dot(__m256i& sum, __m256i weights, __m256i inputs) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(weights), "x"(inputs));
}

// Adds the products of four inputs.
template <int R>
IVE_AVX_VNNI IVE_INLINE void add_four(__m256i (&sums)[R][2], const int8_t* x, __m256i w0,
                                      __m256i w1) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const __m256i given = _mm256_set1_epi32(four(x + 4 * r));
    dot(sums[r][0], w0, given);
    dot(sums[r][1], w1, given);
  }
}

// Adds the products of one block.
template <int R, int kBits>
IVE_AVX_VNNI IVE_INLINE void add(__m256i (&sums)[R][2], const int8_t* x, const uint8_t* w,
                                 const uint8_t* ahead, int64_t block) {
  const __m256i low = _mm256_set1_epi8(15);
  for (int64_t k = 0; k < block; k += 4 * kParts<kBits>) {
    fetch(ahead);
    const __m256i v0 = avx2::load(w), v1 = avx2::load(w + 32);
    if (kBits == 8) {
      add_four(sums, x, v0, v1);
    } else {
      add_four(sums, x, _mm256_and_si256(v0, low), _mm256_and_si256(v1, low));
      x += 4 * kRows;
      add_four(sums, x, _mm256_and_si256(_mm256_srli_epi16(v0, 4), low),
               _mm256_and_si256(_mm256_srli_epi16(v1, 4), low));
    }
    x += 4 * kRows;
    w += 64;
    ahead += 64;
  }
}

#define IVE_TARGET IVE_AVX_VNNI
#include "tile.h"
#undef IVE_TARGET

template <int kBits>
constexpr Path kPath = {"AVX-VNNI",
                        kRows,
                        kColumns,
                        kUnit,
                        runs_here,
                        round_inputs<kBits>,
                        avx2::transpose,
                        avx2::transpose,
                        multiply_rows<kBits>,
                        avx2::round_few<kBits>,
                        avx2::multiply_few<kBits>};

}  // namespace ive::blocks::avx_vnni

#endif
