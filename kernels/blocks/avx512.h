// Tiles of 12 rows and 32 columns for x86 with AVX512-VNNI: 24 sums of 16 columns in registers.
#pragma once

#include "tiles.h"
#include "x86.h"

namespace ive::blocks::avx512 {

#define IVE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))

typedef __m512 Floats;
typedef __m512i Ints;
constexpr int kLanes = 16, kRows = 12, kColumns = 32, kUnit = 4;
constexpr bool kSignedBytes = false;

inline bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

IVE_AVX512 IVE_INLINE Floats all(float value) { return _mm512_set1_ps(value); }
IVE_AVX512 IVE_INLINE Ints all(int32_t value) { return _mm512_set1_epi32(value); }
IVE_AVX512 IVE_INLINE Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
IVE_AVX512 IVE_INLINE void store_floats(float* to, Floats values) { _mm512_storeu_ps(to, values); }
IVE_AVX512 IVE_INLINE Floats converted(Ints values) { return _mm512_cvtepi32_ps(values); }
IVE_AVX512 IVE_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

// 16 columns of 16 times four bytes.
IVE_AVX512 IVE_INLINE void transpose16(__m512i (&v)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

IVE_AVX512 inline void transpose(const Source& source, uint8_t* out) {
  for (int half = 0; half < 2; ++half) {
    const uint8_t* columns[16];
    for (int i = 0; i < 16; ++i) columns[i] = source.column(16 * half + i);
    for (int64_t k = 0; k < source.count; k += 16) {
      const int64_t left = source.count - k < 16 ? source.count - k : 16;
      const __mmask16 mask = static_cast<__mmask16>((1u << left) - 1);
      __m512i v[16];
      for (int i = 0; i < 16; ++i) {
        v[i] = _mm512_maskz_loadu_epi32(mask, columns[i] + 4 * k);
      }
      transpose16(v);
      uint8_t* to = out + (2 * k + half) * 64;
      for (int i = 0; i < 16 && i < left; ++i) _mm512_storeu_si512(to + 128 * i, v[i]);
    }
  }
}

// Adds the products of four bytes in each of 16 columns. GCC 12 keeps the sums of the intrinsic in
// memory where there are many; those of the instruction stay in registers.
IVE_AVX512 IVE_INLINE void dot(__m512i& sum, __m512i weights, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
}

// Weights of 8 inputs for the 32 columns: the four that are multiplied first, and the others.
struct Eight {
  __m512i first[2], second[2];
};

template <int kBits>
IVE_AVX512 IVE_INLINE Eight load_eight(const uint8_t* w) {
  const __m512i v0 = _mm512_loadu_si512(w), v1 = _mm512_loadu_si512(w + 64);
  if (kBits == 8) return {{v0, v1}, {_mm512_loadu_si512(w + 128), _mm512_loadu_si512(w + 192)}};
  const __m512i low = _mm512_set1_epi8(15);
  return {{_mm512_and_si512(v0, low), _mm512_and_si512(v1, low)},
          {_mm512_and_si512(_mm512_srli_epi16(v0, 4), low),
           _mm512_and_si512(_mm512_srli_epi16(v1, 4), low)}};
}

// With few rows, sums of the first and the second four of 8 inputs are kept apart: one sum alone
// would wait for itself.
template <int R, int kBits>
IVE_AVX512 IVE_INLINE void add(Ints (&sums)[R][2], const int8_t* x, const uint8_t* w,
                               const uint8_t* ahead, int64_t block) {
  constexpr bool kApart = R <= 6;
  constexpr int64_t kEight = kColumns * kBits;  // bytes
  Ints others[R][2] = {};
  for (int64_t k = 0; k < block; k += 8) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kEight; line += 64) fetch(ahead + line);
    const Eight weights = load_eight<kBits>(w);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Ints four_inputs = all(four(x + 4 * r));
      dot(sums[r][0], weights.first[0], four_inputs);
      dot(sums[r][1], weights.first[1], four_inputs);
    }
    x += 4 * kRows;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Ints four_inputs = all(four(x + 4 * r));
      dot(kApart ? others[r][0] : sums[r][0], weights.second[0], four_inputs);
      dot(kApart ? others[r][1] : sums[r][1], weights.second[1], four_inputs);
    }
    x += 4 * kRows;
    w += kEight;
    ahead += kEight;
  }
#pragma GCC unroll 12
  for (int r = 0; kApart && r < R; ++r) {
    for (int c = 0; c < 2; ++c) sums[r][c] = _mm512_add_epi32(sums[r][c], others[r][c]);
  }
}

#define IVE_TARGET IVE_AVX512
#include "tile.h"
#undef IVE_TARGET

}  // namespace ive::blocks::avx512
