// Few rows on x86 with AVX512-VNNI.
#pragma once

#include "avx512_pieces.h"

namespace ive::blocks::avx512 {

// The scales of the `kBlocks` blocks in a chunk, each for the sums it belongs to.
template <int kBlocks>
IVE_AVX512 IVE_INLINE __m512 chunk_scales(const float* scales, int64_t left) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_srli_epi32(lanes, kBlocks == 4 ? 2 : 3);
  const auto mask = static_cast<__mmask16>((1u << (left < kBlocks ? left : kBlocks)) - 1);
  return _mm512_permutexvar_ps(places, _mm512_maskz_loadu_ps(mask, scales));
}

// C columns from `n` on, of blocks that share a chunk. More than one column share what is loaded of
// several rows; those of one row come in the order in which they lie.
template <int R, int C, int kBits, int kBlocks>
IVE_AVX512 IVE_INLINE void multiply_small_blocks(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.column_bytes();
  const int shift = __builtin_ctzll(p.block_bytes());
  const uint8_t* w = p.values + n * bytes;
  const float* scales = p.scales + n * x.blocks;
  __m512 results[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) results[r][c] = _mm512_setzero_ps();
  }
  for (int64_t at = 0; at < bytes; at += kChunk) {
    const int64_t left = (bytes - at) / 4, b = at >> shift;
    const auto mask = static_cast<__mmask16>(left >= 16 ? 0xffff : (1u << left) - 1);
    __m512i parts[C][kParts<kBits>];
    __m512 w_scales[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      const __m512i v = _mm512_maskz_loadu_epi32(mask, w + c * bytes + at);
      if (C > 1) {
        fetch(w + (C + c) * bytes + at);
        fetch(scales + (C + c) * x.blocks + b);
      } else {
        fetch(w + at + kAhead);
        fetch(scales + b + (kAhead >> shift));
      }
      unpack<kBits>(v, parts[c]);
      w_scales[c] = chunk_scales<kBlocks>(scales + c * x.blocks + b, x.blocks - b);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 x_scales =
          chunk_scales<kBlocks>(x.scales.get() + r * x.blocks + b, x.blocks - b);
      const __m512i start = _mm512_loadu_si512(x.starts.get() + (r * x.bytes + at) / 4);
      __m512i given[kParts<kBits>];
      for (int i = 0; i < kParts<kBits>; ++i) given[i] = _mm512_loadu_si512(x.part(r, i) + at);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        __m512i sum = start;
        for (int i = 0; i < kParts<kBits>; ++i) dot(sum, parts[c][i], given[i]);
        const __m512 both = _mm512_mul_ps(w_scales[c], x_scales);
        results[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, results[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) p.y[r * p.columns + n + c] = _mm512_reduce_add_ps(results[r][c]);
  }
}

template <int R, int kBits, int kBlocks>
IVE_AVX512 void multiply_range(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr int kTogether = R == 1 ? 1 : 4;
  int64_t n = from;
  for (; n + kTogether <= to; n += kTogether) {
    multiply_small_blocks<R, kTogether, kBits, kBlocks>(p, x, n);
  }
  for (; n < to; ++n) multiply_small_blocks<R, 1, kBits, kBlocks>(p, x, n);
}

template <int kBits, int kBlocks>
void multiply_blocks(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  with_rows<kFewRows>(p.rows, [&](auto r) {
    if constexpr (kBlocks == 1) {
      multiply_pieces<r, kBits>(p, x, from, to);
    } else {
      multiply_range<r, kBits, kBlocks>(p, x, from, to);
    }
  });
}

template <int kBits>
void multiply_few(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  const int64_t bytes = p.block_bytes();
  if (bytes >= kChunk) return multiply_blocks<kBits, 1>(p, x, from, to);
  if (bytes == kChunk / 2) return multiply_blocks<kBits, 2>(p, x, from, to);
  if (kBits == 4) return multiply_blocks<4, 4>(p, x, from, to);
}

template <int kBits>
void round_any_few(const Product& p, const FewRows& x, int64_t row) {
  if (p.block_bytes() >= kChunk) return round_pieces<kBits>(p, x, row);
  round_few<kBits>(p, x, row);
}

template <int kBits>
constexpr Path kPath = {"AVX512-VNNI",
                        kRows,
                        kColumns,
                        kUnit,
                        runs_here,
                        round_inputs<kBits>,
                        transpose,
                        transpose,
                        multiply_rows<kBits>,
                        round_any_few<kBits>,
                        multiply_few<kBits>};

}  // namespace ive::blocks::avx512
