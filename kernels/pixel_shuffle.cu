// CUDA kernels and C launcher of pixel_shuffle.cuh. Raw pointers, explicit stream, checked launch.
#include <cuda_runtime.h>

#include "pixel_shuffle.cuh"

namespace {

// Sum over the block, the same in every thread. `partial` holds one float per warp.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  for (int step = ive::kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  __syncthreads();  // earlier readers of `partial` are done
  if (threadIdx.x % ive::kWarp == 0) partial[threadIdx.x / ive::kWarp] = value;
  __syncthreads();
  return ive::sum_of_warps(partial);
}

// One output token; host_block.h does the same on the CPU.
template <typename In, typename Out, int width>
__device__ __forceinline__ void shuffle_token(const ive::ShuffleJob& job, In* staged,
                                              float* partial) {
  const ive::TokenThread<In, Out, width> thread{job, staged, blockIdx.x,
                                                static_cast<int32_t>(threadIdx.x)};
  ive::Centre centre{thread.pivot(), 0};
  const float sum = thread.stage(centre.pivot);
  float inverse = 1;
  if (job.weight != nullptr) {
    centre.offset = ive::mean_over_token(job, block_sum(sum, partial));
    inverse = ive::inverse_deviation(job, block_sum(thread.squares(centre), partial));
  }
  thread.write(centre, inverse);
}

template <typename In, typename Out>
__device__ __forceinline__ void shuffle(const ive::ShuffleJob& job) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[ive::kShuffleWarps];
  In* staged = reinterpret_cast<In*>(shared);
  if (ive::takes_packs<In, Out>(job)) {
    shuffle_token<In, Out, ive::kPackWidth<In>>(job, staged, partial);
  } else {
    shuffle_token<In, Out, 1>(job, staged, partial);
  }
}

}  // namespace

#define IVE_SHUFFLE(name, In, Out)                                            \
  extern "C" __global__ void __launch_bounds__(ive::kShuffleThreads)          \
      ive_pixel_shuffle_##name(const __grid_constant__ ive::ShuffleJob job) { \
    shuffle<In, Out>(job);                                                    \
  }
IVE_SHUFFLE(f32_f32, float, float)
IVE_SHUFFLE(f32_f16, float, ive::Half)
IVE_SHUFFLE(f32_i8, float, int8_t)
IVE_SHUFFLE(f16_f32, ive::Half, float)
IVE_SHUFFLE(f16_f16, ive::Half, ive::Half)
IVE_SHUFFLE(f16_i8, ive::Half, int8_t)
#undef IVE_SHUFFLE

namespace {

using Kernel = void (*)(ive::ShuffleJob);

Kernel by_output(int32_t type, Kernel f32, Kernel f16, Kernel i8) {
  return type == ive::kFloat32   ? f32
         : type == ive::kFloat16 ? f16
         : type == ive::kInt8    ? i8
                                 : nullptr;
}

Kernel shuffle_kernel(const ive::ShuffleJob& job) {
  if (job.in_type == ive::kFloat32) {
    return by_output(job.out_type, ive_pixel_shuffle_f32_f32, ive_pixel_shuffle_f32_f16,
                     ive_pixel_shuffle_f32_i8);
  }
  if (job.in_type == ive::kFloat16) {
    return by_output(job.out_type, ive_pixel_shuffle_f16_f32, ive_pixel_shuffle_f16_f16,
                     ive_pixel_shuffle_f16_i8);
  }
  return nullptr;
}

}  // namespace

// All pointers of `job` are device pointers. Asynchronous on `stream`.
extern "C" cudaError_t ive_pixel_shuffle(const ive::ShuffleJob* job, cudaStream_t stream) {
  const Kernel kernel = shuffle_kernel(*job);
  if (kernel == nullptr || job->rows % 2 != 0 || job->columns % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  const int64_t shared = ive::shuffle_shared(*job);
  // A token of 12,800 floats takes 51,200 bytes; more than 48 KiB must be asked for.
  const cudaError_t status = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (status != cudaSuccess) return status;
  const ive::LaunchShape shape = ive::shuffle_shape(*job);
  kernel<<<static_cast<unsigned>(shape.x), shape.threads, static_cast<size_t>(shared), stream>>>(
      *job);
  return cudaGetLastError();
}
