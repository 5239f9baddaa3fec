// Tiles of the product: what a path for one kind of CPU provides, and what it is given.
#pragma once

#include "product.h"

namespace ive::int4 {

// Rounded inputs of a few rows, `rows` of the path's even where fewer are used:
//   values: per run of 8 inputs four bytes of each row, of places 0, 2, 4, 6; then 1, 3, 5, 7
//   scales, starts: per block one of each row; a start is -8 times the sum of the values
struct Inputs {
  const int8_t* values;
  const float* scales;
  const int32_t* starts;
};

// Some columns of the weight, transposed in units of four bytes:
//   values: per run of 8 inputs four bytes of each column
//   scales: per block one of each column
struct Panel {
  const uint8_t* values;
  const float* scales;
};

// Part of the inputs of all rows of a tile: `blocks` whole ones.
struct Span {
  int64_t blocks, block;
  bool first;  // the result is written, not added to
};

struct Path {
  const char* name;
  int rows, columns;  // of a tile
  bool (*runs_here)();
  // Rounds one row: `values`, `scales` and `starts` are the first of that row in an `Inputs`.
  void (*round_row)(const float* x, int64_t inputs, int64_t block, int8_t* values, float* scales,
                    int32_t* starts);
  // (columns, count) -> (count, columns) of four bytes; rows of `source` are `apart` bytes apart,
  // and the last of `given` stands for those that are not there.
  void (*transpose)(const uint8_t* source, int64_t apart, int given, int64_t count, uint8_t* out);
  // Adds to `rows` rows of y, `apart` floats apart.
  void (*multiply)(int rows, const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                   int64_t apart);
};

template <int kRows>
IVE_INLINE void round_row(const float* x, int64_t inputs, int64_t block, int8_t* values,
                          float* scales, int32_t* starts) {
  float room[kMaxBlock];
  int8_t even[kMaxBlock / 2], odd[kMaxBlock / 2];
  for (int64_t done = 0; done < inputs; done += block) {
    const float* one = whole_block(x + done, inputs - done, block, room);
    const Rounded rounded = round_block(one, block, even, odd);
    *scales = rounded.scale;
    *starts = -kMiddle * rounded.sum;
    for (int64_t i = 0; i < block / 2; i += 4) {
      std::memcpy(values, even + i, 4);
      std::memcpy(values + 4 * kRows, odd + i, 4);
      values += 8 * kRows;
    }
    scales += kRows;
    starts += kRows;
  }
}

// Where four bytes of column `i` begin; the last that is there stands for the others.
IVE_INLINE const uint8_t* column(const uint8_t* source, int64_t apart, int given, int i) {
  return source + apart * (i < given ? i : given - 1);
}

IVE_INLINE int32_t four(const int8_t* bytes) {
  int32_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace ive::int4
