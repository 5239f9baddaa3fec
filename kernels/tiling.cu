// CUDA kernels and C launchers of tiling.cuh. Raw pointers, explicit stream, every launch checked.
#include <cuda_runtime.h>

#include "tiling.cuh"

namespace {

// One thread per intermediate pixel; a warp's 32 pixels share their taps through the L1 cache.
__device__ __forceinline__ void horizontal(const ive::TileJob& job) {
  const int64_t x = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t width = (static_cast<int64_t>(job.columns) + (job.thumbnail ? 1 : 0)) * job.side;
  if (x >= width) return;
  for (int64_t y = blockIdx.y; y < job.image.height; y += gridDim.y) {
    ive::horizontal_element(job, y, x);
  }
}

// One thread per four neighbours of the output: four taps are one 32-bit read.
template <int32_t layout, typename T>
__device__ __forceinline__ void vertical(const ive::TileJob& job) {
  const int32_t quad = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (quad >= job.side / 4) return;
  const int64_t planes = ive::tile_count(job) * 3;
  for (int64_t plane = blockIdx.z; plane < planes; plane += gridDim.z) {
    for (int32_t y = static_cast<int32_t>(blockIdx.y); y < job.side; y += gridDim.y) {
      ive::vertical_quad<layout, T>(job, plane / 3, static_cast<int32_t>(plane % 3), y, quad);
    }
  }
}

}  // namespace

extern "C" __global__ void ive_tile_horizontal(const __grid_constant__ ive::TileJob job) {
  horizontal(job);
}

#define IVE_VERTICAL(name, layout, type)                                                 \
  extern "C" __global__ void ive_tile_##name(const __grid_constant__ ive::TileJob job) { \
    vertical<layout, type>(job);                                                         \
  }
IVE_VERTICAL(tiles_u8, ive::kTiles, uint8_t)
IVE_VERTICAL(nchw_f32, ive::kNchw, float)
IVE_VERTICAL(nchw_f16, ive::kNchw, ive::Half)
IVE_VERTICAL(patches_f32, ive::kPatches, float)
IVE_VERTICAL(patches_f16, ive::kPatches, ive::Half)
#undef IVE_VERTICAL

namespace {

using Kernel = void (*)(ive::TileJob);

Kernel vertical_kernel(const ive::TileJob& job) {
  const bool half = job.type == ive::kFloat16;
  if (job.layout == ive::kTiles && job.type == ive::kUint8) return ive_tile_tiles_u8;
  if (!half && job.type != ive::kFloat32) return nullptr;
  if (job.layout == ive::kNchw) return half ? ive_tile_nchw_f16 : ive_tile_nchw_f32;
  if (job.layout == ive::kPatches) return half ? ive_tile_patches_f16 : ive_tile_patches_f32;
  return nullptr;
}

cudaError_t launch(Kernel kernel, const ive::LaunchShape& shape, const ive::TileJob& job,
                   cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(shape.x), static_cast<unsigned>(shape.y),
                    static_cast<unsigned>(shape.z));
  kernel<<<blocks, shape.threads, 0, stream>>>(job);
  return cudaGetLastError();
}

}  // namespace

// All pointers of `job` are device pointers (or pinned or managed host memory the device reads in
// place); side is a multiple of 4. Asynchronous on `stream`.
extern "C" cudaError_t ive_tile(const ive::TileJob* job, cudaStream_t stream) {
  const Kernel second = vertical_kernel(*job);
  if (second == nullptr || job->side % 4 != 0) return cudaErrorInvalidValue;
  const cudaError_t status = launch(ive_tile_horizontal, ive::horizontal_shape(*job), *job, stream);
  if (status != cudaSuccess) return status;
  return launch(second, ive::vertical_shape(*job), *job, stream);
}
