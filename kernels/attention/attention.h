// Causal attention of the rows of one pass, of one sequence after the other, each over the keys and
// values of its own cache, into which its new ones are written first.
#pragma once

#include <cstdint>
#include <cstring>

#define IVE_INLINE inline __attribute__((always_inline))

namespace ive::attention {

// Of a value; of caches also int8, times the scale of its head and lane.
enum Kind : int32_t { kFloat = 0, kHalf = 1, kInt8 = 2 };

constexpr int64_t kMostHead = 256;

IVE_INLINE int64_t bytes_of(Kind kind) { return kind == kFloat ? 4 : kind == kHalf ? 2 : 1; }

// Of a row of `sequences`: its first row in the pass, its rows, positions cached before them, the
// positions its cache has room for; then the addresses of each layer's keys and values.
enum class Field { kFirst, kRows, kCached, kCapacity, kAddresses };

struct Sequence {
  int64_t first, rows, cached, capacity;
  char *keys, *values;  // (kv_heads, capacity, head)

  int64_t total() const { return cached + rows; }
};

struct Pass {
  const void *query, *key, *value;         // rows of heads, the kind given
  const void *cos, *sin;                   // (rows, head / 2), or null: they are rotated already
  const float *key_scales, *value_scales;  // (kv_heads, head), of caches of int8
  void* out;                               // (rows, heads, head)
  const int64_t* sequences;                // (count, fields)
  int64_t query_apart, key_apart, value_apart;  // values between rows
  int64_t rows, heads, kv_heads, head;
  int64_t count, fields, layer;
  Kind given, cached;
  int64_t group() const { return heads / kv_heads; }

  Sequence sequence(int64_t index) const {
    const int64_t* row = sequences + index * fields;
    const auto field = [row](Field one) { return row[static_cast<int>(one)]; };
    const int64_t* addresses = row + static_cast<int>(Field::kAddresses) + 2 * layer;
    return {field(Field::kFirst),    field(Field::kRows),      field(Field::kCached),
            field(Field::kCapacity), at_address(addresses[0]), at_address(addresses[1])};
  }

  static char* at_address(int64_t address) { return reinterpret_cast<char*>(address); }
};

// Part of a pass: lines of one head of keys, a line being one row of one of the heads that share
// it, row after row; and a run of the keys.
struct Task {
  int64_t sequence, kv_head, line, lines, key, keys;
  float* partial;  // where what it sums is left, to be merged; null: it is all there is
};

// What a task leaves of each line to be merged: the sum, the largest score and the sum of weights.
inline int64_t partial_floats(const Pass& p) { return p.head + 2; }

inline const char* value_at(const void* rows, Kind kind, int64_t index) {
  return static_cast<const char*>(rows) + index * bytes_of(kind);
}

// IEEE's half precision, where a CPU has no instruction for it.
inline float from_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, fraction = half & 0x3ff;
  uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
  if (exponent == 31) bits = sign | 0x7f800000 | fraction << 13;
  float value;
  if (exponent == 0) {
    value = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to even; what is too large becomes infinite.
inline uint16_t to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  if (bits < 0x38800000) {  // below the least normal: adding 0.5 leaves multiples of 2^-24
    float shifted;
    std::memcpy(&shifted, &bits, sizeof shifted);
    shifted += 0.5f;
    std::memcpy(&bits, &shifted, sizeof bits);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  bits += 0xfff + (bits >> 13 & 1);
  return static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13);
}

}  // namespace ive::attention
