// Tiles of 8 rows and 8 columns for aarch64 with products of matrices (SMMLA): of two rows and two
// columns at a time, 8 bytes of each.
#pragma once

#include "neon_few.h"

// Older compilers do not have the intrinsic.
#if (defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && __GNUC__ >= 10)
#define IVE_HAS_MATRIX_PRODUCTS 1

namespace ive::blocks::neon_matrices {

#define IVE_MATRIX __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))

using neon::all, neon::converted, neon::fma, neon::load_floats, neon::store_floats;
using neon::Floats, neon::Ints, neon::kLanes, neon::kSignedBytes;
constexpr int kRows = 8, kColumns = 8, kUnit = 8;

// See `Source`; the bytes of a column are a multiple of 16, as those of a block are.
inline void transpose_eights(const Source& source, uint8_t* out) {
  for (int c = 0; c < kColumns; c += 2) {
    const uint8_t *first = source.column(c), *second = source.column(c + 1);
    for (int64_t k = 0; k < 4 * source.count; k += 16) {
      const uint64x2_t a = vreinterpretq_u64_u8(vld1q_u8(first + k));
      const uint64x2_t b = vreinterpretq_u64_u8(vld1q_u8(second + k));
      uint8_t* to = out + kColumns * k + 8 * c;
      vst1q_u8(to, vreinterpretq_u8_u64(vzip1q_u64(a, b)));
      vst1q_u8(to + 8 * kColumns, vreinterpretq_u8_u64(vzip2q_u64(a, b)));
    }
  }
}

// Makes sums of four columns of two rows into those of two rows of the first two columns and of the
// others; or the other way.
IVE_MATRIX IVE_INLINE void regroup(Ints& first, Ints& second) {
  const int64x2_t a = vreinterpretq_s64_s32(first), b = vreinterpretq_s64_s32(second);
  first = vreinterpretq_s32_s64(vzip1q_s64(a, b));
  second = vreinterpretq_s32_s64(vzip2q_s64(a, b));
}

// The units of row `r` and the next, which is zero where R rows have none.
template <int R>
IVE_MATRIX IVE_INLINE int8x16_t load_rows(const int8_t* x, int r) {
  if (r + 1 < R) return vld1q_s8(x + kUnit * r);
  return vcombine_s8(vld1_s8(x + kUnit * r), vdup_n_s8(0));
}

// Adds the products of one block.
template <int R, int kBits>
IVE_MATRIX IVE_INLINE void add(Ints (&sums)[R][2], const int8_t* x, const uint8_t* w,
                               const uint8_t* ahead, int64_t block) {
  constexpr int kPairs = (R + 1) / 2;
  Ints pairs[kPairs][2][2];
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int p = i / 2, v = i % 2;
    pairs[p][v][0] = sums[2 * p][v];
    pairs[p][v][1] = 2 * p + 1 < R ? sums[2 * p + 1][v] : all(0);
    regroup(pairs[p][v][0], pairs[p][v][1]);
  }
  for (int64_t k = 0; k < block; k += kUnit * kParts<kBits>) {
    fetch(ahead);
    int8x16_t parts[kParts<kBits>][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) neon::load_parts<kBits>(w + 16 * c, parts, c);
#pragma GCC unroll 2
    for (int i = 0; i < kParts<kBits>; ++i) {
#pragma GCC unroll 4
      for (int p = 0; p < kPairs; ++p) {
        const int8x16_t given = load_rows<R>(x, 2 * p);
#pragma GCC unroll 4
        for (int c = 0; c < 4; ++c) {
          Ints& sum = pairs[p][c / 2][c % 2];
          sum = vmmlaq_s32(sum, given, parts[i][c]);
        }
      }
      x += kUnit * kRows;
    }
    w += kUnit * kColumns;
    ahead += kUnit * kColumns;
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2 * kPairs; ++i) {
    const int p = i / 2, v = i % 2;
    regroup(pairs[p][v][0], pairs[p][v][1]);
    sums[2 * p][v] = pairs[p][v][0];
    if (2 * p + 1 < R) sums[2 * p + 1][v] = pairs[p][v][1];
  }
}

#define IVE_TARGET IVE_MATRIX
#include "tile.h"
#undef IVE_TARGET

template <int kBits>
constexpr Path kPath = {"NEON matrix products",
                        kRows,
                        kColumns,
                        kUnit,
                        neon::has_matrix_products,
                        round_inputs<kBits>,
                        transpose_eights,
                        neon::transpose<kColumns>,
                        multiply_rows<kBits>,
                        neon::round_few<kBits>,
                        neon::multiply_few<kBits>};

}  // namespace ive::blocks::neon_matrices

#endif
