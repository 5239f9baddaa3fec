// What a quantised vision tower computes: integer products, norms, GELU, attention, and the float
// product of the patches. A rounded result is that of QuantizeLinear, which the next product takes.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#define IVE_INLINE inline __attribute__((always_inline))

namespace ive::vision {

// Lanes by which everything is added up, whatever a CPU's registers hold.
constexpr int kLanes = 16;

struct Rounding {
  const float* factors;  // of each column, before rounding; or null
  float scale;
  int32_t zero;
};

// Rows of floats, or, where there are bytes, of rounded ones, `apart` elements apart.
struct Output {
  float* floats;
  uint8_t* bytes;
  int64_t apart;
  Rounding rounding;
};

// Rows (rows, width), of two arrays added where there is another, normed.
struct Norm {
  const float* x;
  const float* added;   // or null
  float* sum;           // where x + added goes; or null
  const float* weight;  // (width)
  const float* bias;    // (width), or null
  int64_t rows, width;
  float epsilon;
  bool centred;  // LayerNormalization; else of root mean squares
  Output out;
};

struct Gelu {
  const float* x;  // (rows, width)
  int64_t rows, width;
  Output out;
};

// y = x W^T + b.
struct Product {
  const float* x;       // (rows, inputs)
  const float* weight;  // (columns, inputs)
  const float* bias;    // (columns), or null
  float* y;             // (rows, columns)
  int64_t rows, inputs, columns;
};

// Products of bytes and signed bytes, added up in integers that wrap around as QGemm's do:
//   y[m, n] = (bias[n] + sum over k of (x[m, k] - zero) * weight[n, k]) * (scale * scales[n])
struct IntegerProduct {
  const uint8_t* x;      // (rows, inputs)
  const int8_t* weight;  // (columns, inputs)
  const float* scales;   // (columns)
  const int32_t* bias;   // (columns), or null
  int64_t rows, inputs, columns;
  float scale;
  int32_t zero;
  bool gelu;  // of the results
  Output out;
};

// Every token of a tile attends to all of them: (tiles, tokens, heads, size).
struct Attention {
  const float *query, *key, *value;
  const float *query_weight, *key_weight;  // (heads * size) of norms before; or null
  int64_t tiles, tokens, heads, size;
  float epsilon;
  Output out;

  int64_t width() const { return heads * size; }
};

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

}  // namespace ive::vision
