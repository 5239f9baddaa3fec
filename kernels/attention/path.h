// What a path for one kind of CPU provides.
#pragma once

#include "attention.h"

namespace ive::attention {

struct Path {
  const char* name;
  int64_t lines;  // of a task, at most
  bool (*runs_here)();
  // Writes keys and values of a row of a sequence into its cache.
  void (*append)(const Pass& pass, const Sequence& sequence, int64_t row);
  int64_t (*room)(const Pass& pass, int64_t lines);  // floats that a task needs
  void (*attend)(const Pass& pass, const Task& task, float* room);
  // Joins what tasks over runs of the same keys have left.
  void (*merge)(const Pass& pass, const Task* tasks, int64_t count);
};

// A value of any kind.
IVE_INLINE float value_of(const char* values, Kind kind, int64_t index) {
  const char* from = values + index * bytes_of(kind);
  if (kind == kInt8) return static_cast<float>(static_cast<int8_t>(*from));
  if (kind == kHalf) {
    uint16_t half;
    std::memcpy(&half, from, sizeof half);
    return from_half(half);
  }
  float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// To the nearest integer, ties to even; not a number becomes zero.
IVE_INLINE void round_to_bytes(const float* from, const float* scales, char* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    float value = from[i] / scales[i];
    value = value > -128.f ? value : -128.f;
    value = value < 127.f ? value : 127.f;
    value = (value + 12582912.f) - 12582912.f;  // adding 1.5 * 2^23 rounds
    to[i] = static_cast<char>(static_cast<int8_t>(value));
  }
}

}  // namespace ive::attention
