// Tiling: uint8 image -> antialiased bicubic resize to a grid of tiles plus thumbnail -> uint8
// tiles, or normalised NCHW, or rows of the patch GEMM. Element bodies for CUDA and C++ alike.
//
// The resize is Pillow's up to version 12, bit for bit: horizontal pass first, an 8-bit
// intermediate, weights in fixed point with 22 fractional bits. With the weights that weights.py
// rounds to fewer it is torchvision's. Nothing of full size is ever a float: the only intermediate
// is uint8.
#pragma once

#include "common.cuh"

namespace ive {

constexpr int kFractionBits = 22;
constexpr int32_t kHalfUnit = 1 << (kFractionBits - 1);

enum Format : int32_t { kRgb = 0, kBgr = 1, kRgba = 2, kNv12 = 3 };
enum Matrix : int32_t { kBt601 = 0, kBt709 = 1 };
enum Layout : int32_t { kTiles = 0, kNchw = 1, kPatches = 2 };

struct Image {
  const uint8_t* pixels;          // (height, stride): 3 or 4 bytes a pixel; of NV12 the luma plane
  const uint8_t* chroma;          // NV12: (ceil(height / 2), chroma_stride), U and V interleaved
  int64_t stride, chroma_stride;  // bytes from row to row
  int32_t width, height, format, matrix;
};

// One axis of a resize. Output o is the sum over k < count[o] of weights[o][k] * input[low[o] + k].
// |sum| + half a unit stays below 2^31 (sum of |weights| <= 1.5 * 2^22), so int32 is exact.
struct Axis {
  const int32_t* low;      // (size,)
  const int32_t* count;    // (size,)
  const int32_t* weights;  // (size, taps), 22 fractional bits
  int32_t taps, size;
};

// Everything of one call. Index 0 of an axis is the grid, 1 the thumbnail (the whole image, made
// from the original). Passed to kernels by value; kernels/jobs.py mirrors it field by field.
struct TileJob {
  Image image;
  Axis across[2], down[2];
  void* out;  // (tiles, side, side, 3) | (tiles, 3, side, side) | (tiles, patches, 3 * patch^2)
  uint8_t* scratch;  // CUDA: planar uint8 (3, height, columns * side), then (3, height, side)
  int32_t columns, rows, side, patch, thumbnail, layout, type;
};

struct Rgb {
  uint8_t r, g, b;
};

IVE_BODY uint8_t clip8(int32_t value) {
  return static_cast<uint8_t>(value < 0 ? 0 : value > 255 ? 255 : value);
}

// Fixed point to pixel; the shift is arithmetic, so negative lobes round as Pillow's do.
IVE_BODY uint8_t round_pixel(int32_t sum) { return clip8(sum >> kFractionBits); }

// ITU-R video range to RGB: 16..235 luma, 16..240 chroma, 16 fractional bits, rounded half up.
// BT.601: Kr 0.299, Kb 0.114. BT.709: Kr 0.2126, Kb 0.0722.
IVE_BODY Rgb yuv_to_rgb(int32_t y, int32_t u, int32_t v, int32_t matrix) {
  const bool hd = matrix == kBt709;
  const int32_t luma = (y - 16) * 76309 + (1 << 15);  // 255 / 219
  u -= 128;
  v -= 128;
  const int32_t red = luma + (hd ? 117489 : 104597) * v;
  const int32_t green = luma - (hd ? 13975 : 25675) * u - (hd ? 34925 : 53279) * v;
  const int32_t blue = luma + (hd ? 138438 : 132201) * u;
  return Rgb{clip8(red >> 16), clip8(green >> 16), clip8(blue >> 16)};
}

IVE_BODY int32_t pixel_bytes(int32_t format) { return format == kRgba ? 4 : 3; }

// Byte of channel c (0 red, 1 green, 2 blue) inside a packed pixel.
IVE_BODY int32_t channel_byte(int32_t format, int32_t c) { return format == kBgr ? 2 - c : c; }

IVE_BODY Rgb fetch(const Image& image, int64_t y, int64_t x) {
  if (image.format == kNv12) {
    const uint8_t* uv = image.chroma + (y / 2) * image.chroma_stride + (x / 2) * 2;
    return yuv_to_rgb(image.pixels[y * image.stride + x], uv[0], uv[1], image.matrix);
  }
  const uint8_t* pixel = image.pixels + y * image.stride + x * pixel_bytes(image.format);
  const bool swap = image.format == kBgr;
  return Rgb{pixel[swap ? 2 : 0], pixel[1], pixel[swap ? 0 : 2]};
}

// (pixel / 255 - mean) / std, each step rounded to float32: the reference's order and result.
//
// A division a / b is q = a * (1 / b) and one correction q + (a - q * b) / b with fused
// multiply-adds: equal to the correctly rounded quotient for all 256 pixels of each channel
// (tests/kernels/test_tiling.py tries them all) and several times cheaper than a vector division.
struct Channel {
  float mean, std, inverse_std;
};

IVE_BODY Channel channel(int32_t c) {
  return c == 0   ? Channel{0.485f, 0.229f, 1.0f / 0.229f}
         : c == 1 ? Channel{0.456f, 0.224f, 1.0f / 0.224f}
                  : Channel{0.406f, 0.225f, 1.0f / 0.225f};
}

IVE_BODY float divide(float a, float b, float inverse_b) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  const float quotient = a * inverse_b;
  return __builtin_fmaf(__builtin_fmaf(-quotient, b, a), inverse_b, quotient);
#else
  (void)inverse_b;
  return a / b;
#endif
}

IVE_BODY float normalise(uint8_t pixel, const Channel& c) {
  return divide(divide(static_cast<float>(pixel), 255.0f, 1.0f / 255.0f) - c.mean, c.std,
                c.inverse_std);
}

IVE_BODY void store(uint8_t* to, uint8_t pixel, const Channel&) { *to = pixel; }
IVE_BODY void store(float* to, uint8_t pixel, const Channel& c) { *to = normalise(pixel, c); }
IVE_BODY void store(Half* to, uint8_t pixel, const Channel& c) {
  *to = to_half(normalise(pixel, c));
}

// Where element (tile, c, y, x) of the output lies, counted in elements.
IVE_BODY int64_t output_index(int32_t layout, int32_t side, int32_t patch, int64_t tile, int32_t c,
                              int32_t y, int32_t x) {
  if (layout == kTiles) return ((tile * side + y) * side + x) * 3 + c;  // (tiles, side, side, 3)
  if (layout == kNchw) return ((tile * 3 + c) * side + y) * side + x;   // (tiles, 3, side, side)
  // (tiles, (side / patch)^2, 3 * patch^2), the last as (channel, row, column)
  const int32_t across = side / patch;
  const int64_t row = (tile * across + y / patch) * across + x / patch;
  return (row * 3 + c) * patch * patch + (y % patch) * patch + x % patch;
}

IVE_BODY int64_t tile_count(const TileJob& job) {
  return static_cast<int64_t>(job.columns) * job.rows + (job.thumbnail ? 1 : 0);
}

// Where the intermediate (target, c, y, x) lies in the scratch, in bytes; target 1 is the
// thumbnail.
IVE_BODY int64_t scratch_index(const TileJob& job, int32_t target, int32_t c, int64_t y,
                               int64_t x) {
  const int64_t height = job.image.height;
  const int64_t grid_width = static_cast<int64_t>(job.columns) * job.side;
  const int64_t width = target == 0 ? grid_width : job.side;
  return (target == 0 ? 0 : 3 * height * grid_width) + (c * height + y) * width + x;
}

// First pass, one intermediate pixel. x counts the grid's columns, then the thumbnail's.
IVE_BODY void horizontal_element(const TileJob& job, int64_t y, int64_t x) {
  const int64_t grid_width = static_cast<int64_t>(job.columns) * job.side;
  const int32_t target = x < grid_width ? 0 : 1;
  const int64_t at = target == 0 ? x : x - grid_width;
  const Axis& axis = job.across[target];
  const int32_t* weights = axis.weights + at * axis.taps;
  const int32_t low = axis.low[at];
  int32_t r = kHalfUnit, g = kHalfUnit, b = kHalfUnit;
  for (int32_t k = 0; k < axis.count[at]; ++k) {
    const Rgb pixel = fetch(job.image, y, low + k);
    r += weights[k] * pixel.r;
    g += weights[k] * pixel.g;
    b += weights[k] * pixel.b;
  }
  job.scratch[scratch_index(job, target, 0, y, at)] = round_pixel(r);
  job.scratch[scratch_index(job, target, 1, y, at)] = round_pixel(g);
  job.scratch[scratch_index(job, target, 2, y, at)] = round_pixel(b);
}

// Second pass, four neighbours (tile, c, y, 4 * quad ...) of the output; side is a multiple of 4.
// An intermediate row is a multiple of 4 bytes then, so a tap is one aligned 32-bit read.
template <int32_t layout, typename T>
IVE_BODY void vertical_quad(const TileJob& job, int64_t tile, int32_t c, int32_t y, int32_t quad) {
  const int64_t cells = static_cast<int64_t>(job.columns) * job.rows;
  const int32_t target = tile < cells ? 0 : 1;
  const int64_t grid_y = target == 0 ? (tile / job.columns) * job.side + y : y;
  const int64_t grid_x = (target == 0 ? (tile % job.columns) * job.side : 0) + 4 * quad;
  const int64_t width = target == 0 ? static_cast<int64_t>(job.columns) * job.side : job.side;
  const Axis& axis = job.down[target];
  const int32_t* weights = axis.weights + grid_y * axis.taps;
  const uint8_t* from = job.scratch + scratch_index(job, target, c, axis.low[grid_y], grid_x);
  int32_t sums[4] = {kHalfUnit, kHalfUnit, kHalfUnit, kHalfUnit};
  for (int32_t k = 0; k < axis.count[grid_y]; ++k, from += width) {
    const uint32_t four = *reinterpret_cast<const uint32_t*>(from);
    for (int i = 0; i < 4; ++i)
      sums[i] += weights[k] * static_cast<int32_t>(four >> (8 * i) & 255u);
  }
  T* out = static_cast<T*>(job.out);
  for (int i = 0; i < 4; ++i) {
    const int64_t to = output_index(layout, job.side, job.patch, tile, c, y, 4 * quad + i);
    store(out + to, round_pixel(sums[i]), channel(c));
  }
}

// Rows and planes beyond a grid's limit are reached by striding (see tiling.cu).
IVE_BODY LaunchShape horizontal_shape(const TileJob& job) {
  const int64_t width = (static_cast<int64_t>(job.columns) + (job.thumbnail ? 1 : 0)) * job.side;
  const int64_t height = job.image.height;
  return LaunchShape{ceil_div(width, 128), height < kMaxGridYZ ? height : kMaxGridYZ, 1, 128};
}

IVE_BODY LaunchShape vertical_shape(const TileJob& job) {
  const int64_t planes = tile_count(job) * 3;
  return LaunchShape{ceil_div(job.side / 4, 128), job.side < kMaxGridYZ ? job.side : kMaxGridYZ,
                     planes < kMaxGridYZ ? planes : kMaxGridYZ, 128};
}

}  // namespace ive
