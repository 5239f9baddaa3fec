// Tasks for x86 with AVX-512.
#pragma once

#include "../blocks/avx512.h"
#include "avx2.h"

namespace ive::attention::avx512 {

#define IVE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))

typedef float Vec __attribute__((vector_size(64)));
constexpr int kLanes = 16, kRows = 12, kFewLines = 6, kColumns = blocks::avx512::kColumns;
constexpr const char* kName = "AVX-512";

inline bool runs_here() { return blocks::avx512::runs_here(); }

IVE_TARGET IVE_INLINE Vec all(float value) { return _mm512_set1_ps(value); }

IVE_TARGET IVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

template <Kind kKind>
IVE_TARGET IVE_INLINE Vec take(const char* from) {
  if constexpr (kKind == kFloat) return _mm512_loadu_ps(reinterpret_cast<const float*>(from));
  if constexpr (kKind == kHalf) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

IVE_TARGET IVE_INLINE void sum_four(const Vec (&given)[4], float* to) {
  avx2::Vec half[4];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm512_castps512_ps256(given[i]), _mm512_extractf32x8_ps(given[i], 1));
  }
  avx2::sum_four(half, to);
}

IVE_TARGET inline void widen(const char* from, Kind kind, float* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t left = count - i < 16 ? count - i : 16;
    const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
    if (kind == kHalf) {
      const __m256i halves = _mm256_maskz_loadu_epi16(mask, from + 2 * i);
      _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtph_ps(halves));
    } else {
      const __m512i wide = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, from + i));
      _mm512_mask_storeu_ps(to + i, mask, _mm512_cvtepi32_ps(wide));
    }
  }
}

using avx2::narrow;

IVE_TARGET inline void transpose(const float* from, int64_t count, int given, float* to) {
  blocks::avx512::transpose(
      {reinterpret_cast<const uint8_t*>(from), count * int64_t{sizeof(float)}, given, count},
      reinterpret_cast<uint8_t*>(to));
}

#include "vectors.h"
#undef IVE_TARGET

}  // namespace ive::attention::avx512
