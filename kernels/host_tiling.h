// Tiling on the CPU: the arithmetic of tiling.cuh in loops that compilers vectorise.
//
// A task is a band of output rows of one column of tiles. Its input rows go through the horizontal
// pass in strips of 64 rows, transposed so that the rows are the lanes of a vector: a tap is then
// one multiply-add of contiguous bytes with one weight, in the horizontal pass as in the vertical.
// What lies between the passes is uint8 and stays in the second-level cache.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <utility>

#include "tiling.cuh"

namespace ive::host {

// Rows that go through the horizontal pass side by side. Measured on AVX-512, five taps: 0.12 ns an
// output byte at 64 lanes, 0.23 at 32, 0.45 at 16; on AVX2 0.25 at 64 and at 32.
constexpr int kLanes = 64;
constexpr int kBlock = 16;   // side of a transposed block of bytes
constexpr int kChunk = 64;   // output pixels between two transpositions of the input
constexpr int kMaxTaps = 8;  // taps fused in one loop

inline int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

typedef uint8_t Bytes __attribute__((vector_size(kBlock)));

inline Bytes interleave_low(Bytes a, Bytes b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#else
  return __builtin_shuffle(a, b, Bytes{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
#endif
}

inline Bytes interleave_high(Bytes a, Bytes b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                 31);
#else
  return __builtin_shuffle(a, b,
                           Bytes{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#endif
}

// 16 x 16 bytes, four rounds of interleaving row i with row i + 8.
template <typename Row>
inline void transpose(uint8_t* to, ptrdiff_t stride, Row row) {
  Bytes a[kBlock], b[kBlock];
  for (int i = 0; i < kBlock; ++i) memcpy(&a[i], row(i), kBlock);
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < kBlock / 2; ++i) {
      b[2 * i] = interleave_low(a[i], a[i + 8]);
      b[2 * i + 1] = interleave_high(a[i], a[i + 8]);
    }
    for (int i = 0; i < kBlock / 2; ++i) {
      a[2 * i] = interleave_low(b[i], b[i + 8]);
      a[2 * i + 1] = interleave_high(b[i], b[i + 8]);
    }
  }
  for (int i = 0; i < kBlock; ++i) memcpy(to + i * stride, &a[i], kBlock);
}

// sums (or pixels) [i] = previous + sum over k of weights[k] * lines[k * step + i], i < n.
template <bool first, bool last, int... K>
inline void weigh(uint8_t* __restrict pixels, int32_t* __restrict sums,
                  const uint8_t* __restrict lines, ptrdiff_t step,
                  const int32_t* __restrict weights, int n, std::integer_sequence<int, K...>) {
  for (int i = 0; i < n; ++i) {
    int32_t sum = first ? kHalfUnit : sums[i];
    ((sum += weights[K] * lines[K * step + i]), ...);
    if (last) {
      pixels[i] = round_pixel(sum);
    } else {
      sums[i] = sum;
    }
  }
}

template <bool first>
inline void weigh_last(uint8_t* pixels, int32_t* sums, const uint8_t* lines, ptrdiff_t step,
                       const int32_t* weights, int taps, int n) {
#define IVE_TAPS(k)                                                  \
  case k:                                                            \
    return weigh<first, true>(pixels, sums, lines, step, weights, n, \
                              std::make_integer_sequence<int, k>());
  switch (taps) {
    IVE_TAPS(1)
    IVE_TAPS(2)
    IVE_TAPS(3)
    IVE_TAPS(4)
    IVE_TAPS(5)
    IVE_TAPS(6)
    IVE_TAPS(7)
    IVE_TAPS(8)
  }
#undef IVE_TAPS
}

// One line of n output bytes from `taps` >= 1 lines; `sums` (n,) is only touched beyond 8 taps.
inline void resample(uint8_t* pixels, int32_t* sums, const uint8_t* lines, ptrdiff_t step,
                     const int32_t* weights, int taps, int n) {
  const auto eight = std::make_integer_sequence<int, kMaxTaps>();
  if (taps <= kMaxTaps) return weigh_last<true>(pixels, sums, lines, step, weights, taps, n);
  weigh<true, false>(pixels, sums, lines, step, weights, n, eight);
  for (taps -= kMaxTaps; taps > kMaxTaps; taps -= kMaxTaps) {
    lines += kMaxTaps * step;
    weights += kMaxTaps;
    weigh<false, false>(pixels, sums, lines, step, weights, n, eight);
  }
  weigh_last<false>(pixels, sums, lines + kMaxTaps * step, step, weights + kMaxTaps, taps, n);
}

// Channels of one tile row: planar where the output is, else interleaved. Padded to whole blocks.
struct RowLayout {
  bool planar;
  int side, padded;  // pixels

  RowLayout(int32_t layout, int32_t pixels)
      : planar(layout != kTiles),
        side(pixels),
        padded(static_cast<int>(round_up(pixels, kBlock))) {}
  int bytes() const { return 3 * padded; }
  // Blocks of 16 bytes in a chunk of `pixels` pixels (a multiple of 16), and where one starts.
  int block_start(int x0, int pixels, int block) const {
    if (!planar) return 3 * x0 + block * kBlock;
    const int per_plane = pixels / kBlock;
    return (block / per_plane) * padded + x0 + (block % per_plane) * kBlock;
  }
  int pixel(int byte) const { return std::min(planar ? byte % padded : byte / 3, side - 1); }
  int channel(int byte) const { return planar ? byte / padded : byte % 3; }
};

// Part of one axis: outputs begin .. begin + size of it.
struct Span {
  const int32_t *low, *count, *weights;
  int32_t taps;

  Span(const Axis& axis, int64_t begin)
      : low(axis.low + begin),
        count(axis.count + begin),
        weights(axis.weights + begin * axis.taps),
        taps(axis.taps) {}
  int32_t high(int64_t at) const { return low[at] + count[at]; }
  const int32_t* of(int64_t at) const { return weights + at * taps; }
};

// A band of output rows of one column of tiles (or of the thumbnail).
struct Task {
  int32_t target, column;
  int64_t begin, end;  // rows of the resized image
};

// Buffers of one thread. Sizes are for the largest task of the job.
struct Workspace {
  std::unique_ptr<uint8_t[]> lines;   // (input bytes of a chunk, kLanes)
  std::unique_ptr<uint8_t[]> band;    // (input rows of a band, bytes of a row)
  std::unique_ptr<uint8_t[]> rgb;     // NV12: (kLanes, 3, pixels of a chunk)
  std::unique_ptr<uint8_t[]> uv;      // NV12: chroma of a row's pixels
  std::unique_ptr<uint8_t[]> row;     // one resized row of a tile
  std::unique_ptr<uint8_t[]> values;  // one plane of it, normalised
  std::unique_ptr<int32_t[]> sums;
};

}  // namespace ive::host
