// Tiles of one kind of CPU: included once for each, in its namespace, where there are
//   IVE_TARGET            the attribute of its functions
//   kLanes, kRows, kColumns, kUnit  of a vector; of a tile, see `Path`
//   kSignedBytes          whether weights of 8 bits are signed there: theirs is the middle
//   Floats, Ints          vectors; all, load_floats, store_floats, converted, fma
//   add                   adds the products of one block
// GCC turns vectors into instructions before it inlines: so templates of a width would not do.

constexpr int kVectors = kColumns / kLanes;

template <int kBits>
IVE_TARGET void round_inputs(const float* x, int64_t inputs, int64_t block, int8_t* values,
                             float* scales, int32_t* starts) {
  round_row<kRows, kUnit, kBits, kBits == 4 || !kSignedBytes>(x, inputs, block, values, scales,
                                                              starts);
}

template <int kBits>
IVE_TARGET void round_few(const Product& p, const FewRows& x, int64_t row) {
  x.round<kBits, kBits == 4 || !kSignedBytes>(p, row);
}

template <int R, int kBits>
IVE_TARGET void multiply(const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                         int64_t apart) {
  Floats results[R][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      results[r][v] = span.first ? all(0.f) : load_floats(y + r * apart + v * kLanes);
    }
  }
  for (int64_t b = 0; b < span.blocks; ++b) {
    const int64_t before = b * span.block * kBits / 8 * kColumns;
    Ints sums[R][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = all(inputs.starts[b * kRows + r]);
    }
    add<R, kBits>(sums, inputs.values + b * span.block * kRows, panel.values + before,
                  panel.ahead + before, span.block);
    Floats scales[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      scales[v] = load_floats(panel.scales + b * kColumns + v * kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Floats scale = all(inputs.scales[b * kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        results[r][v] = fma(converted(sums[r][v]), scale * scales[v], results[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store_floats(y + r * apart + v * kLanes, results[r][v]);
  }
}

template <int kBits>
void multiply_rows(int rows, const Inputs& inputs, const Panel& panel, const Span& span, float* y,
                   int64_t apart) {
  with_rows<kRows>(rows, [&](auto r) { multiply<r, kBits>(inputs, panel, span, y, apart); });
}
