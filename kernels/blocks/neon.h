// Tiles of 6 rows and 16 columns for aarch64 with dot products (SDOT).
#pragma once

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "tiles.h"

namespace ive::blocks::neon {

#define IVE_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

constexpr int kRows = 6, kColumns = 16, kVectors = kColumns / 4;

inline bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;  // every other system on aarch64 (macOS) needs a CPU that has them
#endif
}

// Weights of 8 bits are signed here: theirs is the middle that bytes have.
template <int kBits>
void round_inputs(const float* x, int64_t inputs, int64_t block, int8_t* values, float* scales,
                  int32_t* starts) {
  round_row<kRows, kBits, kBits == 4>(x, inputs, block, values, scales, starts);
}

// Loads weights of column or vector `c`; those of 4 bits in two parts, of even and odd places.
template <int kBits, int kCount>
IVE_INLINE void load_parts(const uint8_t* bytes, int8x16_t (&parts)[kParts<kBits>][kCount], int c) {
  const uint8x16_t v = vld1q_u8(bytes);
  if (kBits == 8) {
    parts[0][c] = vreinterpretq_s8_u8(veorq_u8(v, vdupq_n_u8(128)));
  } else {
    parts[0][c] = vreinterpretq_s8_u8(vandq_u8(v, vdupq_n_u8(15)));
    parts[kParts<kBits> - 1][c] = vreinterpretq_s8_u8(vshrq_n_u8(v, 4));
  }
}

IVE_INLINE uint32x4_t load_four(const uint8_t* bytes, int64_t left) {
  if (left >= 4) return vreinterpretq_u32_u8(vld1q_u8(bytes));
  uint32_t room[4] = {0, 0, 0, 0};
  std::memcpy(room, bytes, 4 * left);
  return vld1q_u32(room);
}

inline void transpose(const Source& source, uint8_t* out) {
  for (int c = 0; c < kColumns; c += 4) {
    for (int64_t k = 0; k < source.count; k += 4) {
      const int64_t left = source.count - k;
      uint32x4_t v[4];
      for (int i = 0; i < 4; ++i) {
        v[i] = load_four(source.column(c + i) + 4 * k, left);
      }
      const uint32x4x2_t a = vtrnq_u32(v[0], v[1]), b = vtrnq_u32(v[2], v[3]);
      const uint32x4_t columns[4] = {
          vcombine_u32(vget_low_u32(a.val[0]), vget_low_u32(b.val[0])),
          vcombine_u32(vget_low_u32(a.val[1]), vget_low_u32(b.val[1])),
          vcombine_u32(vget_high_u32(a.val[0]), vget_high_u32(b.val[0])),
          vcombine_u32(vget_high_u32(a.val[1]), vget_high_u32(b.val[1]))};
      for (int i = 0; i < 4 && i < left; ++i) {
        vst1q_u8(out + 4 * (kColumns * (k + i) + c), vreinterpretq_u8_u32(columns[i]));
      }
    }
  }
}

template <int R>
IVE_DOT IVE_INLINE void add(int32x4_t (&sums)[R][kVectors], const int8x16_t (&w)[kVectors],
                            const int8_t* x) {
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const int8x16_t given = vreinterpretq_s8_s32(vdupq_n_s32(four(x + 4 * r)));
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) sums[r][c] = vdotq_s32(sums[r][c], w[c], given);
  }
}

template <int R, int kBits>
IVE_DOT void multiply(const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                      int64_t apart) {
  const int8_t* x = inputs.values;
  const uint8_t* w = panel.values;
  float32x4_t results[R][kVectors];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kVectors; ++c) {
      results[r][c] = span.first ? vdupq_n_f32(0) : vld1q_f32(y + r * apart + 4 * c);
    }
  }
  for (int64_t b = 0; b < span.blocks; ++b) {
    int32x4_t sums[R][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      for (int c = 0; c < kVectors; ++c) sums[r][c] = vdupq_n_s32(inputs.starts[b * kRows + r]);
    }
    for (int64_t k = 0; k < span.block; k += 4 * kParts<kBits>) {
      fetch(panel.ahead + (w - panel.values));
      int8x16_t parts[kParts<kBits>][kVectors];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) load_parts<kBits>(w + 16 * c, parts, c);
#pragma GCC unroll 2
      for (int i = 0; i < kParts<kBits>; ++i) {
        add(sums, parts[i], x);
        x += 4 * kRows;
      }
      w += 4 * kColumns;
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const float32x4_t scale = vdupq_n_f32(inputs.scales[b * kRows + r]);
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) {
        const float32x4_t scales = vld1q_f32(panel.scales + b * kColumns + 4 * c);
        const float32x4_t both = vmulq_f32(scale, scales);
        results[r][c] = vfmaq_f32(results[r][c], vcvtq_f32_s32(sums[r][c]), both);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < kVectors; ++c) vst1q_f32(y + r * apart + 4 * c, results[r][c]);
  }
}

template <int kBits>
void multiply_rows(int rows, const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                   int64_t apart) {
  constexpr void (*kMultiply[kRows])(const Inputs&, const Panel&, const Span&, float*, int64_t) = {
      multiply<1, kBits>, multiply<2, kBits>, multiply<3, kBits>,
      multiply<4, kBits>, multiply<5, kBits>, multiply<6, kBits>};
  kMultiply[rows - 1](inputs, panel, span, y, apart);
}

}  // namespace ive::blocks::neon
