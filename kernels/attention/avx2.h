// Tasks for x86 with AVX2, fused multiply-adds and conversions of half precision.
#pragma once

#include "../blocks/avx2.h"
#include "path.h"

namespace ive::attention::avx2 {

#define IVE_TARGET __attribute__((target("avx2,fma,f16c")))

typedef float Vec __attribute__((vector_size(32)));
constexpr int kLanes = 8, kRows = 6, kFewLines = 4, kColumns = blocks::avx2::kColumns;
constexpr const char* kName = "AVX2";

inline bool runs_here() { return blocks::avx2::runs_here() && __builtin_cpu_supports("f16c"); }

IVE_TARGET IVE_INLINE Vec all(float value) { return _mm256_set1_ps(value); }

IVE_TARGET IVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

template <Kind kKind>
IVE_TARGET IVE_INLINE Vec take(const char* from) {
  if constexpr (kKind == kFloat) return _mm256_loadu_ps(reinterpret_cast<const float*>(from));
  if constexpr (kKind == kHalf) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

IVE_TARGET IVE_INLINE void sum_four(const Vec (&given)[4], float* to) {
  const __m256 pairs = _mm256_hadd_ps(given[0], given[1]);
  const __m256 others = _mm256_hadd_ps(given[2], given[3]);
  const __m256 sums = _mm256_hadd_ps(pairs, others);
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// Counts are multiples of 4, of halves and bytes those of 8 but for rotary tables.
IVE_TARGET inline void widen(const char* from, Kind kind, float* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    if (kind == kHalf) {
      const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
    } else {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
    }
  }
  if (i < count) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 2 * i));
    _mm_storeu_ps(to + i, _mm_cvtph_ps(halves));
  }
}

IVE_TARGET inline void narrow(const float* from, const float* scales, Kind kind, char* to,
                              int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  if (kind == kInt8) return round_to_bytes(from, scales, to, count);
  for (int64_t i = 0; i < count; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 2 * i), halves);
  }
}

IVE_TARGET inline void transpose(const float* from, int64_t count, int given, float* to) {
  blocks::avx2::transpose(
      {reinterpret_cast<const uint8_t*>(from), count * int64_t{sizeof(float)}, given, count},
      reinterpret_cast<uint8_t*>(to));
}

#include "vectors.h"
#undef IVE_TARGET

}  // namespace ive::attention::avx2
