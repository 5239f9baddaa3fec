// The kernels of select.cu on the CPU, for the tests: the same bodies, the threads of a block one
// after the other between its barriers.
#pragma once

#include "select.cuh"

namespace ive::host {

template <typename T>
inline Status select_blocks(const SelectJob& job) {
  uint64_t run[kSelectRun];
  for (int64_t block = 0; block < select_shape(job).x; ++block) {
    for (int32_t p = 0; p < kSelectRun; ++p) run[p] = select_input<T>(job, block, p);
    for (int32_t length = 2; length <= kSelectRun; length *= 2) {
      for (int32_t stride = length / 2; stride > 0; stride /= 2) {
        for (int32_t t = 0; t < kSelectThreads; ++t) compare_exchange(run, t, length, stride);
      }
    }
    for (int32_t t = 0; t < job.count; ++t) job.out[block * job.count + t] = run[t];
  }
  return kOk;
}

}  // namespace ive::host
