// A product of floats; each result is added up input by input. Included once for each path, after
// lanes.h; kRows and kBlocks are what a path's registers hold: rows, and runs of 16 columns.

// Inputs of which a task transposes the weight at a time.
constexpr int64_t kSpan = 256;

IVE_TARGET IVE_INLINE void transpose(const Product& p, int64_t column, int64_t from, int64_t count,
                                     float* panel) {
  for (int64_t c = 0; c < kTaskColumns; ++c) {
    const bool given = column + c < p.columns;
    const float* weight = p.weight + (column + c) * p.inputs + from;
    float* to = panel + c / kLanes * kSpan * kLanes + c % kLanes;
    for (int64_t k = 0; k < count; ++k) to[k * kLanes] = given ? weight[k] : 0.f;
  }
}

using Results = float[kRows][kBlocks * kLanes];

// Adds the products of kRows rows. GCC 12 keeps the sums in registers where they are a flat array
// of a function that does nothing else.
IVE_TARGET __attribute__((noinline)) inline void add_products(const float* const (&x)[kRows],
                                                              const float* panel, int64_t count,
                                                              Results& results) {
  constexpr int kNatives = kBlocks * kParts, kSums = kRows * kNatives;
  Native sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    std::memcpy(&sums[i], &results[i / kNatives][i % kNatives * kWidth], sizeof sums[i]);
  }
  for (int64_t k = 0; k < count; ++k) {
    Native weight[kNatives];
#pragma GCC unroll 4
    for (int i = 0; i < kNatives; ++i) {
      const float* place = panel + (i / kParts * kSpan + k) * kLanes + i % kParts * kWidth;
      std::memcpy(&weight[i], place, sizeof weight[i]);
    }
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      sums[i] += (x[i / kNatives][k] - Native{}) * weight[i % kNatives];
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    std::memcpy(&results[i / kNatives][i % kNatives * kWidth], &sums[i], sizeof sums[i]);
  }
}

// A tile of at most kRows rows: those that are not there repeat the last.
IVE_TARGET IVE_INLINE void multiply_tile(const Product& p, int64_t row, int64_t column,
                                         int64_t from, int64_t count, const float* panel) {
  const int64_t rows = p.rows - row < kRows ? p.rows - row : kRows;
  const bool ends = p.bias != nullptr && from + count == p.inputs;
  const float* x[kRows];
  Results results = {};
  for (int r = 0; r < kRows; ++r) {
    const int64_t place = row + (r < rows ? r : rows - 1);
    x[r] = p.x + place * p.inputs + from;
    for (int b = 0; from > 0 && b < kBlocks; ++b) {
      const int64_t first = column + b * kLanes, left = p.columns - first;
      if (left > 0) store(results[r] + b * kLanes, load(p.y + place * p.columns + first, left));
    }
  }
  add_products(x, panel, count, results);
  for (int r = 0; r < rows; ++r) {
    for (int b = 0; b < kBlocks; ++b) {
      const int64_t first = column + b * kLanes, left = p.columns - first;
      if (left <= 0) continue;
      const Floats y = load(results[r] + b * kLanes);
      store(p.y + (row + r) * p.columns + first, ends ? y + load(p.bias + first, left) : y, left);
    }
  }
}

IVE_TARGET inline void multiply_columns(const Product& p, int64_t task) {
  alignas(64) float panel[kTaskColumns * kSpan];
  const int64_t column = task * kTaskColumns;
  for (int64_t from = 0; from < p.inputs; from += kSpan) {
    const int64_t count = p.inputs - from < kSpan ? p.inputs - from : kSpan;
    transpose(p, column, from, count, panel);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      for (int64_t c = 0; c < kTaskColumns; c += kBlocks * kLanes) {
        if (column + c >= p.columns) break;
        multiply_tile(p, row, column + c, from, count, panel + c * kSpan);
      }
    }
  }
}
