// The product as it is defined: what the other paths are compared with, on any CPU.
#pragma once

#include <cmath>

#include "product.h"

namespace ive::blocks {

template <int kBits>
void plain_row(const Product& p, int64_t row) {
  const int64_t blocks = p.blocks(), bytes = p.block_bytes();
  float* y = p.y + row * p.columns;
  for (int64_t n = 0; n < p.columns; ++n) y[n] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    int8_t q[kMaxBlock];
    float room[kMaxBlock];
    const float* x = p.x + row * p.inputs + b * p.block;
    x = whole_block(x, p.inputs - b * p.block, p.block, room);
    const Rounded rounded = round_block<kBits>(x, p.block, q, bytes);
    for (int64_t n = 0; n < p.columns; ++n) {
      const uint8_t* values = p.values + (n * blocks + b) * bytes;
      int32_t sum = -kMiddle<kBits> * rounded.sum;
      for (int64_t i = 0; i < bytes; ++i) {
        for (int part = 0; part < kParts<kBits>; ++part) {
          const int value = values[i] >> (kBits * part) & ((1 << kBits) - 1);
          sum += value * q[part * bytes + i];
        }
      }
      const float scale = rounded.scale * p.scales[n * blocks + b];
      y[n] = std::fma(static_cast<float>(sum), scale, y[n]);
    }
  }
  for (int64_t n = 0; p.bias != nullptr && n < p.columns; ++n) y[n] += p.bias[n];
}

}  // namespace ive::blocks
