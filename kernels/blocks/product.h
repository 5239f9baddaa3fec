// A product of float32 rows with a weight in blocks of four or eight bits: y = x W^T.
//
// The weight is stored as com.microsoft.MatMulNBits reads it: of each of N columns, block after
// block, bytes of one value from 0 to 255, or of two from 0 to 15, the earlier in the lower half.
// Each stands for (value - middle) * scale, where the middle is 128, or 8. Every row of x is
// rounded to int8 block by block (largest / 127), so that
//
//   y[m, n] = sum over blocks of xscale * wscale * (sum(value * q) - middle * sum(q))
//
// where the inner sums are exact integers. Tiles add blocks in their order by fused multiply-adds,
// so that these are the same bits on all paths; few rows add them in another order on each.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#define IVE_INLINE inline __attribute__((always_inline))

namespace ive::blocks {

constexpr int64_t kMaxBlock = 256;

// Of a weight's values: how many are in a byte, and which one stands for zero.
template <int kBits>
constexpr int kParts = 8 / kBits;
template <int kBits>
constexpr int32_t kMiddle = 1 << (kBits - 1);

struct Product {
  const float* x;         // (rows, inputs)
  const uint8_t* values;  // (columns, blocks, block * bits / 8)
  const float* scales;    // (columns, blocks)
  const float* bias;      // (columns), or null
  float* y;               // (rows, columns)
  int64_t rows, inputs, columns, block, bits;

  int64_t blocks() const { return (inputs + block - 1) / block; }
  int64_t block_bytes() const { return block * bits / 8; }
  int64_t column_bytes() const { return blocks() * block_bytes(); }
};

// What rounding makes of a block of inputs.
struct Rounded {
  float scale;
  int32_t sum;
};

// Rounds a block of floats to int8. Of as many as a byte of the weight holds, each goes into a part
// of its own; parts are `apart`. Values below 3e-36 count as zero; a block that is not finite has
// scale NaN, so that the result is NaN.
template <int kBits>
IVE_INLINE Rounded round_block(const float* x, int64_t block, int8_t* values, int64_t apart) {
  constexpr int kCount = kParts<kBits>;
  int32_t top = 0;  // the bits of absolute values stand in the order of the values
  for (int64_t i = 0; i < block; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  constexpr int32_t kInfinity = 0x7f800000, kLeast = 0x04800000;  // kLeast: 2^-118
  if (top >= kInfinity || top < kLeast) {
    for (int part = 0; part < kCount; ++part) {
      for (int64_t i = 0; i < block / kCount; ++i) values[part * apart + i] = 0;
    }
    return {top < kLeast ? 0.f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  float largest;
  std::memcpy(&largest, &top, sizeof largest);
  const float factor = 127.f / largest;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds to even
  constexpr int32_t kShiftBits = 0x4b400000;
  int32_t sum = 0;
  for (int64_t i = 0; i < block / kCount; ++i) {
    for (int part = 0; part < kCount; ++part) {
      const float shifted = x[kCount * i + part] * factor + kShift;
      int32_t bits;
      std::memcpy(&bits, &shifted, sizeof bits);
      values[part * apart + i] = static_cast<int8_t>(bits - kShiftBits);
      sum += bits - kShiftBits;
    }
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

// Calls a function with the number of rows, at most kMost, as a constant.
template <int kMost, typename Function>
void with_rows(int64_t rows, const Function& function) {
  if (rows == kMost) return function(std::integral_constant<int, kMost>{});
  if constexpr (kMost > 1) with_rows<kMost - 1>(rows, function);
}

}  // namespace ive::blocks
