// Tiling on the CPU, continued: how a job is cut into tasks and what one task does.
#pragma once

#include <vector>

#include "host_tiling.h"

namespace ive::host {

// Converts `count` NV12 pixels from column x of row y to planes of `apart` bytes: R, G, B. `uv`
// (2, count + 2) holds the chroma of each pixel, so that the loop over pixels is vectorised.
inline void nv12_row(uint8_t* __restrict rgb, int64_t apart, uint8_t* __restrict uv,
                     const Image& image, int64_t y, int64_t x, int64_t count) {
  const uint8_t* luma = image.pixels + y * image.stride + x;
  const uint8_t* chroma = image.chroma + (y / 2) * image.chroma_stride + x / 2 * 2;
  const int64_t odd = x % 2, pairs = ceil_div(count + odd, 2);
  uint8_t *u = uv, *v = uv + count + 2;
  for (int64_t i = 0; i < pairs; ++i) {
    u[2 * i] = u[2 * i + 1] = chroma[2 * i];
    v[2 * i] = v[2 * i + 1] = chroma[2 * i + 1];
  }
  const int32_t matrix = image.matrix;
  for (int64_t i = 0; i < count; ++i) {
    const Rgb pixel = yuv_to_rgb(luma[i], u[i + odd], v[i + odd], matrix);
    rgb[i] = pixel.r;
    rgb[i + apart] = pixel.g;
    rgb[i + 2 * apart] = pixel.b;
  }
}

// (kLanes rows of `bytes`) -> (bytes, kLanes)
inline void transpose_strip(uint8_t* lines, const uint8_t* const* rows, int64_t bytes) {
  if (bytes < kBlock) {
    for (int64_t b = 0; b < bytes; ++b) {
      for (int lane = 0; lane < kLanes; ++lane) lines[b * kLanes + lane] = rows[lane][b];
    }
    return;
  }
  for (int lane = 0; lane < kLanes; lane += kBlock) {
    for (int64_t b = 0; b < bytes; b += kBlock) {
      const int64_t at = std::min(b, bytes - kBlock);  // the last block overlaps: no read beyond
      transpose(lines + at * kLanes + lane, kLanes, [&](int i) { return rows[lane + i] + at; });
    }
  }
}

// One call's work. Rows, columns and indices of the resized image unless said otherwise.
class Tiling {
 public:
  explicit Tiling(const TileJob& job)
      : job_(job), layout_(job.layout, job.side), planar_(job.image.format == kNv12) {
    // The thumbnail's tasks are the longest (most taps), so they start first.
    if (job.thumbnail) plan(1, 1, job.side);
    plan(0, job.columns, static_cast<int64_t>(job.rows) * job.side);
  }

  size_t tasks() const { return tasks_.size(); }

  bool allocate(Workspace& space) const {
    const auto bytes = [](int64_t size) { return new (std::nothrow) uint8_t[size]; };
    space.lines.reset(bytes(chunk_pixels_ * pixel_bytes(job_.image.format) * kLanes));
    space.band.reset(bytes(band_rows_ * layout_.bytes()));
    space.row.reset(bytes(layout_.bytes()));
    space.values.reset(bytes(int64_t{4} * layout_.padded));
    space.sums.reset(new (std::nothrow) int32_t[std::max(layout_.bytes(), kLanes)]);
    if (planar_) space.rgb.reset(bytes(chunk_pixels_ * 3 * kLanes));
    if (planar_) space.uv.reset(bytes(2 * (chunk_pixels_ + 2)));
    return space.lines && space.band && space.row && space.values && space.sums &&
           ((space.rgb && space.uv) || !planar_);
  }

  void run(size_t index, Workspace& space) const {
    const Task& task = tasks_[index];
    const Span down(job_.down[task.target], 0);
    const int64_t first = down.low[task.begin], last = down.high(task.end - 1);
    for (int64_t y = first; y < last; y += kLanes) {
      horizontal(task, y, space.band.get() + (y - first) * layout_.bytes(), space);
    }
    for (int64_t y = task.begin; y < task.end; ++y) vertical(task, y, first, space);
  }

 private:
  void plan(int32_t target, int32_t columns, int64_t height) {
    const Axis& across = job_.across[target];
    const Span down(job_.down[target], 0), over(across, 0);
    // A band re-reads 4 * max(scale, 1) input rows that its neighbour read as well; its input rows
    // fill whole strips and stay in the second-level cache (128 rows of a tile are 172 KB).
    const double scale = static_cast<double>(job_.image.height) / static_cast<double>(height);
    const double reach = std::max(scale, 1.0);
    const int64_t wanted = round_up(static_cast<int64_t>(std::max(128.0, 48 * reach)), kLanes);
    const auto fits = static_cast<int64_t>((static_cast<double>(wanted) - 4 * reach - 1) / scale);
    const int64_t step = std::clamp<int64_t>(fits, 1, height);
    for (int64_t begin = 0; begin < height; begin += step) {
      const int64_t end = std::min(begin + step, height);
      const int64_t rows = down.high(end - 1) - down.low[begin];
      band_rows_ = std::max(band_rows_, round_up(rows, kLanes));
      for (int32_t c = 0; c < columns; ++c) tasks_.push_back(Task{target, c, begin, end});
    }
    for (int32_t x = 0; x < across.size; x += job_.side) {
      for (int32_t at = x; at < x + job_.side; at += kChunk) {
        const int32_t end = std::min(at + kChunk, x + job_.side);
        chunk_pixels_ = std::max<int64_t>(chunk_pixels_, over.high(end - 1) - over.low[at]);
      }
    }
  }

  // Input rows y .. y + 63 -> `band`, one tile wide. Rows below the image repeat its last one.
  void horizontal(const Task& task, int64_t y, uint8_t* band, Workspace& space) const {
    const Span across(job_.across[task.target], int64_t{task.column} * job_.side);
    for (int x = 0; x < job_.side; x += kChunk) {
      const int count = std::min(kChunk, job_.side - x);
      const int32_t low = across.low[x], high = across.high(x + count - 1);
      gather(y, low, high - low, space);
      const int padded = static_cast<int>(round_up(count, kBlock));
      for (int block = 0; block < 3 * padded / kBlock; ++block) {
        const int start = layout_.block_start(x, padded, block);
        resample_block(across, low, start, band + start, space);
      }
    }
  }

  // Input pixels x .. x + count of rows y .. y + 63 -> space.lines, row as lane: the bytes of a
  // pixel side by side as in memory, or, of converted pixels, one plane after the other.
  void gather(int64_t y, int64_t x, int64_t count, Workspace& space) const {
    const int step = pixel_bytes(job_.image.format);
    const uint8_t* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = std::min<int64_t>(y + lane, job_.image.height - 1);
      if (planar_) {
        uint8_t* rgb = space.rgb.get() + lane * chunk_pixels_ * 3;
        nv12_row(rgb, chunk_pixels_, space.uv.get(), job_.image, row, x, count);
        rows[lane] = rgb;
      } else {
        rows[lane] = job_.image.pixels + row * job_.image.stride + x * step;
      }
    }
    if (!planar_) return transpose_strip(space.lines.get(), rows, count * step);
    for (int c = 0; c < 3; ++c) {
      transpose_strip(space.lines.get() + c * chunk_pixels_ * kLanes, rows, count);
      for (const uint8_t*& row : rows) row += chunk_pixels_;
    }
  }

  // 16 neighbouring bytes of a tile row, for 64 rows: resampled as lanes, transposed back.
  void resample_block(const Span& across, int32_t low, int start, uint8_t* band,
                      Workspace& space) const {
    const int step = planar_ ? 1 : pixel_bytes(job_.image.format);
    alignas(64) uint8_t lines[kBlock][kLanes];
    alignas(64) int32_t sums[kLanes];
    for (int i = 0; i < kBlock; ++i) {
      const int x = layout_.pixel(start + i);
      const int c = layout_.channel(start + i);
      const int64_t pixel = across.low[x] - low;
      const int64_t from =
          planar_ ? c * chunk_pixels_ + pixel : pixel * step + channel_byte(job_.image.format, c);
      resample(lines[i], sums, space.lines.get() + from * kLanes, step * kLanes, across.of(x),
               across.count[x], kLanes);
    }
    for (int lane = 0; lane < kLanes; lane += kBlock) {
      transpose(band + int64_t{lane} * layout_.bytes(), layout_.bytes(),
                [&](int i) { return &lines[i][lane]; });
    }
  }

  // Row y of the resized image, one tile wide, from the band whose first input row is `first`.
  void vertical(const Task& task, int64_t y, int64_t first, Workspace& space) const {
    const Span down(job_.down[task.target], 0);
    const uint8_t* from = space.band.get() + (down.low[y] - first) * layout_.bytes();
    const int32_t row = static_cast<int32_t>(y % job_.side);
    const int64_t cells = int64_t{job_.columns} * job_.rows;
    const int64_t tile = task.target == 0 ? y / job_.side * job_.columns + task.column : cells;
    if (job_.layout == kTiles) {
      uint8_t* out = static_cast<uint8_t*>(job_.out);
      out += output_index(kTiles, job_.side, job_.patch, tile, 0, row, 0);
      return resample(out, space.sums.get(), from, layout_.bytes(), down.of(y), down.count[y],
                      3 * job_.side);
    }
    resample(space.row.get(), space.sums.get(), from, layout_.bytes(), down.of(y), down.count[y],
             layout_.bytes());
    for (int c = 0; c < 3; ++c) {
      const uint8_t* pixels = space.row.get() + c * layout_.padded;
      if (job_.type == kFloat32) {
        store_row<float>(tile, c, row, pixels, space);
      } else {
        store_row<Half>(tile, c, row, pixels, space);
      }
    }
  }

  template <typename T>
  static void normalise_row(T* __restrict to, const uint8_t* __restrict pixels, int32_t c, int n) {
    const Channel constants = channel(c);
    for (int x = 0; x < n; ++x) store(to + x, pixels[x], constants);
  }

  template <typename T>
  void store_row(int64_t tile, int32_t c, int32_t y, const uint8_t* pixels,
                 Workspace& space) const {
    T* to =
        static_cast<T*>(job_.out) + output_index(job_.layout, job_.side, job_.patch, tile, c, y, 0);
    if (job_.layout == kNchw) return normalise_row(to, pixels, c, job_.side);
    // One row of each patch in turn; a patch is 3 * patch^2 elements after its left neighbour.
    T* values = reinterpret_cast<T*>(space.values.get());
    normalise_row(values, pixels, c, job_.side);
    const int64_t apart = int64_t{3} * job_.patch * job_.patch;
    for (int32_t x = 0; x < job_.side; x += job_.patch, to += apart) {
      if (job_.patch == 14) {  // every model of the family; a constant size is copied inline
        memcpy(to, values + x, 14 * sizeof(T));
      } else {
        memcpy(to, values + x, static_cast<size_t>(job_.patch) * sizeof(T));
      }
    }
  }

  const TileJob& job_;
  const RowLayout layout_;
  const bool planar_;  // the input is converted, to planes
  std::vector<Task> tasks_;
  int64_t band_rows_ = 0, chunk_pixels_ = 0;
};

}  // namespace ive::host
