// The kernels of select.cu on the CPU, for the tests: the same bodies, the threads of a block one
// after the other between its barriers, compared in the same order.
#pragma once

#include "select.cuh"

namespace ive::host {

// As `block_best` of select.cu: a butterfly within each warp, then the warps in turn.
inline uint64_t block_best(uint64_t* values) {
  for (int step = kSelectWarp / 2; step > 0; step /= 2) {
    uint64_t exchanged[kSelectThreads];
    for (int t = 0; t < kSelectThreads; ++t) exchanged[t] = values[t ^ step];
    for (int t = 0; t < kSelectThreads; ++t) values[t] = better(values[t], exchanged[t]);
  }
  uint64_t partial[kSelectWarps];
  for (int warp = 0; warp < kSelectWarps; ++warp) partial[warp] = values[warp * kSelectWarp];
  return best_of_warps(partial);
}

template <typename T>
inline Status select_blocks(const SelectJob& job) {
  uint64_t values[kSelectThreads];
  for (int64_t block = 0; block < select_shape(job).x; ++block) {
    for (int32_t t = 0; t < kSelectThreads; ++t) values[t] = best_of_logits<T>(job, block, t);
    job.best[block] = block_best(values);
  }
  for (int32_t t = 0; t < kSelectThreads; ++t) values[t] = best_of_block(job, t);
  *job.id = index_of(block_best(values));
  return kOk;
}

}  // namespace ive::host
