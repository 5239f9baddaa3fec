// Few rows, as while a sequence is decoded: the weights come from memory, which gives them fastest
// in the order in which they lie, column after column; what arithmetic is left hides behind that.
#pragma once

#include <memory>
#include <new>

#include "product.h"

namespace ive::blocks {

// More rows than these are tiles, on every path.
constexpr int kFewRows = 4;
// What the widest path reads at a time, in bytes.
constexpr int64_t kChunk = 64;
// How far ahead of one row's weights is fetched, in bytes.
constexpr int64_t kAhead = 6144;

// Fetches the line that holds a byte to be read soon into the nearest cache: into a farther one it
// is fetched late, or not at all, where much is.
IVE_INLINE void fetch(const void* byte) { __builtin_prefetch(byte, 0, 3); }

// Rounded rows. Of each, for every value that a byte of the weight holds, a part of `bytes` inputs:
// as many as a column's weight has, filled up with zeros to whole chunks. To every four bytes of
// all parts belongs a start: minus the weight's middle times their sum. To every block belongs a
// scale. A path may order values and starts in another way; it needs no more of them.
struct FewRows {
  int64_t parts = 0, bytes = 0, blocks = 0;
  std::unique_ptr<int8_t[]> values;   // (rows, parts, bytes)
  std::unique_ptr<int32_t[]> starts;  // (rows, bytes / 4)
  std::unique_ptr<float[]> scales;    // (rows, blocks)

  // False where there is no memory.
  bool allocate(const Product& p) {
    parts = 8 / p.bits;
    bytes = (p.column_bytes() + kChunk - 1) / kChunk * kChunk;
    blocks = p.blocks();
    values.reset(new (std::nothrow) int8_t[p.rows * parts * bytes]());
    starts.reset(new (std::nothrow) int32_t[p.rows * bytes / 4]());
    scales.reset(new (std::nothrow) float[p.rows * blocks]);
    return values != nullptr && starts != nullptr && scales != nullptr;
  }

  const int8_t* part(int64_t row, int64_t index) const {
    return values.get() + (row * parts + index) * bytes;
  }

  // Rounds a row; a path that takes the middle from the weight itself needs no starts.
  template <int kBits, bool kStarts>
  IVE_INLINE void round(const Product& p, int64_t row) const {
    float room[kMaxBlock];
    int8_t* to = values.get() + row * parts * bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      const float* x = p.x + row * p.inputs + b * p.block;
      x = whole_block(x, p.inputs - b * p.block, p.block, room);
      scales[row * blocks + b] =
          round_block<kBits>(x, p.block, to + b * p.block_bytes(), bytes).scale;
    }
    if (!kStarts) return;
    int32_t* start = starts.get() + row * bytes / 4;
    for (int64_t i = 0; i < bytes / 4; ++i) {
      int32_t sum = 0;
      for (int64_t j = 0; j < kParts<kBits>; ++j) {
        const int8_t* four = to + j * bytes + 4 * i;
        sum += four[0] + four[1] + four[2] + four[3];
      }
      start[i] = -kMiddle<kBits> * sum;
    }
  }
};

}  // namespace ive::blocks
