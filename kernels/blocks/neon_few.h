// Few rows on aarch64 with dot products.
#pragma once

#include "few.h"
#include "neon.h"

namespace ive::blocks::neon {

// Bytes read at a time: those of the smallest block.
constexpr int64_t kPart = 16;

inline void round_few(const Product& p, const FewRows& x, int64_t row) { x.round(p, row); }

// C columns from `n` on: they share what is loaded of the rows.
template <int R, int C>
IVE_DOT IVE_INLINE void multiply_columns(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.column_bytes(), half = p.block / 2;
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
    for (int64_t at = b * half; at < (b + 1) * half; at += kPart) {
      int8x16_t even[C], odd[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const uint8x16_t v = vld1q_u8(w + c * bytes + at);
        if (C > 1) fetch(w + (C + c) * bytes + at);
        even[c] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
        odd[c] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int64_t place = r * x.bytes + at;
        const int32x4_t start = vld1q_s32(x.starts.get() + place / 4);
        const int8x16_t evens = vld1q_s8(x.even.get() + place);
        const int8x16_t odds = vld1q_s8(x.odd.get() + place);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) {
          const int32x4_t begun = vaddq_s32(sums[r][c], start);
          sums[r][c] = vdotq_s32(vdotq_s32(begun, even[c], evens), odd[c], odds);
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

template <int R>
IVE_DOT void multiply_range(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr int kTogether = 4;
  int64_t n = from;
  for (; n + kTogether <= to; n += kTogether) multiply_columns<R, kTogether>(p, x, n);
  for (; n < to; ++n) multiply_columns<R, 1>(p, x, n);
}

inline void multiply_few(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  constexpr void (*kMultiply[kFewRows])(const Product&, const FewRows&, int64_t, int64_t) = {
      multiply_range<1>, multiply_range<2>, multiply_range<3>, multiply_range<4>};
  kMultiply[p.rows - 1](p, x, from, to);
}

constexpr Path kPath = {"NEON dot products", kRows,         kColumns,  runs_here,    round_inputs,
                        transpose,           multiply_rows, round_few, multiply_few, kFewRows};

}  // namespace ive::blocks::neon
