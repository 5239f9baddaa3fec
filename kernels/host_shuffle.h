// Pixel shuffle on the CPU: one output token at a time, kept in the first- or second-level cache
// between its passes (12,800 floats are 51 KB), so memory sees one read and one write.
#pragma once

#include <cmath>
#include <memory>

#include "pixel_shuffle.cuh"

namespace ive::host {

// Floats summed before the sum is widened to double: bounds the rounding error of long tokens.
constexpr int32_t kSumBlock = 512;

template <typename In>
inline void widen(float* __restrict to, const In* __restrict from, int32_t n) {
  for (int32_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
}

inline double sum_from(const float* x, int32_t n, float pivot) {
  double total = 0;
  for (int32_t at = 0; at < n; at += kSumBlock) {
    const int32_t end = at + kSumBlock < n ? at + kSumBlock : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t i = at; i < end; ++i) sum += x[i] - pivot;
    total += sum;
  }
  return total;
}

inline double squared_distances(const float* x, int32_t n, Centre centre) {
  double total = 0;
  for (int32_t at = 0; at < n; at += kSumBlock) {
    const int32_t end = at + kSumBlock < n ? at + kSumBlock : n;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int32_t i = at; i < end; ++i) sum += distance(x[i], centre) * distance(x[i], centre);
    total += sum;
  }
  return total;
}

template <typename Out>
inline void write_plain(Out* __restrict to, const float* __restrict x, int32_t n, float scale) {
  for (int32_t i = 0; i < n; ++i) store(to + i, x[i], scale);
}

template <typename Out>
inline void write_norm(Out* __restrict to, const float* __restrict x, int32_t n,
                       const ShuffleJob& job) {
  const Centre centre{x[0], static_cast<float>(sum_from(x, n, x[0]) / n)};
  const double variance = squared_distances(x, n, centre) / n;
  const float inverse = static_cast<float>(1.0 / std::sqrt(variance + job.eps));
  const float* __restrict weight = job.weight, * __restrict bias = job.bias;
  const float scale = job.scale;
  for (int32_t i = 0; i < n; ++i) {
    store(to + i, layer_norm(x[i], centre, inverse, weight[i], bias[i]), scale);
  }
}

// Tokens begin .. end; `row` holds 4 * channels floats.
template <typename In, typename Out>
inline void shuffle_tokens(const ShuffleJob& job, int64_t begin, int64_t end, float* row) {
  const int32_t run = 2 * job.channels, width = 2 * run;
  const In* in = static_cast<const In*>(job.in);
  for (int64_t token = begin; token < end; ++token) {
    for (int32_t below = 0; below < 2; ++below) {
      widen(row + below * run, in + run_start(job, token, below), run);
    }
    Out* out = static_cast<Out*>(job.out) + token * width;
    if (job.weight != nullptr) {
      write_norm(out, row, width, job);
    } else {
      write_plain(out, row, width, job.scale);
    }
  }
}

using ShuffleTokens = void (*)(const ShuffleJob&, int64_t, int64_t, float*);

template <typename In>
inline ShuffleTokens shuffle_by_output(int32_t type) {
  return type == kFloat32   ? &shuffle_tokens<In, float>
         : type == kFloat16 ? &shuffle_tokens<In, Half>
         : type == kInt8    ? &shuffle_tokens<In, int8_t>
                            : nullptr;
}

inline ShuffleTokens shuffle_function(const ShuffleJob& job) {
  return job.in_type == kFloat32   ? shuffle_by_output<float>(job.out_type)
         : job.in_type == kFloat16 ? shuffle_by_output<Half>(job.out_type)
                                   : nullptr;
}

}  // namespace ive::host
