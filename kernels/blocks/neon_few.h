// Few rows on aarch64 with dot products.
#pragma once

#include "few.h"
#include "neon.h"

namespace ive::blocks::neon {

// Bytes read at a time: at most those of the smallest block.
constexpr int64_t kPart = 16;

// C columns from `n` on: they share what is loaded of the rows.
template <int R, int C, int kBits>
IVE_DOT IVE_INLINE void multiply_columns(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.column_bytes(), block = p.block_bytes();
  const uint8_t* w = p.values + n * bytes;
  float32x4_t results[R][C];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) results[r][c] = vdupq_n_f32(0);
  }
  for (int64_t b = 0; b < x.blocks; ++b) {
    int32x4_t sums[R][C];
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) sums[r][c] = vdupq_n_s32(0);
    }
    for (int64_t at = b * block; at < (b + 1) * block; at += kPart) {
      int8x16_t parts[kParts<kBits>][C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        load_parts<kBits>(w + c * bytes + at, parts, c);
        if (C > 1) fetch(w + (C + c) * bytes + at);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int8x16_t given[kParts<kBits>];
        for (int i = 0; i < kParts<kBits>; ++i) given[i] = vld1q_s8(x.part(r, i) + at);
        const int32x4_t start = vld1q_s32(x.starts.get() + (r * x.bytes + at) / 4);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          if (kBits == 4) sums[r][c] = vaddq_s32(sums[r][c], start);
          for (int i = 0; i < kParts<kBits>; ++i) {
            sums[r][c] = vdotq_s32(sums[r][c], parts[i][c], given[i]);
          }
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < C; ++c) {
        const float* scale = p.scales + (n + c) * x.blocks + b;
        if (C > 1 && r == 0) fetch(scale + C * x.blocks);
        const float both = *scale * x.scales[r * x.blocks + b];
        results[r][c] = vfmaq_n_f32(results[r][c], vcvtq_f32_s32(sums[r][c]), both);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) p.y[r * p.columns + n + c] = vaddvq_f32(results[r][c]);
  }
}

template <int R, int kBits>
IVE_DOT void multiply_range(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr int kTogether = 4;
  int64_t n = from;
  for (; n + kTogether <= to; n += kTogether) multiply_columns<R, kTogether, kBits>(p, x, n);
  for (; n < to; ++n) multiply_columns<R, 1, kBits>(p, x, n);
}

template <int kBits>
void multiply_few(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  with_rows<kFewRows>(p.rows, [&](auto r) { multiply_range<r, kBits>(p, x, from, to); });
}

template <int kBits>
constexpr Path kPath = {"NEON dot products",
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

}  // namespace ive::blocks::neon
