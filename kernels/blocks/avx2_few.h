// Few rows on x86 with AVX2; AVX-VNNI would wait for memory as well.
#pragma once

#include "avx2.h"
#include "few.h"

namespace ive::blocks::avx2 {

// Bytes read at a time: a block of 32 inputs has as many, or half of them.
constexpr int64_t kPart = 32;

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

// Weights in a part, of 4 bits: values in even places and in odd ones.
struct Nibbles {
  static constexpr int kColumnsOfOneRow = 4;
  __m256i even, odd;

  IVE_AVX2 IVE_INLINE explicit Nibbles(__m256i values)
      : even(_mm256_and_si256(values, _mm256_set1_epi8(15))),
        odd(_mm256_and_si256(_mm256_srli_epi16(values, 4), _mm256_set1_epi8(15))) {}
};

// The sums of the products of every four bytes of a part with those of row `r` from `at` on.
IVE_AVX2 IVE_INLINE __m256i fours(const Nibbles& weights, const FewRows& x, int r, int64_t at) {
  const __m256i pairs =
      _mm256_add_epi16(_mm256_maddubs_epi16(weights.even, load(x.part(r, 0) + at)),
                       _mm256_maddubs_epi16(weights.odd, load(x.part(r, 1) + at)));
  const __m256i start = load(x.starts.get() + (r * x.bytes + at) / 4);
  return _mm256_add_epi32(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)), start);
}

IVE_AVX2 IVE_INLINE __m256i fours(const Signed& weights, const FewRows& x, int r, int64_t at) {
  return weights.fours(load(x.part(r, 0) + at));
}

// C columns from `n` on: they share what is loaded of the rows.
template <int R, int C, typename Weights, bool kWide>
IVE_AVX2 IVE_INLINE void multiply_columns(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.column_bytes(), step = kWide ? p.block_bytes() : kPart;
  const uint8_t* w = p.values + n * bytes;
  const float* scales = p.scales + n * x.blocks;
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
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const Weights weights(load_part<kWide>(w + c * bytes + at, bytes - at));
        fetch(C > 1 ? w + (C + c) * bytes + at : w + at + kAhead);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          sums[r][c] = _mm256_add_epi32(sums[r][c], fours(weights, x, r, at));
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

template <int R, typename Weights, bool kWide>
IVE_AVX2 void multiply_range(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr int kTogether = R == 1 ? Weights::kColumnsOfOneRow : 2;
  int64_t n = from;
  for (; n + kTogether <= to; n += kTogether) {
    multiply_columns<R, kTogether, Weights, kWide>(p, x, n);
  }
  for (; n < to; ++n) multiply_columns<R, 1, Weights, kWide>(p, x, n);
}

template <typename Weights, bool kWide>
void multiply_parts(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  with_rows<kFewRows>(p.rows, [&](auto r) { multiply_range<r, Weights, kWide>(p, x, from, to); });
}

template <int kBits>
void multiply_few(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  if (kBits == 8) return multiply_parts<Signed, true>(p, x, from, to);
  if (p.block_bytes() >= kPart) return multiply_parts<Nibbles, true>(p, x, from, to);
  multiply_parts<Nibbles, false>(p, x, from, to);
}

template <int kBits>
constexpr Path kPath = {"AVX2",
                        kRows,
                        kColumns,
                        kUnit,
                        runs_here,
                        round_inputs<kBits>,
                        transpose,
                        transpose,
                        multiply_rows<kBits>,
                        round_few<kBits>,
                        multiply_few<kBits>};

}  // namespace ive::blocks::avx2
