// Queries, keys and values of a tile in int16, and the room that this takes.
//
// A row of a head is rounded to whole numbers up to 2047, with a scale of its own, so that sums of
// products stay in int32: of 512 in a head's size, and of 256 keys whose shares reach 4095.
// Products take two numbers at a time, those of 16 columns side by side:
//   queries: per head and token its numbers
//   keys:    per head and run of 16 tokens, per pair of places, the pair of each token
//   values:  per head and run of 16 places, per pair of tokens, the pair of each place
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "tower.h"

namespace ive::vision {

constexpr float kLargest = 2047.f, kLargestShare = 4095.f;
constexpr int64_t kMostSize = 512;
// Keys whose shares have a scale in common.
constexpr int64_t kKeys = 256;
// Tokens come in multiples of this, those beyond the last as zeros.
constexpr int64_t kTokenRun = 32;
// More queries than are read of the last ones at a time.
constexpr int64_t kSpareQueries = 16;

struct Packed {
  int64_t tokens = 0, size = 0;  // rounded up
  std::unique_ptr<int16_t[]> queries, keys, values;
  std::unique_ptr<float[]> query_scales, key_scales, value_scales;

  // False where there is no memory.
  bool allocate(const Attention& a) {
    tokens = round_up(a.tokens, kTokenRun);
    size = round_up(a.size, kTokenRun);
    const int64_t rows = a.heads * tokens, count = rows * size;
    queries.reset(new (std::nothrow) int16_t[count + kSpareQueries * size]());
    keys.reset(new (std::nothrow) int16_t[count]);
    values.reset(new (std::nothrow) int16_t[count]);
    for (auto* scales : {&query_scales, &key_scales, &value_scales}) {
      scales->reset(new (std::nothrow) float[rows + kSpareQueries]());
      if (*scales == nullptr) return false;
    }
    return queries != nullptr && keys != nullptr && values != nullptr;
  }

  int16_t* query(int64_t head, int64_t token) const {
    return queries.get() + (head * tokens + token) * size;
  }
  int16_t* key_run(int64_t head, int64_t run) const {
    return keys.get() + (head * tokens + run * kLanes) * size;
  }
  // Pairs of the places `place` to `place` + 15, of all tokens.
  int16_t* value_run(int64_t head, int64_t place) const {
    return values.get() + (head * size + place) * tokens;
  }
};

}  // namespace ive::vision
