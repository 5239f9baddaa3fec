// Inputs of an integer product as the paths multiply them, and the room that this takes.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "tower.h"

namespace ive::vision {

// What is multiplied at a time, in 32 bits: four bytes as they are, four of which 128 is taken, or
// two of which the zero point is taken, as int16.
enum class Unit { kBytes, kSigned, kPairs };

// Units of weights that are transposed at a time: they stay in the second cache for all rows of a
// block.
constexpr int64_t kSpanUnits = 512;
// Columns of a task.
constexpr int64_t kTaskWidth = 64;
// Rows of a block, whose results a task keeps.
constexpr int64_t kMostRows = 768;
// Units of a block, which go through all weights before the next block does.
constexpr int64_t kMostUnits = 1 << 19;

// Some inputs of some rows in units, those of a tile side by side.
class InputBlock {
 public:
  int64_t row = 0, rows = 0;      // the first, and how many
  int64_t input = 0, inputs = 0;  // the same
  int64_t units = 0;              // of a row

  // False where there is no memory.
  bool allocate(const IntegerProduct& p, int tile_rows, int unit_inputs) {
    unit_inputs_ = unit_inputs;
    most_rows_ = part(p.rows, kMostRows, tile_rows);
    // Results that are rounded are not kept from one block to the next.
    const int64_t most = p.out.bytes != nullptr ? p.inputs : kMostUnits / most_rows_ * unit_inputs;
    most_inputs_ = part(p.inputs, most, 4);
    const int64_t most_units = round_up(most_inputs_, unit_inputs) / unit_inputs;
    values_.reset(new (std::nothrow) int32_t[round_up(most_rows_, tile_rows) * most_units]);
    return values_ != nullptr;
  }

  // Goes on to the next inputs, or to the next rows; false where none are left.
  bool next(const IntegerProduct& p) {
    input += inputs;
    if (input == p.inputs) input = inputs = 0;
    if (input == 0) row += rows;
    rows = std::min(most_rows_, p.rows - row);
    inputs = std::min(most_inputs_, p.inputs - input);
    units = round_up(inputs, unit_inputs_) / unit_inputs_;
    return rows > 0;
  }

  // The first unit of a tile.
  int32_t* tile(int64_t index, int tile_rows) const {
    return values_.get() + index * tile_rows * units;
  }

 private:
  // The size of parts alike of which none is larger than `most`, but for rounding.
  static int64_t part(int64_t count, int64_t most, int64_t multiple) {
    const int64_t parts = round_up(count, most) / most;
    return std::min(count, round_up(round_up(count, parts) / parts, multiple));
  }

  int64_t most_rows_ = 0, most_inputs_ = 0, unit_inputs_ = 1;
  std::unique_ptr<int32_t[]> values_;
};

}  // namespace ive::vision
