// Tiles of 12 rows and 32 columns for x86 with AVX512-VNNI: 24 sums of 16 columns in registers.
#pragma once

#include "tiles.h"
#include "x86.h"

namespace ive::blocks::avx512 {

#define IVE_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")))

constexpr int kRows = 12, kColumns = 32;

inline bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

template <int kBits>
IVE_AVX512 void round_inputs(const float* x, int64_t inputs, int64_t block, int8_t* values,
                             float* scales, int32_t* starts) {
  round_row<kRows, kBits, true>(x, inputs, block, values, scales, starts);
}

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

// R rows of a tile. With few rows, sums of the first and the second four of 8 inputs are kept
// apart: one sum alone would wait for itself.
template <int R, int kBits>
IVE_AVX512 void multiply(const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                         int64_t apart) {
  constexpr int kSets = R <= 6 ? 2 : 1;
  constexpr int64_t kEight = kColumns * kBits;  // bytes
  const int8_t* x = inputs.values;
  const uint8_t* w = panel.values;
  __m512 results[R][2];
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 2; ++c) {
      results[r][c] = span.first ? _mm512_setzero_ps() : _mm512_loadu_ps(y + r * apart + 16 * c);
    }
  }
  for (int64_t b = 0; b < span.blocks; ++b) {
    __m512i sums[R][2][kSets];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        sums[r][c][kSets - 1] = _mm512_setzero_si512();
        sums[r][c][0] = _mm512_set1_epi32(inputs.starts[b * kRows + r]);
      }
    }
    for (int64_t k = 0; k < span.block; k += 8) {
      const uint8_t* ahead = panel.ahead + (w - panel.values);
#pragma GCC unroll 4
      for (int64_t line = 0; line < kEight; line += 64) fetch(ahead + line);
      const Eight weights = load_eight<kBits>(w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i four_inputs = _mm512_set1_epi32(four(x + 4 * r));
        dot(sums[r][0][0], weights.first[0], four_inputs);
        dot(sums[r][1][0], weights.first[1], four_inputs);
      }
      x += 4 * kRows;
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512i four_inputs = _mm512_set1_epi32(four(x + 4 * r));
        dot(sums[r][0][kSets - 1], weights.second[0], four_inputs);
        dot(sums[r][1][kSets - 1], weights.second[1], four_inputs);
      }
      x += 4 * kRows;
      w += kEight;
    }
    const float* scales = panel.scales + b * kColumns;
    const __m512 scales0 = _mm512_loadu_ps(scales), scales1 = _mm512_loadu_ps(scales + 16);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const __m512 scale = _mm512_set1_ps(inputs.scales[b * kRows + r]);
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        __m512i sum = sums[r][c][0];
        if (kSets == 2) sum = _mm512_add_epi32(sum, sums[r][c][kSets - 1]);
        const __m512 both = _mm512_mul_ps(scale, c == 0 ? scales0 : scales1);
        results[r][c] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), both, results[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < 2; ++c) _mm512_storeu_ps(y + r * apart + 16 * c, results[r][c]);
  }
}

template <int kBits>
void multiply_rows(int rows, const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                   int64_t apart) {
  constexpr void (*kMultiply[kRows])(const Inputs&, const Panel&, const Span&, float*, int64_t) = {
      multiply<1, kBits>, multiply<2, kBits>,  multiply<3, kBits>,  multiply<4, kBits>,
      multiply<5, kBits>, multiply<6, kBits>,  multiply<7, kBits>,  multiply<8, kBits>,
      multiply<9, kBits>, multiply<10, kBits>, multiply<11, kBits>, multiply<12, kBits>};
  kMultiply[rows - 1](inputs, panel, span, y, apart);
}

}  // namespace ive::blocks::avx512
