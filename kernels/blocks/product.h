// A product of float32 rows with a weight in blocks of four bits: y = x W^T.
//
// The weight is stored as com.microsoft.MatMulNBits reads it: of each of N columns, block after
// block, bytes of two values from 0 to 15, the earlier in the lower half; each stands for
// (value - 8) * scale. Every row of x is rounded to int8 block by block (largest / 127), so that
//
//   y[m, n] = sum over blocks of xscale * wscale * (sum(value * q) - 8 * sum(q))
//
// where the inner sums are exact integers. Tiles add blocks in their order by fused multiply-adds,
// so that these are the same bits on all paths; few rows add them in another order on each.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define IVE_INLINE inline __attribute__((always_inline))

namespace ive::blocks {

constexpr int64_t kMaxBlock = 256;
constexpr int32_t kMiddle = 8;

struct Product {
  const float* x;         // (rows, inputs)
  const uint8_t* values;  // (columns, blocks, block / 2)
  const float* scales;    // (columns, blocks)
  const float* bias;      // (columns), or null
  float* y;               // (rows, columns)
  int64_t rows, inputs, columns, block;

  int64_t blocks() const { return (inputs + block - 1) / block; }
  int64_t column_bytes() const { return blocks() * block / 2; }
};

// What rounding makes of a block of inputs.
struct Rounded {
  float scale;
  int32_t sum;
};

// Rounds a block of floats to int8, those of even and of odd places apart. Values below 3e-36
// count as zero; a block that is not finite has scale NaN, so that the result is NaN.
IVE_INLINE Rounded round_block(const float* x, int64_t block, int8_t* even, int8_t* odd) {
  int32_t top = 0;  // the bits of absolute values stand in the order of the values
  for (int64_t i = 0; i < block; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  constexpr int32_t kInfinity = 0x7f800000, kLeast = 0x04800000;  // kLeast: 2^-118
  if (top >= kInfinity || top < kLeast) {
    for (int64_t i = 0; i < block / 2; ++i) even[i] = odd[i] = 0;
    return {top < kLeast ? 0.f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  float largest;
  std::memcpy(&largest, &top, sizeof largest);
  const float factor = 127.f / largest;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to even
  constexpr int32_t kShiftBits = 0x4b400000;
  int32_t sum = 0;
  for (int64_t i = 0; i < block / 2; ++i) {
    const float shifted[2] = {x[2 * i] * factor + kShift, x[2 * i + 1] * factor + kShift};
    int32_t bits[2];
    std::memcpy(bits, shifted, sizeof bits);
    const int32_t first = bits[0] - kShiftBits, second = bits[1] - kShiftBits;
    even[i] = static_cast<int8_t>(first);
    odd[i] = static_cast<int8_t>(second);
    sum += first + second;
  }
  return {largest / 127.f, sum};
}

// The block that begins at `x`; one that ends early is filled up with zeros in `room`.
IVE_INLINE const float* whole_block(const float* x, int64_t given, int64_t block, float* room) {
  if (given >= block) return x;
  std::memcpy(room, x, given * sizeof(float));
  std::memset(room + given, 0, (block - given) * sizeof(float));
  return room;
}

}  // namespace ive::blocks
