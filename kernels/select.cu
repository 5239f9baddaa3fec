// CUDA kernels and C launcher of select.cuh. Raw pointers, explicit stream, checked launch; nothing
// is allocated, so that the launches may be captured in a CUDA graph.
#include <cuda_runtime.h>

#include "select.cuh"

namespace {

// Maximum over the block, in its first thread; host_select.h does the same on the CPU.
__device__ __forceinline__ uint64_t block_best(uint64_t value) {
  __shared__ uint64_t partial[ive::kSelectWarps];
  for (int step = ive::kSelectWarp / 2; step > 0; step /= 2) {
    value = ive::better(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % ive::kSelectWarp == 0) partial[threadIdx.x / ive::kSelectWarp] = value;
  __syncthreads();
  return threadIdx.x == 0 ? ive::best_of_warps(partial) : value;
}

template <typename T>
__device__ __forceinline__ void select(const ive::SelectJob& job) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const uint64_t best = block_best(ive::best_of_logits<T>(job, blockIdx.x, thread));
  if (thread == 0) job.best[blockIdx.x] = best;
}

}  // namespace

#define IVE_SELECT(name, T)                                           \
  extern "C" __global__ void __launch_bounds__(ive::kSelectThreads)   \
      ive_select_##name(const __grid_constant__ ive::SelectJob job) { \
    select<T>(job);                                                   \
  }
IVE_SELECT(f32, float)
IVE_SELECT(f16, ive::Half)
#undef IVE_SELECT

// One block.
extern "C" __global__ void __launch_bounds__(ive::kSelectThreads)
    ive_select_id(const __grid_constant__ ive::SelectJob job) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const uint64_t best = block_best(ive::best_of_block(job, thread));
  if (thread == 0) *job.id = ive::index_of(best);
}

// All pointers of `job` are device pointers. Asynchronous on `stream`.
extern "C" cudaError_t ive_select(const ive::SelectJob* job, cudaStream_t stream) {
  if (job->size < 1 || (job->type != ive::kFloat32 && job->type != ive::kFloat16)) {
    return cudaErrorInvalidValue;
  }
  const ive::LaunchShape shape = ive::select_shape(*job);
  const auto kernel = job->type == ive::kFloat32 ? ive_select_f32 : ive_select_f16;
  kernel<<<static_cast<unsigned>(shape.x), shape.threads, 0, stream>>>(*job);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) return status;
  ive_select_id<<<1, ive::kSelectThreads, 0, stream>>>(*job);
  return cudaGetLastError();
}
