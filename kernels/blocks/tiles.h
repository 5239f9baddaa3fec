// Tiles of the product: what a path for one kind of CPU provides, and what it is given.
#pragma once

#include "few.h"
#include "product.h"

namespace ive::blocks {

// Rounded inputs of a few rows, `rows` of the path's even where fewer are used:
//   values: per run of as many inputs as a unit has bytes, a unit of each row; with weights of 4
//     bits, per run of twice as many, of even places; then of odd ones
//   scales, starts: per block one of each row; a start is what the sums of its products begin with
struct Inputs {
  const int8_t* values;
  const float* scales;
  const int32_t* starts;
};

// Some columns of the weight, transposed:
//   values: per unit of a column that of each column
//   scales: per block one of each column
// What lies `ahead` is as large as the values, and fetched meanwhile: it is needed next.
struct Panel {
  const uint8_t* values;
  const float* scales;
  const uint8_t* ahead;
};

// Part of the inputs of all rows of a tile: `blocks` whole ones.
struct Span {
  int64_t blocks, block;
  bool first;  // the result is written, not added to
};

// What becomes a panel: (columns, count) of four bytes.
struct Source {
  const uint8_t* first;
  int64_t apart;  // bytes between columns
  int given;      // columns that are there; the last of them stands for the others
  int64_t count;

  // Where column `i` begins.
  const uint8_t* column(int i) const { return first + apart * (i < given ? i : given - 1); }
};

struct Path {
  const char* name;
  int rows, columns;  // of a tile
  int unit;           // bytes of a row, and of a column, that lie side by side in a tile
  bool (*runs_here)();
  // Rounds one row: `values`, `scales` and `starts` are the first of that row in an `Inputs`.
  void (*round_row)(const float* x, int64_t inputs, int64_t block, int8_t* values, float* scales,
                    int32_t* starts);
  // Transpose a panel's weights in units, and its scales; see `Source`.
  void (*transpose_weights)(const Source& source, uint8_t* out);
  void (*transpose_scales)(const Source& source, uint8_t* out);
  // Adds to `rows` rows of y, `apart` floats apart.
  void (*multiply)(int rows, const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                   int64_t apart);
  // A product of at most kFewRows rows: one of them rounded, and its columns `from` to `to`.
  void (*round_few)(const Product& product, const FewRows& x, int64_t row);
  void (*multiply_few)(const Product& product, const FewRows& x, int64_t from, int64_t to);
};

// Rounds a row for tiles of kRows. Sums start at minus the weight's middle times that of the
// inputs, or, where a path takes the middle from the weight itself, at zero.
template <int kRows, int kUnit, int kBits, bool kStarts>
IVE_INLINE void round_row(const float* x, int64_t inputs, int64_t block, int8_t* values,
                          float* scales, int32_t* starts) {
  float room[kMaxBlock];
  int8_t rounded_values[kMaxBlock];
  const int64_t apart = block / kParts<kBits>;
  for (int64_t done = 0; done < inputs; done += block) {
    const float* one = whole_block(x + done, inputs - done, block, room);
    const Rounded rounded = round_block<kBits>(one, block, rounded_values, apart);
    *scales = rounded.scale;
    *starts = kStarts ? -kMiddle<kBits> * rounded.sum : 0;
    for (int64_t i = 0; i < apart; i += kUnit) {
      for (int part = 0; part < kParts<kBits>; ++part) {
        std::memcpy(values, rounded_values + part * apart + i, kUnit);
        values += kUnit * kRows;
      }
    }
    scales += kRows;
    starts += kRows;
  }
}

IVE_INLINE int32_t four(const int8_t* bytes) {
  int32_t value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

}  // namespace ive::blocks
