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

// Rounded rows. Of each, `bytes` of the values in even places and in odd ones: as many as of a
// column's weights, filled up with zeros to whole chunks. To every four bytes of both belongs a
// start: -8 times their sum. To every block belongs a scale.
struct FewRows {
  int64_t bytes = 0, blocks = 0;
  std::unique_ptr<int8_t[]> even, odd;
  std::unique_ptr<int32_t[]> starts;
  std::unique_ptr<float[]> scales;

  // False where there is no memory.
  bool allocate(const Product& p) {
    bytes = (p.column_bytes() + kChunk - 1) / kChunk * kChunk;
    blocks = p.blocks();
    even.reset(new (std::nothrow) int8_t[p.rows * bytes]());
    odd.reset(new (std::nothrow) int8_t[p.rows * bytes]());
    starts.reset(new (std::nothrow) int32_t[p.rows * bytes / 4]());
    scales.reset(new (std::nothrow) float[p.rows * blocks]);
    return even != nullptr && odd != nullptr && starts != nullptr && scales != nullptr;
  }

  IVE_INLINE void round(const Product& p, int64_t row) const {
    float room[kMaxBlock];
    int8_t *evens = even.get() + row * bytes, *odds = odd.get() + row * bytes;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t place = b * p.block / 2;
      const float* x = p.x + row * p.inputs + b * p.block;
      x = whole_block(x, p.inputs - b * p.block, p.block, room);
      scales[row * blocks + b] = round_block(x, p.block, evens + place, odds + place).scale;
    }
    int32_t* start = starts.get() + row * bytes / 4;
    for (int64_t i = 0; i < bytes / 4; ++i) {
      const int8_t *e = evens + 4 * i, *o = odds + 4 * i;
      start[i] = -kMiddle * (e[0] + e[1] + e[2] + e[3] + o[0] + o[1] + o[2] + o[3]);
    }
  }
};

}  // namespace ive::blocks
