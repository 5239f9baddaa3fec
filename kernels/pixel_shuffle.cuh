// Pixel shuffle: (tiles, 1 + rows * columns, C) -> drop the class token -> merge 2 x 2 patches ->
// (tiles, rows/2 * columns/2, 4C), optionally through the projector's LayerNorm over 4C, and from
// there to int8 with the next layer's scale. One read, one write. Bodies for CUDA and C++ alike.
#pragma once

#include <cmath>

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

// A token's mean as one of its elements and the distance from there: sums of distances stay small,
// and no digit of the mean is lost to its size (at +100, 1.1e-5 off without, 4e-6 by rounding the
// mean alone).
struct Centre {
  float pivot, offset;
};

IVE_BODY float distance(float x, Centre centre) { return (x - centre.pivot) - centre.offset; }

IVE_BODY float layer_norm(float x, Centre centre, float inverse_deviation, float weight,
                          float bias) {
  return distance(x, centre) * inverse_deviation * weight + bias;
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

constexpr int32_t kWarp = 32;
constexpr int32_t kShuffleThreads = 256;
constexpr int32_t kShuffleWarps = kShuffleThreads / kWarp;

IVE_BODY LaunchShape shuffle_shape(const ShuffleJob& job) {  // one block per output token
  return LaunchShape{token_count(job), 1, 1, kShuffleThreads};
}

// Dynamic shared memory in bytes: one token in the input's type.
IVE_BODY int64_t shuffle_shared(const ShuffleJob& job) {
  return 4 * static_cast<int64_t>(job.channels) * (job.in_type == kFloat16 ? 2 : 4);
}

// Neighbouring elements moved as one aligned access.
template <typename T, int width>
struct alignas(sizeof(T) * width) Pack {
  T at[width];
};

template <typename In>
constexpr int kPackWidth = 16 / sizeof(In);  // 16-byte reads; a run is 2C elements

IVE_BODY bool is_multiple(const void* address, size_t bytes) {  // null is
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

// Whether every pack of a job is aligned and within one run.
template <typename In, typename Out>
IVE_BODY bool takes_packs(const ShuffleJob& job) {
  constexpr int width = kPackWidth<In>;
  return job.channels % width == 0 && is_multiple(job.in, 16) &&
         is_multiple(job.out, sizeof(Out) * width) &&
         is_multiple(job.weight, sizeof(float) * width) &&
         is_multiple(job.bias, sizeof(float) * width);
}

// What one thread of a block does to its token, between the sums over the block: packs `thread`,
// `thread` + 256, .. are read once from global memory into `staged`, and written once from there.
// A thread reads back only what it staged itself, so no barrier is needed for `staged`.
template <typename In, typename Out, int width>
struct TokenThread {
  const ShuffleJob& job;
  In* staged;  // (4 * channels,)
  int64_t token;
  int32_t thread;

  IVE_BODY float pivot() const {
    return to_float(static_cast<const In*>(job.in)[source_index(job, token, 0)]);
  }

  // Stages the token; the sum of this thread's elements' distances from the pivot.
  IVE_BODY float stage(float pivot) const {
    const In* in = static_cast<const In*>(job.in);
    float sum = 0;
    for (int32_t m = thread * width; m < 4 * job.channels; m += kShuffleThreads * width) {
      const Source pack = *reinterpret_cast<const Source*>(in + source_index(job, token, m));
      *reinterpret_cast<Source*>(staged + m) = pack;
      for (int i = 0; i < width; ++i) sum += to_float(pack.at[i]) - pivot;
    }
    return sum;
  }

  // Of the distances from the mean: a second pass, so that nothing cancels.
  IVE_BODY float squares(Centre centre) const {
    float sum = 0;
    for (int32_t m = thread * width; m < 4 * job.channels; m += kShuffleThreads * width) {
      const Source pack = *reinterpret_cast<const Source*>(staged + m);
      for (int i = 0; i < width; ++i) {
        const float apart = distance(to_float(pack.at[i]), centre);
        sum += apart * apart;
      }
    }
    return sum;
  }

  IVE_BODY void write(Centre centre, float inverse) const {
    const bool norm = job.weight != nullptr;
    Out* out = static_cast<Out*>(job.out) + token * 4 * job.channels;
    for (int32_t m = thread * width; m < 4 * job.channels; m += kShuffleThreads * width) {
      const Source source = *reinterpret_cast<const Source*>(staged + m);
      Pack<Out, width> target;
      Pack<float, width> weight, bias;
      if (norm) {
        weight = *reinterpret_cast<const Pack<float, width>*>(job.weight + m);
        bias = *reinterpret_cast<const Pack<float, width>*>(job.bias + m);
      }
      for (int i = 0; i < width; ++i) {
        float x = to_float(source.at[i]);
        if (norm) x = layer_norm(x, centre, inverse, weight.at[i], bias.at[i]);
        store(&target.at[i], x, job.scale);
      }
      *reinterpret_cast<Pack<Out, width>*>(out + m) = target;
    }
  }

 private:
  using Source = Pack<In, width>;
};

// The end of a sum over the block; `partial` holds one float per warp.
IVE_BODY float sum_of_warps(const float* partial) {
  float sum = 0;
  for (int warp = 0; warp < kShuffleWarps; ++warp) sum += partial[warp];
  return sum;
}

IVE_BODY float mean_over_token(const ShuffleJob& job, float sum) {
  return sum / static_cast<float>(4 * job.channels);
}

IVE_BODY float inverse_deviation(const ShuffleJob& job, float squares) {
  return 1.0f / sqrtf(mean_over_token(job, squares) + job.eps);
}

}  // namespace ive
