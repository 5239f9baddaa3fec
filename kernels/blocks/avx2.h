// Tiles of 6 rows and 16 columns for x86 with AVX2.
#pragma once

#include "tiles.h"
#include "x86.h"

namespace ive::blocks::avx2 {

#define IVE_AVX2 __attribute__((target("avx2,fma")))

typedef __m256 Floats;
typedef __m256i Ints;
constexpr int kLanes = 8, kRows = 6, kColumns = 16, kUnit = 4;
constexpr bool kSignedBytes = true;  // see `Signed`
// Inputs whose products are added in int16: 8 pairs of at most 2 * 15 * 127 fit.
constexpr int64_t kRun = 32;

inline bool runs_here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

IVE_AVX2 IVE_INLINE Floats all(float value) { return _mm256_set1_ps(value); }
IVE_AVX2 IVE_INLINE Ints all(int32_t value) { return _mm256_set1_epi32(value); }
IVE_AVX2 IVE_INLINE Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
IVE_AVX2 IVE_INLINE void store_floats(float* to, Floats values) { _mm256_storeu_ps(to, values); }
IVE_AVX2 IVE_INLINE Floats converted(Ints values) { return _mm256_cvtepi32_ps(values); }
IVE_AVX2 IVE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

// 8 columns of 8 times four bytes.
IVE_AVX2 IVE_INLINE void transpose8(__m256i (&v)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(v[i], v[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) v[i] = t[i];
}

// The first `count` of eight times four bytes, the others zero. Not a masked load: emulators read
// beyond what it takes, where a mapped file may end.
IVE_AVX2 IVE_INLINE __m256i load_some(const uint8_t* from, int count) {
  alignas(32) uint8_t bytes[32] = {};
  if (count == 8) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  std::memcpy(bytes, from, 4 * count);
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes));
}

IVE_AVX2 inline void transpose(const Source& source, uint8_t* out) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* columns[8];
    for (int i = 0; i < 8; ++i) columns[i] = source.column(8 * half + i);
    for (int64_t k = 0; k < source.count; k += 8) {
      const int left = static_cast<int>(source.count - k < 8 ? source.count - k : 8);
      __m256i v[8];
      for (int i = 0; i < 8; ++i) v[i] = load_some(columns[i] + 4 * k, left);
      transpose8(v);
      uint8_t* to = out + (2 * k + half) * 32;
      for (int i = 0; i < 8 && i < left; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 64 * i), v[i]);
      }
    }
  }
}

template <typename T>
IVE_AVX2 IVE_INLINE __m256i load(const T* values) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
}

// Weights of 8 bits as sizes, at most 128, and signs, which the inputs take over: so a sum of two
// products, at most 2 * 128 * 127, does not saturate.
struct Signed {
  // Multiplied together, where there is one row.
  static constexpr int kColumnsOfOneRow = 1;
  __m256i sizes, signs;

  IVE_AVX2 IVE_INLINE explicit Signed(__m256i values)
      : signs(_mm256_xor_si256(values, _mm256_set1_epi8(-128))) {
    sizes = _mm256_abs_epi8(signs);
  }

  // The sums of the products of four bytes.
  IVE_AVX2 IVE_INLINE __m256i fours(__m256i inputs) const {
    const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(inputs, signs));
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
  }
};

// Adds the products of one block with weights of 8 bits.
template <int R>
IVE_AVX2 IVE_INLINE void add_bytes(__m256i (&sums)[R][2], const int8_t* x, const uint8_t* w,
                                   const uint8_t* ahead, int64_t block) {
#pragma GCC unroll 1
  for (int64_t k = 0; k < block; k += 4) {
    fetch(ahead);
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const Signed weights(load(w + 32 * c));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i fours = weights.fours(_mm256_set1_epi32(four(x + 4 * r)));
        sums[r][c] = _mm256_add_epi32(sums[r][c], fours);
      }
    }
    x += 4 * kRows;
    w += 64;
    ahead += 64;
  }
}

// Adds the products of one block with weights of 4 bits, by pairs in int16, which none saturates.
template <int R>
IVE_AVX2 IVE_INLINE void add_nibbles(__m256i (&sums)[R][2], const int8_t* x, const uint8_t* w,
                                     const uint8_t* ahead, int64_t block) {
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  for (int64_t run = 0; run < block; run += kRun) {
    __m256i pairs[R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int64_t k = 0; k < kRun; k += 8) {
      fetch(ahead);
      const __m256i v0 = load(w), v1 = load(w + 32);
      const __m256i even0 = _mm256_and_si256(v0, low), even1 = _mm256_and_si256(v1, low);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i given = _mm256_set1_epi32(four(x + 4 * r));
        pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(even0, given));
        pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(even1, given));
      }
      x += 4 * kRows;
      const __m256i odd0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low);
      const __m256i odd1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256i given = _mm256_set1_epi32(four(x + 4 * r));
        pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(odd0, given));
        pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(odd1, given));
      }
      x += 4 * kRows;
      w += 64;
      ahead += 64;
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs[r][0], ones));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs[r][1], ones));
    }
  }
}

template <int R, int kBits>
IVE_AVX2 IVE_INLINE void add(Ints (&sums)[R][2], const int8_t* x, const uint8_t* w,
                             const uint8_t* ahead, int64_t block) {
  if (kBits == 8) return add_bytes(sums, x, w, ahead, block);
  add_nibbles(sums, x, w, ahead, block);
}

#define IVE_TARGET IVE_AVX2
#include "tile.h"
#undef IVE_TARGET

}  // namespace ive::blocks::avx2
