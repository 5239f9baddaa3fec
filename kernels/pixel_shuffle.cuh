// Pixel shuffle: (tiles, 1 + rows * columns, C) -> drop the class token -> merge 2 x 2 patches ->
// (tiles, rows/2 * columns/2, 4C), optionally through the projector's LayerNorm over 4C, and from
// there to int8 with the next layer's scale. One read, one write. Bodies for CUDA and C++ alike.
#pragma once

#include "common.cuh"

namespace ive {

// Passed to kernels by value; kernels/jobs.py mirrors it field by field.
struct ShuffleJob {
  const void* in;       // (tiles, 1 + rows * columns, channels), float or half
  void* out;            // (tiles, rows/2 * columns/2, 4 * channels), float, half or int8
  const float* weight;  // (4 * channels,), or null: shuffle only
  const float* bias;    // (4 * channels,)
  int32_t tiles, rows, columns, channels;
  int32_t transposed;  // v1: the grid of groups is laid out column by column
  int32_t in_type, out_type;
  float eps;
  float scale;  // of the int8 output: real value = scale * stored
};

IVE_BODY int64_t token_count(const ShuffleJob& job) {
  return static_cast<int64_t>(job.tiles) * (job.rows / 2) * (job.columns / 2);
}

// An output token is two runs of 2C neighbours of the input: patches (r, c), (r, c + 1) and, one
// row below, (r + 1, c), (r + 1, c + 1). Start of run `below`, in elements.
IVE_BODY int64_t run_start(const ShuffleJob& job, int64_t token, int32_t below) {
  const int32_t down = job.rows / 2, across = job.columns / 2;
  const int32_t group = static_cast<int32_t>(token % (down * across));
  const int64_t tile = token / (down * across);
  // v2: group = i * across + j is patch (2i, 2j); v1: group = i * down + j is patch (2j, 2i).
  const int32_t row = 2 * (job.transposed ? group % down : group / across) + below;
  const int32_t column = 2 * (job.transposed ? group / down : group % across);
  const int64_t sequence = 1 + static_cast<int64_t>(job.rows) * job.columns;
  const int64_t patch = 1 + static_cast<int64_t>(row) * job.columns + column;
  return (tile * sequence + patch) * job.channels;
}

// Source of element (token, m), m < 4C, in elements.
IVE_BODY int64_t source_index(const ShuffleJob& job, int64_t token, int32_t m) {
  const int32_t run = 2 * job.channels;
  return run_start(job, token, m / run) + m % run;
}

IVE_BODY float layer_norm(float x, float mean, float inverse_deviation, float weight, float bias) {
  return (x - mean) * inverse_deviation * weight + bias;
}

// Round half to even after saturation; NaN becomes -128. Adding 1.5 * 2^23 leaves no fraction bits,
// so the adder rounds; no compiler may reassociate it (no fast-math anywhere).
IVE_BODY int8_t quantise(float value, float scale) {
  float x = value / scale;
  x = x > -128.0f ? x : -128.0f;
  x = x < 127.0f ? x : 127.0f;
  return static_cast<int8_t>(static_cast<int32_t>((x + 12582912.0f) - 12582912.0f));
}

IVE_BODY void store(float* to, float value, float) { *to = value; }
IVE_BODY void store(Half* to, float value, float) { *to = to_half(value); }
IVE_BODY void store(int8_t* to, float value, float scale) { *to = quantise(value, scale); }

constexpr int32_t kShuffleThreads = 256;

IVE_BODY LaunchShape shuffle_shape(const ShuffleJob& job) {  // one block per output token
  return LaunchShape{token_count(job), 1, 1, kShuffleThreads};
}

// Dynamic shared memory in bytes: one token in the input's type.
IVE_BODY int64_t shuffle_shared(const ShuffleJob& job) {
  return 4 * static_cast<int64_t>(job.channels) * (job.in_type == kFloat16 ? 2 : 4);
}

}  // namespace ive
