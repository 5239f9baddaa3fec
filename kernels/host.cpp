// The CPU library: C entry points over the bodies of the .cuh files, work shared among threads.
//
// Entry points return ive::Status. Jobs are checked by kernels/ops.py; nothing is allocated for
// the caller, no state is kept, and every function may be called from several threads at once.
#include <atomic>
#include <system_error>
#include <thread>

#include "host_block.h"
#include "host_select.h"
#include "host_shuffle.h"
#include "host_tasks.h"

namespace {

// Calls work(next) on up to `threads` threads, the caller's included. Threads are started per call
// (about 20 us each); where the system gives fewer, the others do the work.
template <typename Work>
void in_parallel(int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<size_t>(threads));
    while (static_cast<int>(helpers.size()) < threads - 1) {
      helpers.emplace_back([&] { work(next); });
    }
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  work(next);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

extern "C" int32_t ive_cpu_tile(const ive::TileJob* job, int32_t threads) try {
  const ive::host::Tiling tiling(*job);
  const auto tasks = static_cast<int64_t>(tiling.tasks());
  std::atomic<bool> done{true};
  in_parallel(static_cast<int>(std::min<int64_t>(threads, tasks)), [&](std::atomic<int64_t>& next) {
    ive::host::Workspace space;
    if (!tiling.allocate(space)) {
      done = false;
      return;
    }
    for (int64_t i = next++; i < tasks; i = next++) tiling.run(static_cast<size_t>(i), space);
  });
  return done ? ive::kOk : ive::kOutOfMemory;
} catch (const std::bad_alloc&) {
  return ive::kOutOfMemory;
}

extern "C" int32_t ive_cpu_pixel_shuffle(const ive::ShuffleJob* job, int32_t threads) {
  const ive::host::ShuffleTokens run = ive::host::shuffle_function(*job);
  if (run == nullptr) return ive::kBadArgument;
  constexpr int64_t kTokens = 8;  // taken at a time: 400 KB of floats at 12,800 each
  const int64_t tokens = ive::token_count(*job);
  const int64_t pieces = ive::ceil_div(tokens, kTokens);
  std::atomic<bool> done{true};
  in_parallel(static_cast<int>(std::min<int64_t>(threads, pieces)),
              [&](std::atomic<int64_t>& next) {
                const std::unique_ptr<float[]> row(
                    new (std::nothrow) float[static_cast<size_t>(4) * job->channels]);
                if (!row) {
                  done = false;
                  return;
                }
                for (int64_t i = next++; i < pieces; i = next++) {
                  run(*job, i * kTokens, std::min(tokens, (i + 1) * kTokens), row.get());
                }
              });
  return done ? ive::kOk : ive::kOutOfMemory;
}

// What the CUDA kernels do, thread by thread in order, for the tests: the same bodies over the
// same launch shapes, with `job->scratch` given as on the device.
namespace {

template <int32_t layout, typename T>
void vertical_elements(const ive::TileJob& job) {
  for (int64_t tile = 0; tile < ive::tile_count(job); ++tile) {
    for (int32_t c = 0; c < 3; ++c) {
      for (int32_t y = 0; y < job.side; ++y) {
        for (int32_t quad = 0; quad < job.side / 4; ++quad) {
          ive::vertical_quad<layout, T>(job, tile, c, y, quad);
        }
      }
    }
  }
}

}  // namespace

extern "C" int32_t ive_cpu_tile_elements(const ive::TileJob* job) {
  const int64_t width = (int64_t{job->columns} + (job->thumbnail ? 1 : 0)) * job->side;
  for (int64_t y = 0; y < job->image.height; ++y) {
    for (int64_t x = 0; x < width; ++x) ive::horizontal_element(*job, y, x);
  }
  const bool half = job->type == ive::kFloat16;
  if (job->layout == ive::kTiles) {
    vertical_elements<ive::kTiles, uint8_t>(*job);
  } else if (job->layout == ive::kNchw) {
    half ? vertical_elements<ive::kNchw, ive::Half>(*job)
         : vertical_elements<ive::kNchw, float>(*job);
  } else {
    half ? vertical_elements<ive::kPatches, ive::Half>(*job)
         : vertical_elements<ive::kPatches, float>(*job);
  }
  return ive::kOk;
}

extern "C" int32_t ive_cpu_pixel_shuffle_blocks(const ive::ShuffleJob* job) {
  return job->in_type == ive::kFloat32   ? ive::host::shuffle_blocks_of<float>(*job)
         : job->in_type == ive::kFloat16 ? ive::host::shuffle_blocks_of<ive::Half>(*job)
                                         : ive::kBadArgument;
}

extern "C" int32_t ive_cpu_select_blocks(const ive::SelectJob* job) {
  if (job->size < 1 || job->count < 1 || job->count > ive::kSelectMost) return ive::kBadArgument;
  return job->type == ive::kFloat32   ? ive::host::select_blocks<float>(*job)
         : job->type == ive::kFloat16 ? ive::host::select_blocks<ive::Half>(*job)
         : job->type == ive::kUint64  ? ive::host::select_blocks<uint64_t>(*job)
                                      : ive::kBadArgument;
}

// Index arithmetic and launch shapes, for the tests and for bindings in other languages.
extern "C" int64_t ive_cpu_output_index(int32_t layout, int32_t side, int32_t patch, int64_t tile,
                                        int32_t c, int32_t y, int32_t x) {
  return ive::output_index(layout, side, patch, tile, c, y, x);
}

extern "C" int64_t ive_cpu_scratch_index(const ive::TileJob* job, int32_t target, int32_t c,
                                         int64_t y, int64_t x) {
  return ive::scratch_index(*job, target, c, y, x);
}

extern "C" int64_t ive_cpu_source_index(const ive::ShuffleJob* job, int64_t token, int32_t m) {
  return ive::source_index(*job, token, m);
}

extern "C" void ive_cpu_tile_shapes(const ive::TileJob* job, ive::LaunchShape* shapes) {
  shapes[0] = ive::horizontal_shape(*job);
  shapes[1] = ive::vertical_shape(*job);
}

extern "C" void ive_cpu_shuffle_shape(const ive::ShuffleJob* job, ive::LaunchShape* shape) {
  *shape = ive::shuffle_shape(*job);
}

extern "C" void ive_cpu_select_shape(const ive::SelectJob* job, ive::LaunchShape* shape) {
  *shape = ive::select_shape(*job);
}

// Half precision as the kernels convert it; n elements.
extern "C" void ive_cpu_to_half(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = ive::to_half(from[i]).bits;
}

extern "C" void ive_cpu_to_float(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = ive::to_float(ive::Half{from[i]});
}
