// Few rows on x86 with AVX2; AVX-VNNI would wait for memory as well.
#pragma once

#include "avx2.h"
#include "few.h"

namespace ive::blocks::avx2 {

// Bytes read at a time: a block of 32 inputs has half of them.
constexpr int64_t kPart = 32;

IVE_AVX2 inline void round_few(const Product& p, const FewRows& x, int64_t row) { x.round(p, row); }

// The scales of the blocks in a part, each for the sums it belongs to; `kWide` blocks have whole
// parts.
template <bool kWide>
IVE_AVX2 IVE_INLINE __m256 part_scales(const float* scales, int64_t left) {
  if (kWide) return _mm256_set1_ps(*scales);
  const float second = left > 1 ? scales[1] : 0;
  return _mm256_set_m128(_mm_set1_ps(second), _mm_set1_ps(scales[0]));
}

template <bool kWide>
IVE_AVX2 IVE_INLINE __m256i load_part(const uint8_t* bytes, int64_t left) {
  if (kWide || left >= kPart) return load(bytes);
  return _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}

IVE_AVX2 IVE_INLINE float total(__m256 values) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// C columns from `n` on: they share what is loaded of the rows.
template <int R, int C, bool kWide>
IVE_AVX2 IVE_INLINE void multiply_columns(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.column_bytes(), step = kWide ? p.block / 2 : kPart;
  const uint8_t* w = p.values + n * bytes;
  const float* scales = p.scales + n * x.blocks;
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  __m256 results[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) results[r][c] = _mm256_setzero_ps();
  }
  int64_t b = 0;
  for (int64_t block = 0; block < bytes; block += step) {
    __m256i sums[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sums[r][c] = _mm256_setzero_si256();
    }
    for (int64_t at = block; at < block + step; at += kPart) {
      __m256i even[C], odd[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const __m256i v = load_part<kWide>(w + c * bytes + at, bytes - at);
        if (C > 1) fetch(w + (C + c) * bytes + at);
        even[c] = _mm256_and_si256(v, low);
        odd[c] = _mm256_and_si256(_mm256_srli_epi16(v, 4), low);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t place = r * x.bytes + at;
        const __m256i start = load(x.starts.get() + place / 4);
        const __m256i evens = load(x.even.get() + place), odds = load(x.odd.get() + place);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(even[c], evens),
                                                 _mm256_maddubs_epi16(odd[c], odds));
          const __m256i fours = _mm256_add_epi32(_mm256_madd_epi16(pairs, ones), start);
          sums[r][c] = _mm256_add_epi32(sums[r][c], fours);
        }
      }
    }
    const int64_t left = x.blocks - b;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m256 row_scales = part_scales<kWide>(x.scales.get() + r * x.blocks + b, left);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        if (C > 1 && r == 0) fetch(scales + (C + c) * x.blocks + b);
        const __m256 column_scales = part_scales<kWide>(scales + c * x.blocks + b, left);
        const __m256 both = _mm256_mul_ps(column_scales, row_scales);
        results[r][c] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][c]), both, results[r][c]);
      }
    }
    b += kWide ? 1 : 2;
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) p.y[r * p.columns + n + c] = total(results[r][c]);
  }
}

template <int R, bool kWide>
IVE_AVX2 void multiply_range(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr int kTogether = R == 1 ? 4 : 2;
  int64_t n = from;
  for (; n + kTogether <= to; n += kTogether) multiply_columns<R, kTogether, kWide>(p, x, n);
  for (; n < to; ++n) multiply_columns<R, 1, kWide>(p, x, n);
}

inline void multiply_few(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr void (*kMultiply[2][kFewRows])(const Product&, const FewRows&, int64_t, int64_t) = {
      {multiply_range<1, false>, multiply_range<2, false>, multiply_range<3, false>,
       multiply_range<4, false>},
      {multiply_range<1, true>, multiply_range<2, true>, multiply_range<3, true>,
       multiply_range<4, true>}};
  kMultiply[p.block >= 2 * kPart][p.rows - 1](p, x, from, to);
}

constexpr Path kPath = {"AVX2",    kRows,         kColumns,  runs_here,    round_inputs,
                        transpose, multiply_rows, round_few, multiply_few, kFewRows};

}  // namespace ive::blocks::avx2
