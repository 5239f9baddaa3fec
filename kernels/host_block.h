// The kernel of pixel_shuffle.cu on the CPU, for the tests: the same bodies, the threads of a block
// one after the other between its barriers, sums in the same order.
#pragma once

#include <new>

#include "pixel_shuffle.cuh"

namespace ive::host {

// As `block_sum` of pixel_shuffle.cu: a butterfly within each warp, then the warps in turn.
inline float block_sum(float* values) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    float exchanged[kShuffleThreads];
    for (int t = 0; t < kShuffleThreads; ++t) exchanged[t] = values[t ^ step];
    for (int t = 0; t < kShuffleThreads; ++t) values[t] += exchanged[t];
  }
  float partial[kShuffleWarps];
  for (int warp = 0; warp < kShuffleWarps; ++warp) partial[warp] = values[warp * kWarp];
  return sum_of_warps(partial);
}

template <typename In, typename Out, int width>
inline void shuffle_block(const ShuffleJob& job, int64_t token, In* staged) {
  const auto thread = [&](int32_t t) { return TokenThread<In, Out, width>{job, staged, token, t}; };
  float values[kShuffleThreads];
  Centre centre{thread(0).pivot(), 0};
  float inverse = 1;
  for (int32_t t = 0; t < kShuffleThreads; ++t) values[t] = thread(t).stage(centre.pivot);
  if (job.weight != nullptr) {
    centre.offset = mean_over_token(job, block_sum(values));
    for (int32_t t = 0; t < kShuffleThreads; ++t) values[t] = thread(t).squares(centre);
    inverse = inverse_deviation(job, block_sum(values));
  }
  for (int32_t t = 0; t < kShuffleThreads; ++t) thread(t).write(centre, inverse);
}

template <typename In, typename Out>
inline Status shuffle_blocks(const ShuffleJob& job) {
  constexpr std::align_val_t kAlignment{16};
  void* shared = operator new(static_cast<size_t>(shuffle_shared(job)), kAlignment, std::nothrow);
  if (shared == nullptr) return kOutOfMemory;
  const bool packs = takes_packs<In, Out>(job);
  for (int64_t token = 0; token < shuffle_shape(job).x; ++token) {
    if (packs) {
      shuffle_block<In, Out, kPackWidth<In>>(job, token, static_cast<In*>(shared));
    } else {
      shuffle_block<In, Out, 1>(job, token, static_cast<In*>(shared));
    }
  }
  operator delete(shared, kAlignment);
  return kOk;
}

template <typename In>
inline Status shuffle_blocks_of(const ShuffleJob& job) {
  return job.out_type == kFloat32   ? shuffle_blocks<In, float>(job)
         : job.out_type == kFloat16 ? shuffle_blocks<In, Half>(job)
         : job.out_type == kInt8    ? shuffle_blocks<In, int8_t>(job)
                                    : kBadArgument;
}

}  // namespace ive::host
