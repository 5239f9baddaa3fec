// CUDA kernels and C launcher of select.cuh. Raw pointers, explicit stream, checked launch; nothing
// is allocated, so that the launches may be captured in a CUDA graph.
#include <cuda_runtime.h>

#include "select.cuh"

namespace {

// host_select.h does the same on the CPU.
template <typename T>
__device__ __forceinline__ void select(const ive::SelectJob& job) {
  __shared__ uint64_t run[ive::kSelectRun];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  for (int32_t place = thread; place < ive::kSelectRun; place += ive::kSelectThreads) {
    run[place] = ive::select_input<T>(job, blockIdx.x, place);
  }
  __syncthreads();
  for (int32_t length = 2; length <= ive::kSelectRun; length *= 2) {
    for (int32_t stride = length / 2; stride > 0; stride /= 2) {
      ive::compare_exchange(run, thread, length, stride);
      __syncthreads();
    }
  }
  if (thread < job.count) job.out[int64_t{blockIdx.x} * job.count + thread] = run[thread];
}

}  // namespace

#define IVE_SELECT(name, T)                                           \
  extern "C" __global__ void __launch_bounds__(ive::kSelectThreads)   \
      ive_select_##name(const __grid_constant__ ive::SelectJob job) { \
    select<T>(job);                                                   \
  }
IVE_SELECT(f32, float)
IVE_SELECT(f16, ive::Half)
IVE_SELECT(u64, uint64_t)
#undef IVE_SELECT

// One launch; the result is whole where one block was enough. All pointers of `job` are device
// pointers. Asynchronous on `stream`.
extern "C" cudaError_t ive_select(const ive::SelectJob* job, cudaStream_t stream) {
  if (job->size < 1 || job->count < 1 || job->count > ive::kSelectMost) {
    return cudaErrorInvalidValue;
  }
  const ive::LaunchShape shape = ive::select_shape(*job);
  const auto kernel = job->type == ive::kFloat32   ? ive_select_f32
                      : job->type == ive::kFloat16 ? ive_select_f16
                      : job->type == ive::kUint64  ? ive_select_u64
                                                   : nullptr;
  if (kernel == nullptr) return cudaErrorInvalidValue;
  kernel<<<static_cast<unsigned>(shape.x), shape.threads, 0, stream>>>(*job);
  return cudaGetLastError();
}
