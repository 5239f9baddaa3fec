// A product of bytes and signed bytes; included once for each path, after lanes.h. What is
// multiplied at a time is a unit of 32 bits: kUnit says of what, kRows and kBlocks what a path's
// registers hold. A path also defines, before, multiply_units(sums, inputs, weights), and
// transpose_fours.

constexpr int kUnitInputs = kUnit == Unit::kPairs ? 2 : 4;
constexpr int kStrip = kBlocks * kLanes;
using IntegerResults = int32_t[kRows][kStrip];

// The unit of so many inputs, and of zeros after them.
IVE_TARGET IVE_INLINE int32_t input_unit(const uint8_t* x, int64_t left, int32_t zero) {
  uint8_t bytes[4] = {};
  if (kUnit == Unit::kPairs) {
    const auto low = static_cast<uint32_t>(x[0] - zero);
    const auto high = static_cast<uint32_t>(left > 1 ? x[1] - zero : 0);
    return static_cast<int32_t>((low & 0xffffu) | high << 16);
  }
  int32_t unit;
  std::memcpy(bytes, x, left < 4 ? left : 4);
  std::memcpy(&unit, bytes, sizeof unit);
  return kUnit == Unit::kSigned ? static_cast<int32_t>(unit ^ 0x80808080u) : unit;
}

// Puts the units of every row of a tile side by side; rows that are not there repeat the last.
IVE_TARGET inline void pack_inputs(const IntegerProduct& p, const InputBlock& x, int64_t tile) {
  const int64_t whole = x.inputs / kUnitInputs;
  const uint8_t* rows[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = tile * kRows + r < x.rows ? tile * kRows + r : x.rows - 1;
    rows[r] = p.x + (x.row + row) * p.inputs + x.input;
  }
  int32_t* to = x.tile(tile, kRows);
  for (int64_t u = 0; u < whole; ++u) {
    for (int r = 0; r < kRows; ++r) *to++ = input_unit(rows[r] + u * kUnitInputs, 4, p.zero);
  }
  const int64_t left = x.inputs - whole * kUnitInputs;
  for (int r = 0; r < kRows && left > 0; ++r) {
    *to++ = input_unit(rows[r] + whole * kUnitInputs, left, p.zero);
  }
}

// Weights of a strip of columns in fours, those of a column beside those of the next.
IVE_TARGET IVE_INLINE void load_fours(const IntegerProduct& p, int64_t column, int64_t from,
                                      int64_t inputs, int32_t* fours) {
  const int64_t given = p.columns - column < kStrip ? p.columns - column : kStrip;
  const int64_t whole = inputs / 4, left = inputs - 4 * whole;
  const int8_t* first = p.weight + column * p.inputs + from;
  if (whole > 0) transpose_fours(first, p.inputs, given, whole, fours);
  for (int c = 0; c < kStrip && left > 0; ++c) {
    const int8_t* weight = first + (c < given ? c : given - 1) * p.inputs;
    int8_t bytes[4] = {};
    std::memcpy(bytes, weight + 4 * whole, left);
    std::memcpy(fours + whole * kStrip + c, bytes, sizeof bytes);
  }
}

// Makes pairs of int16 of fours.
IVE_TARGET IVE_INLINE void widen(const int32_t* fours, int64_t count, int32_t* pairs) {
  for (int64_t i = 0; i < count; ++i, fours += kStrip, pairs += 2 * kStrip) {
#pragma GCC unroll 8
    for (int c = 0; c < kStrip; c += kWidth) {
      NativeInt four;
      std::memcpy(&four, fours + c, sizeof four);
      const auto upper = static_cast<int32_t>(0xffff0000u);
      const NativeInt first = ((four << 24 >> 24) & 0xffff) | ((four << 16 >> 8) & upper);
      const NativeInt second = ((four << 8 >> 24) & 0xffff) | ((four >> 8) & upper);
      std::memcpy(pairs + c, &first, sizeof first);
      std::memcpy(pairs + kStrip + c, &second, sizeof second);
    }
  }
}

// Weights of a strip in units.
IVE_TARGET IVE_INLINE void load_panel(const IntegerProduct& p, int64_t column, int64_t from,
                                      int64_t inputs, int32_t* panel) {
  if (kUnit != Unit::kPairs) return load_fours(p, column, from, inputs, panel);
  alignas(64) int32_t fours[kSpanUnits / 2 * kStrip];
  load_fours(p, column, from, inputs, fours);
  widen(fours, (inputs + 3) / 4, panel);
}

// Adds the products of a tile's rows; see `add_products`.
IVE_TARGET __attribute__((noinline)) inline void add_units(const int32_t* x, const int32_t* panel,
                                                           int64_t count, IntegerResults& results) {
  constexpr int kNatives = kBlocks * kParts, kSums = kRows * kNatives;
  NativeInt sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    std::memcpy(&sums[i], &results[i / kNatives][i % kNatives * kWidth], sizeof sums[i]);
  }
  for (int64_t u = 0; u < count; ++u) {
    NativeInt weights[kNatives];
#pragma GCC unroll 4
    for (int i = 0; i < kNatives; ++i) {
      std::memcpy(&weights[i], panel + i * kWidth, sizeof weights[i]);
    }
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      multiply_units(sums[i], x[i / kNatives] - NativeInt{}, weights[i % kNatives]);
    }
    x += kRows;
    panel += kStrip;
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    std::memcpy(&results[i / kNatives][i % kNatives * kWidth], &sums[i], sizeof sums[i]);
  }
}

// Adds up the weights of each column.
IVE_TARGET IVE_INLINE void add_weights(const int32_t* panel, int64_t count, int32_t* sums) {
  for (int64_t u = 0; u < count; ++u, panel += kStrip) {
    for (int c = 0; c < kStrip; c += kWidth) {
      NativeInt sum, weights;
      std::memcpy(&sum, sums + c, sizeof sum);
      std::memcpy(&weights, panel + c, sizeof weights);
      multiply_units(sum, 0x01010101 - NativeInt{}, weights);
      std::memcpy(sums + c, &sum, sizeof sum);
    }
  }
}

// What is added to the results of a task's columns, and what they are multiplied by at last.
struct Ends {
  int32_t weights[kTaskWidth] = {};  // their sums
  alignas(64) int32_t starts[kTaskWidth] = {};
  alignas(64) float factors[kTaskWidth] = {};
};

// How far the inputs of units lie above those meant.
constexpr int32_t excess(int32_t zero) {
  return kUnit == Unit::kPairs ? 0 : kUnit == Unit::kSigned ? zero - 128 : zero;
}

IVE_TARGET IVE_INLINE void find_ends(const IntegerProduct& p, const InputBlock& x, int64_t column,
                                     Ends& ends) {
  for (int c = 0; c < kTaskWidth && column + c < p.columns; ++c) {
    const int32_t bias = p.bias == nullptr || x.input > 0 ? 0 : p.bias[column + c];
    const auto above =
        static_cast<uint32_t>(excess(p.zero)) * static_cast<uint32_t>(ends.weights[c]);
    ends.starts[c] = static_cast<int32_t>(static_cast<uint32_t>(bias) - above);
    ends.factors[c] = p.scale * p.scales[column + c];
  }
}

// Ends the results of a tile in a strip: they stand as integers in the place of the floats until
// the last inputs are added.
IVE_TARGET IVE_INLINE void finish(const IntegerProduct& p, const InputBlock& x, int64_t tile,
                                  int64_t column, const int32_t* starts, const float* factors,
                                  const IntegerResults& results) {
  const bool begins = x.input == 0, is_last = x.input + x.inputs == p.inputs;
  for (int64_t r = 0; r < kRows && tile * kRows + r < x.rows; ++r) {
    const int64_t row = x.row + tile * kRows + r;
    for (int b = 0; b < kStrip && column + b < p.columns; b += kLanes) {
      const int64_t left = p.columns - column - b;
      float* kept = begins && is_last ? nullptr : p.out.floats + row * p.out.apart + column + b;
      const Ints before = begins ? Ints{} : bits(load(kept, left));
      Ints sums;
#pragma GCC unroll 4
      for (int i = 0; i < kParts; ++i) {
        NativeInt sum, start;
        std::memcpy(&sum, &results[r][b + i * kWidth], sizeof sum);
        std::memcpy(&start, starts + b + i * kWidth, sizeof start);
        sums.part[i] = sum + start + before.part[i];
      }
      if (!is_last) {
        store(kept, floats(sums), left);
        continue;
      }
      Floats y = converted(sums) * load(factors + b);
      if (p.gelu) y = gelu(y);
      store(p.out, row, column + b, y, left);
    }
  }
}

// Fetches a share of the weights of some columns.
IVE_INLINE void fetch_share(const IntegerProduct& p, int64_t column, int64_t from, int64_t inputs,
                            int64_t share, int64_t shares) {
  constexpr int64_t kLine = 64;
  const int64_t left = p.columns - column, lines = (inputs + kLine - 1) / kLine;
  const int64_t all = (left < kTaskWidth ? left : kTaskWidth) * lines;
  const int8_t* first = p.weight + column * p.inputs + from;
  for (int64_t i = all * share / shares; i < all * (share + 1) / shares; ++i) {
    __builtin_prefetch(first + i / lines * p.inputs + i % lines * kLine, 0, 2);
  }
}

// Some columns, by all that is packed.
IVE_TARGET inline void multiply_integers(const IntegerProduct& p, const InputBlock& x,
                                         int64_t task) {
  constexpr int kStrips = kTaskWidth / kStrip;
  alignas(64) int32_t panels[kStrips][kSpanUnits * kStrip];
  alignas(64) IntegerResults kept[kMostRows / kRows][kStrips];
  Ends ends;
  const int64_t column = task * kTaskWidth, tiles = round_up(x.rows, kRows) / kRows;
  const int64_t spans = round_up(x.units, kSpanUnits) / kSpanUnits;
  const int64_t span = round_up(round_up(x.units, spans) / spans, 2);
  for (int64_t from = 0; from < x.units; from += span) {
    const int64_t count = x.units - from < span ? x.units - from : span;
    const bool ending = from + count == x.units;
    const int64_t first = from * kUnitInputs, left = x.inputs - first;
    const int64_t inputs = left < count * kUnitInputs ? left : count * kUnitInputs;
    for (int s = 0; s < kStrips && column + s * kStrip < p.columns; ++s) {
      load_panel(p, column + s * kStrip, x.input + first, inputs, panels[s]);
      if (excess(p.zero) != 0) add_weights(panels[s], count, ends.weights + s * kStrip);
    }
    if (ending) find_ends(p, x, column, ends);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (!ending) {
        fetch_share(p, column, x.input + first + inputs, left - inputs, tile, tiles);
      } else if (column + kTaskWidth < p.columns) {
        fetch_share(p, column + kTaskWidth, x.input, span * kUnitInputs, tile, tiles);
      }
      for (int s = 0; s < kStrips && column + s * kStrip < p.columns; ++s) {
        IntegerResults& results = kept[tile][s];
        if (from == 0) std::memset(results, 0, sizeof results);
        add_units(x.tile(tile, kRows) + from * kRows, panels[s], count, results);
        if (!ending) continue;
        const int at = s * kStrip;
        finish(p, x, tile, column + at, ends.starts + at, ends.factors + at, results);
      }
    }
  }
}

template <bool fast>
constexpr Integers integers = {kRows, kUnitInputs, fast, pack_inputs, multiply_integers};
