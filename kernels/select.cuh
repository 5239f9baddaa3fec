// The token of the largest logit: index of the maximum of one row, as numpy.argmax finds it (the
// first of equals; a NaN is larger than every number). Bodies for CUDA and C++ alike.
#pragma once

#include "common.cuh"

namespace ive {

// Passed to kernels by value; kernels/jobs.py mirrors it field by field.
struct SelectJob {
  const void* logits;  // (size,), float or half
  uint64_t* best;      // (kSelectMostBlocks,), scratch: the best candidate of each block
  int32_t* id;         // (1,)
  int32_t size;        // at least 1
  int32_t type;        // of the logits
};

constexpr int32_t kSelectWarp = 32;
constexpr int32_t kSelectThreads = 256;
constexpr int32_t kSelectWarps = kSelectThreads / kSelectWarp;
// One candidate a thread is left for the second kernel's only block. 92,553 logits are three for
// each thread of these blocks.
constexpr int32_t kSelectMostBlocks = 128;
static_assert(kSelectMostBlocks <= kSelectThreads, "the second kernel is one block");

IVE_BODY LaunchShape select_shape(const SelectJob& job) {  // of the first kernel
  const int64_t blocks = ceil_div(job.size, kSelectThreads);
  return LaunchShape{blocks < kSelectMostBlocks ? blocks : kSelectMostBlocks, 1, 1, kSelectThreads};
}

// Orders floats as unsigned integers: NaN above infinity, both zeros alike, nothing at 0.
IVE_BODY uint32_t ordered(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = bit_cast<uint32_t>(value + 0.0f);  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A logit and its index as one number: of two, the larger is the larger logit, and among equals the
// one that comes first. So the result is the same in whatever order they are compared.
IVE_BODY uint64_t candidate(float logit, int32_t index) {
  return static_cast<uint64_t>(ordered(logit)) << 32 | ~static_cast<uint32_t>(index);
}

constexpr uint64_t kNoCandidate = 0;  // smaller than any

IVE_BODY int32_t index_of(uint64_t candidate) {
  return static_cast<int32_t>(~static_cast<uint32_t>(candidate));
}

IVE_BODY uint64_t better(uint64_t a, uint64_t b) { return a > b ? a : b; }

// What one thread of the first kernel looks at: every so many logits, neighbours in a warp.
template <typename T>
IVE_BODY uint64_t best_of_logits(const SelectJob& job, int64_t block, int32_t thread) {
  const int64_t stride = select_shape(job).x * kSelectThreads;
  uint64_t best = kNoCandidate;
  for (int64_t i = block * kSelectThreads + thread; i < job.size; i += stride) {
    const float logit = to_float(static_cast<const T*>(job.logits)[i]);
    best = better(best, candidate(logit, static_cast<int32_t>(i)));
  }
  return best;
}

// What one thread of the second kernel looks at.
IVE_BODY uint64_t best_of_block(const SelectJob& job, int32_t thread) {
  return thread < select_shape(job).x ? job.best[thread] : kNoCandidate;
}

// The end of a maximum over the block; `partial` holds one candidate per warp.
IVE_BODY uint64_t best_of_warps(const uint64_t* partial) {
  uint64_t best = kNoCandidate;
  for (int warp = 0; warp < kSelectWarps; ++warp) best = better(best, partial[warp]);
  return best;
}

}  // namespace ive
