// CUDA kernels and C launcher of pixel_shuffle.cuh. Raw pointers, explicit stream, checked launch.
#include <cuda_runtime.h>

#include "pixel_shuffle.cuh"

namespace {

constexpr int kWarp = 32;

// Sum over the block, the same in every thread. `partial` holds one float per warp.
__device__ __forceinline__ float block_sum(float value, float* partial) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  __syncthreads();  // earlier readers of `partial` are done
  if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < ive::kShuffleThreads / kWarp; ++warp) sum += partial[warp];
  return sum;
}

// `kWidth` neighbouring elements moved as one aligned access.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T at[kWidth];
};

// One output token: read once from global memory into shared, two passes of statistics there
// (mean, then squared distances from it: no cancellation), written once.
template <typename In, typename Out, int kWidth>
__device__ __forceinline__ void shuffle_token(const ive::ShuffleJob& job, In* staged,
                                              float* partial) {
  using Source = Pack<In, kWidth>;
  using Target = Pack<Out, kWidth>;
  const int64_t token = blockIdx.x;
  const int32_t width = 4 * job.channels;
  const In* in = static_cast<const In*>(job.in);
  float sum = 0;
  for (int32_t m = threadIdx.x * kWidth; m < width; m += ive::kShuffleThreads * kWidth) {
    const Source pack = *reinterpret_cast<const Source*>(in + ive::source_index(job, token, m));
    *reinterpret_cast<Source*>(staged + m) = pack;
    for (int i = 0; i < kWidth; ++i) sum += ive::to_float(pack.at[i]);
  }
  const bool norm = job.weight != nullptr;
  float mean = 0, inverse = 1;
  if (norm) {
    // A thread reads back only what it staged itself, so no barrier is needed for `staged`.
    mean = block_sum(sum, partial) / static_cast<float>(width);
    float squares = 0;
    for (int32_t m = threadIdx.x * kWidth; m < width; m += ive::kShuffleThreads * kWidth) {
      const Source pack = *reinterpret_cast<const Source*>(staged + m);
      for (int i = 0; i < kWidth; ++i) {
        const float d = ive::to_float(pack.at[i]) - mean;
        squares += d * d;
      }
    }
    inverse = 1.0f / sqrtf(block_sum(squares, partial) / static_cast<float>(width) + job.eps);
  }
  Out* out = static_cast<Out*>(job.out) + token * width;
  for (int32_t m = threadIdx.x * kWidth; m < width; m += ive::kShuffleThreads * kWidth) {
    const Source source = *reinterpret_cast<const Source*>(staged + m);
    Target target;
    Pack<float, kWidth> weight, bias;
    if (norm) {
      weight = *reinterpret_cast<const Pack<float, kWidth>*>(job.weight + m);
      bias = *reinterpret_cast<const Pack<float, kWidth>*>(job.bias + m);
    }
    for (int i = 0; i < kWidth; ++i) {
      float x = ive::to_float(source.at[i]);
      if (norm) x = ive::layer_norm(x, mean, inverse, weight.at[i], bias.at[i]);
      ive::store(&target.at[i], x, job.scale);
    }
    *reinterpret_cast<Target*>(out + m) = target;
  }
}

template <typename In, typename Out>
__device__ __forceinline__ void shuffle(const ive::ShuffleJob& job) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ float partial[ive::kShuffleThreads / kWarp];
  In* staged = reinterpret_cast<In*>(shared);
  constexpr int kVector = 16 / sizeof(In);  // 16-byte reads; a run is 2C elements
  const auto multiple_of = [](const void* address, size_t bytes) {
    return reinterpret_cast<uintptr_t>(address) % bytes == 0;  // null is
  };
  const bool aligned = job.channels % kVector == 0 && multiple_of(job.in, 16) &&
                       multiple_of(job.out, sizeof(Out) * kVector) &&
                       multiple_of(job.weight, sizeof(float) * kVector) &&
                       multiple_of(job.bias, sizeof(float) * kVector);
  if (aligned) {
    shuffle_token<In, Out, kVector>(job, staged, partial);
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
