// Few rows on x86 with AVX512-VNNI, and blocks of at least 64 bytes. Pieces of four columns lie
// side by side in a vector, so that what a block adds to all four takes one conversion and one
// multiply-add. A row that is alone reads its columns as they lie, and adds up their pieces to the
// same integers: a row's results are the same bits in any number of rows.
#pragma once

#include <algorithm>

#include "avx512.h"
#include "few.h"

namespace ive::blocks::avx512 {

constexpr int64_t kPiece = 16;  // bytes
constexpr int kPieces = kChunk / kPiece;
// Vectors of four columns that share what is loaded of R rows: memory gives four columns faster
// than eight, which pay where there is much arithmetic.
template <int R, int kBits>
constexpr int kTogether = R > 2 && kBits == 4 ? 2 : 1;

// Rounds a row. Of every chunk of a column all rows' values lie together, so that they are read in
// one direction: (bytes / kChunk, rows, parts, kChunk). Starts are four to a block, one to every
// sum of four bytes at the same place of its pieces: (blocks, rows, 4).
template <int kBits>
IVE_AVX512 void round_pieces(const Product& p, const FewRows& x, int64_t row) {
  float room[kMaxBlock];
  int8_t rounded[kMaxBlock];
  const int64_t bytes = p.block_bytes(), apart = p.rows * kParts<kBits> * kChunk;
  const __m128i middle = _mm_set1_epi8(static_cast<char>(kMiddle<kBits>));
  int8_t* to = x.values.get() + row * kParts<kBits> * kChunk;
  for (int64_t b = 0; b < x.blocks; ++b) {
    const float* from = p.x + row * p.inputs + b * p.block;
    from = whole_block(from, p.inputs - b * p.block, p.block, room);
    x.scales[row * x.blocks + b] = round_block<kBits>(from, p.block, rounded, bytes).scale;
    __m128i sum = _mm_setzero_si128();
    for (int64_t at = 0; at < p.block; at += kPiece) {
      const __m128i piece = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rounded + at));
      sum = _mm_dpbusd_epi32(sum, middle, piece);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x.starts.get() + (b * p.rows + row) * kPieces),
                     _mm_sub_epi32(_mm_setzero_si128(), sum));
    for (int64_t at = 0; at < bytes; at += kChunk, to += apart) {
      for (int i = 0; i < kParts<kBits>; ++i) {
        std::memcpy(to + i * kChunk, rounded + i * bytes + at, kChunk);
      }
    }
  }
}

template <int kBits>
IVE_AVX512 IVE_INLINE void unpack(__m512i values, __m512i (&parts)[kParts<kBits>]) {
  parts[0] = values;
  if (kBits == 8) return;
  const __m512i low = _mm512_set1_epi8(15);
  parts[0] = _mm512_and_si512(values, low);
  parts[kParts<kBits> - 1] = _mm512_and_si512(_mm512_srli_epi16(values, 4), low);
}

IVE_AVX512 IVE_INLINE __m128i load_piece(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// One column of one row.
template <int kBits>
IVE_AVX512 IVE_INLINE float multiply_column(const Product& p, const FewRows& x, int64_t n) {
  const int64_t bytes = p.block_bytes();
  const uint8_t* w = p.values + n * p.column_bytes();
  const float* scales = p.scales + n * x.blocks;
  const int8_t* given = x.values.get();
  __m128 result = _mm_setzero_ps();
  for (int64_t b = 0; b < x.blocks; ++b) {
    __m512i sums = _mm512_zextsi128_si512(load_piece(x.starts.get() + b * kPieces));
    for (const uint8_t* end = w + bytes; w < end; w += kChunk) {
      __m512i parts[kParts<kBits>];
      unpack<kBits>(_mm512_loadu_si512(w), parts);
      fetch(w + kAhead);
      for (int i = 0; i < kParts<kBits>; ++i, given += kChunk) {
        dot(sums, parts[i], _mm512_loadu_si512(given));
      }
    }
    const __m256i halves =
        _mm256_add_epi32(_mm512_castsi512_si256(sums), _mm512_extracti64x4_epi64(sums, 1));
    const __m128i sum =
        _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
    const __m128 both = _mm_mul_ps(_mm_set1_ps(scales[b]), _mm_set1_ps(x.scales[b]));
    result = _mm_fmadd_ps(_mm_cvtepi32_ps(sum), both, result);
  }
  const __m128 pairs = _mm_add_ps(result, _mm_movehl_ps(result, result));
  return _mm_cvtss_f32(_mm_add_ss(pairs, _mm_movehdup_ps(pairs)));
}

// Columns that are multiplied together; where there are fewer, the last stands for the others. What
// follows them is fetched in the order in which it lies.
template <int V>
struct Columns {
  static constexpr int kCount = V * kPieces;
  int64_t ahead, blocks_ahead;  // bytes and blocks to what is fetched
  const uint8_t* values[kCount];
  const float* scales[kCount];

  IVE_INLINE Columns(const Product& p, int64_t n, int64_t to)
      : ahead(std::max(kCount * p.column_bytes(), kAhead)), blocks_ahead(ahead / p.block_bytes()) {
    for (int i = 0; i < kCount; ++i) {
      const int64_t column = n + i < to ? n + i : to - 1;
      values[i] = p.values + column * p.column_bytes();
      scales[i] = p.scales + column * p.blocks();
    }
  }

  // A chunk of four columns: a vector of each of its pieces.
  IVE_AVX512 IVE_INLINE void load(int vector, int64_t at, __m512i (&pieces)[kPieces]) const {
    const uint8_t* const* from = values + kPieces * vector;
    const __m512i v0 = _mm512_loadu_si512(from[0] + at), v1 = _mm512_loadu_si512(from[1] + at);
    const __m512i v2 = _mm512_loadu_si512(from[2] + at), v3 = _mm512_loadu_si512(from[3] + at);
    const __m512i a = _mm512_shuffle_i32x4(v0, v1, 0x44), b = _mm512_shuffle_i32x4(v2, v3, 0x44);
    const __m512i c = _mm512_shuffle_i32x4(v0, v1, 0xee), d = _mm512_shuffle_i32x4(v2, v3, 0xee);
    pieces[0] = _mm512_shuffle_i32x4(a, b, 0x88);
    pieces[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
    pieces[2] = _mm512_shuffle_i32x4(c, d, 0x88);
    pieces[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
  }

  // The scales of a block of four columns, each for its sums.
  IVE_AVX512 IVE_INLINE __m512 load_scales(int vector, int64_t b) const {
    const float* const* from = scales + kPieces * vector;
    __m512 all = _mm512_set1_ps(from[0][b]);
    all = _mm512_mask_broadcastss_ps(all, 0x00f0, _mm_load_ss(from[1] + b));
    all = _mm512_mask_broadcastss_ps(all, 0x0f00, _mm_load_ss(from[2] + b));
    return _mm512_mask_broadcastss_ps(all, 0xf000, _mm_load_ss(from[3] + b));
  }
};

// Adds the products of a chunk with the rows' values, which follow each other.
template <int R, int V, int kBits>
IVE_AVX512 IVE_INLINE void add_chunk(const Columns<V>& w, int64_t at, const int8_t* given,
                                     __m512i (&sums)[R][V]) {
  __m512i pieces[V][kPieces];
  for (int v = 0; v < V; ++v) w.load(v, at, pieces[v]);
  const uint8_t* ahead = w.values[0] + w.ahead + w.kCount * at;
#pragma GCC unroll 4
  for (int j = 0; j < kPieces; ++j) {
    __m512i parts[V][kParts<kBits>];
    for (int v = 0; v < V; ++v, ahead += kChunk) {
      fetch(ahead);
      unpack<kBits>(pieces[v][j], parts[v]);
    }
    for (int i = 0; i < kParts<kBits>; ++i) {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const int8_t* from = given + (r * kParts<kBits> + i) * kChunk + j * kPiece;
        const __m512i piece = _mm512_broadcast_i32x4(load_piece(from));
        for (int v = 0; v < V; ++v) dot(sums[r][v], parts[v][i], piece);
      }
    }
  }
}

// Adds a block's sums to the results.
template <int R, int V>
IVE_AVX512 IVE_INLINE void add_block(const Columns<V>& w, const FewRows& x, int64_t b,
                                     const __m512i (&sums)[R][V], __m512 (&results)[R][V]) {
  fetch(w.scales[0] + w.blocks_ahead + w.kCount * b);
  for (int v = 0; v < V; ++v) {
    const __m512 scales = w.load_scales(v, b);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const __m512 both = _mm512_mul_ps(scales, _mm512_set1_ps(x.scales[r * x.blocks + b]));
      results[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), both, results[r][v]);
    }
  }
}

// Adds up and stores the results of four columns, the first `count` of them.
IVE_AVX512 IVE_INLINE void store_columns(float* y, __m512 results, int64_t count) {
  results = _mm512_add_ps(results, _mm512_permute_ps(results, 0x4e));
  results = _mm512_add_ps(results, _mm512_permute_ps(results, 0xb1));
  const __m128 four = _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, results));
  const int mask = count >= kPieces ? 0xf : count > 0 ? (1 << count) - 1 : 0;
  _mm_mask_storeu_ps(y, static_cast<__mmask8>(mask), four);
}

// Columns from `n` on, of several rows.
template <int R, int kBits>
IVE_AVX512 IVE_INLINE void multiply_columns(const Product& p, const FewRows& x, int64_t n,
                                            int64_t to) {
  constexpr int V = kTogether<R, kBits>;
  const Columns<V> w(p, n, to);
  const int64_t bytes = p.block_bytes();
  const int8_t* given = x.values.get();
  const int32_t* starts = x.starts.get();
  __m512 results[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) results[r][v] = _mm512_setzero_ps();
  }
  for (int64_t b = 0; b < x.blocks; ++b) {
    __m512i sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r, starts += kPieces) {
      const __m512i start = _mm512_broadcast_i32x4(load_piece(starts));
      for (int v = 0; v < V; ++v) sums[r][v] = start;
    }
    for (int64_t at = b * bytes; at < (b + 1) * bytes; at += kChunk) {
      add_chunk<R, V, kBits>(w, at, given, sums);
      given += R * kParts<kBits> * kChunk;
    }
    add_block<R, V>(w, x, b, sums, results);
  }
  for (int r = 0; r < R; ++r) {
    float* y = p.y + r * p.columns + n;
    for (int v = 0; v < V; ++v) {
      store_columns(y + v * kPieces, results[r][v], to - n - v * kPieces);
    }
  }
}

template <int R, int kBits>
IVE_AVX512 void multiply_pieces(const Product& p, const FewRows& x, int64_t from, int64_t to) {
  if constexpr (R == 1) {
    for (int64_t n = from; n < to; ++n) p.y[n] = multiply_column<kBits>(p, x, n);
  } else {
    constexpr int64_t kCount = Columns<kTogether<R, kBits>>::kCount;
    for (int64_t n = from; n < to; n += kCount) multiply_columns<R, kBits>(p, x, n, to);
  }
}

}  // namespace ive::blocks::avx512
