// Tasks on any CPU.
#pragma once

#include <cmath>

#include "path.h"

namespace ive::attention::plain {

#define IVE_TARGET

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4, kRows = 4, kFewLines = 4, kColumns = 8;
constexpr const char* kName = "plain";

inline bool runs_here() { return true; }

IVE_INLINE Vec all(float value) { return Vec{value, value, value, value}; }

IVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// A vector of values of a kind.
template <Kind kKind>
IVE_INLINE Vec take(const char* from) {
  Vec values;
  for (int i = 0; i < kLanes; ++i) values[i] = value_of(from, kKind, i);
  return values;
}

// The sum of each of four vectors.
IVE_INLINE void sum_four(const Vec (&given)[4], float* to) {
  for (int i = 0; i < 4; ++i) to[i] = (given[i][0] + given[i][1]) + (given[i][2] + given[i][3]);
}

// Values of any kind as floats; a multiple of 4 of them.
inline void widen(const char* from, Kind kind, float* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  for (int64_t i = 0; i < count; ++i) to[i] = value_of(from, kind, i);
}

// Floats as values of a kind, those of int8 over their scales.
inline void narrow(const float* from, const float* scales, Kind kind, char* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  if (kind == kInt8) return round_to_bytes(from, scales, to, count);
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = to_half(from[i]);
    std::memcpy(to + 2 * i, &half, sizeof half);
  }
}

// (given, count) as (count, columns); what is in columns that are not given is any number.
inline void transpose(const float* from, int64_t count, int given, float* to) {
  for (int64_t k = 0; k < count; ++k) {
    for (int c = 0; c < kColumns; ++c) to[k * kColumns + c] = from[(c < given ? c : 0) * count + k];
  }
}

#include "vectors.h"
#undef IVE_TARGET

}  // namespace ive::attention::plain
