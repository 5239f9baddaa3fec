// The tokens of the largest logits of one row, in order: of equals the first, as numpy.argmax has
// it, and a NaN before every number. Bodies for CUDA and C++ alike.
//
// Blocks sort runs of kSelectRun and keep the first `count` of each; then the same is done to what
// they kept, until one run is left. 92,553 logits and 64 tokens take three launches.
#pragma once

#include "common.cuh"

namespace ive {

// One launch. Passed to kernels by value; kernels/jobs.py mirrors it field by field.
struct SelectJob {
  const void* input;  // (size,), logits as float or half, or candidates
  uint64_t* out;      // (ceil(size / kSelectRun), count), candidates, the largest of a run first
  int32_t size;       // at least 1
  int32_t count;      // 1..kSelectMost
  int32_t type;       // of the input
};

constexpr int32_t kSelectRun = 1024;                // 8 KB of shared memory
constexpr int32_t kSelectThreads = kSelectRun / 2;  // one pair each
constexpr int32_t kSelectMost = 64;
static_assert(kSelectMost < kSelectRun, "every launch leaves less");

IVE_BODY LaunchShape select_shape(const SelectJob& job) {
  return LaunchShape{ceil_div(job.size, kSelectRun), 1, 1, kSelectThreads};
}

// Orders floats as unsigned integers: NaN above infinity, both zeros alike, nothing at 0.
IVE_BODY uint32_t ordered(float value) {
  if (value != value) return 0xffffffffu;
  const uint32_t bits = bit_cast<uint32_t>(value + 0.0f);  // -0 becomes +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A logit and its index as one number: of two, the larger is the larger logit, and among equals the
// one that comes first. No two are equal, so the result is the same in whatever order they are
// compared.
IVE_BODY uint64_t candidate(float logit, int32_t index) {
  return static_cast<uint64_t>(ordered(logit)) << 32 | ~static_cast<uint32_t>(index);
}

constexpr uint64_t kNoCandidate = 0;  // smaller than any

template <typename T>
IVE_BODY uint64_t as_candidate(T logit, int32_t index) {
  return candidate(to_float(logit), index);
}
IVE_BODY uint64_t as_candidate(uint64_t found, int32_t) { return found; }

// What stands at a place of a block's run before it is sorted.
template <typename T>
IVE_BODY uint64_t select_input(const SelectJob& job, int64_t block, int32_t place) {
  const int64_t index = block * kSelectRun + place;
  if (index >= job.size) return kNoCandidate;
  return as_candidate(static_cast<const T*>(job.input)[index], static_cast<int32_t>(index));
}

// One comparison of a bitonic sort (Batcher 1968), largest first: runs of `length` are sorted,
// every other one the other way round, by exchanging what lies `stride` apart. `pair` counts the
// pairs.
IVE_BODY void compare_exchange(uint64_t* run, int32_t pair, int32_t length, int32_t stride) {
  const int32_t low = 2 * pair - (pair & (stride - 1));  // stride is a power of two
  const uint64_t a = run[low], b = run[low + stride];
  const bool descending = (low & length) == 0;
  if ((a < b) == descending) {
    run[low] = b;
    run[low + stride] = a;
  }
}

}  // namespace ive
