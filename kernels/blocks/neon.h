// Tiles of 6 rows and 16 columns for aarch64 with dot products (SDOT).
#pragma once

#include <arm_neon.h>
#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "tiles.h"

namespace ive::blocks::neon {

#define IVE_DOT __attribute__((target("arch=armv8.2-a+dotprod")))

typedef float32x4_t Floats;
typedef int32x4_t Ints;
constexpr int kLanes = 4, kRows = 6, kColumns = 16, kUnit = 4;
constexpr bool kSignedBytes = true;

inline bool runs_here() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return true;  // every other system on aarch64 (macOS) needs a CPU that has them
#endif
}

// Whether there are products of matrices (SMMLA) too.
inline bool has_matrix_products() {
#if defined(__linux__)
  constexpr unsigned long kMatrixProducts = 1ul << 13;  // HWCAP2_I8MM
  return runs_here() && (getauxval(AT_HWCAP2) & kMatrixProducts) != 0;
#else
  return false;  // other systems are not asked
#endif
}

IVE_DOT IVE_INLINE Floats all(float value) { return vdupq_n_f32(value); }
IVE_DOT IVE_INLINE Ints all(int32_t value) { return vdupq_n_s32(value); }
IVE_DOT IVE_INLINE Floats load_floats(const float* from) { return vld1q_f32(from); }
IVE_DOT IVE_INLINE void store_floats(float* to, Floats values) { vst1q_f32(to, values); }
IVE_DOT IVE_INLINE Floats converted(Ints values) { return vcvtq_f32_s32(values); }
IVE_DOT IVE_INLINE Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

// Weights as signed bytes; of those of 4 bits the ones of even places, or, part 1, of odd ones.
template <int kBits>
IVE_INLINE int8x16_t signed_part(uint8x16_t bytes, int part) {
  if (kBits == 8) return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(128)));
  const uint8x16_t low = vandq_u8(bytes, vdupq_n_u8(15)), high = vshrq_n_u8(bytes, 4);
  return vreinterpretq_s8_u8(part == 0 ? low : high);
}

// Loads all parts of the weights of column or vector `c`.
template <int kBits, int kCount>
IVE_INLINE void load_parts(const uint8_t* bytes, int8x16_t (&parts)[kParts<kBits>][kCount], int c) {
  const uint8x16_t v = vld1q_u8(bytes);
  for (int i = 0; i < kParts<kBits>; ++i) parts[i][c] = signed_part<kBits>(v, i);
}

IVE_INLINE uint32x4_t load_four(const uint8_t* bytes, int64_t left) {
  if (left >= 4) return vreinterpretq_u32_u8(vld1q_u8(bytes));
  uint32_t room[4] = {0, 0, 0, 0};
  std::memcpy(room, bytes, 4 * left);
  return vld1q_u32(room);
}

template <int kCount = kColumns>
void transpose(const Source& source, uint8_t* out) {
  for (int c = 0; c < kCount; c += 4) {
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
        vst1q_u8(out + 4 * (kCount * (k + i) + c), vreinterpretq_u8_u32(columns[i]));
      }
    }
  }
}

// Adds the products of one block.
template <int R, int kBits>
IVE_DOT IVE_INLINE void add(Ints (&sums)[R][4], const int8_t* x, const uint8_t* w,
                            const uint8_t* ahead, int64_t block) {
  for (int64_t k = 0; k < block; k += 4 * kParts<kBits>) {
    fetch(ahead);
    int8x16_t parts[kParts<kBits>][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) load_parts<kBits>(w + 16 * c, parts, c);
#pragma GCC unroll 2
    for (int i = 0; i < kParts<kBits>; ++i) {
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const int8x16_t given = vreinterpretq_s8_s32(vdupq_n_s32(four(x + 4 * r)));
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) sums[r][c] = vdotq_s32(sums[r][c], parts[i][c], given);
      }
      x += 4 * kRows;
    }
    w += 4 * kColumns;
    ahead += 4 * kColumns;
  }
}

#define IVE_TARGET IVE_DOT
#include "tile.h"
#undef IVE_TARGET

}  // namespace ive::blocks::neon
