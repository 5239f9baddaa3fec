// One product: which path takes it, and how it is cut into tasks that may run side by side.
#pragma once

#include <algorithm>
#include <iterator>
#include <memory>
#include <new>

#include "../operators/paths.h"
#include "plain.h"
#include "tiles.h"
#if defined(__x86_64__)
#include "avx2_few.h"
#include "avx512_few.h"
#include "avx_vnni.h"
#elif defined(__aarch64__)
#include "neon_matrices.h"
#endif

namespace ive::blocks {

// For weights of so many bits, the fastest first; the same paths for all.
template <int kBits>
constexpr Path kPathsOf[] = {
#if defined(__x86_64__)
    avx512::kPath<kBits>,
#ifdef IVE_HAS_AVX_VNNI
    avx_vnni::kPath<kBits>,
#endif
    avx2::kPath<kBits>,
#elif defined(__aarch64__)
#ifdef IVE_HAS_MATRIX_PRODUCTS
    neon_matrices::kPath<kBits>,
#endif
    neon::kPath<kBits>,
#endif
    // As it is defined: it has no tiles.
    {"plain", 0, 0, 0, [] { return true; }, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr}};

struct Paths {
  const Path *first, *last;

  const Path* begin() const { return first; }
  const Path* end() const { return last; }
};

inline Paths paths(int64_t bits) {
  if (bits == 4) return {std::begin(kPathsOf<4>), std::end(kPathsOf<4>)};
  return {std::begin(kPathsOf<8>), std::end(kPathsOf<8>)};
}

inline const Path& best_path(int64_t bits) { return *path_at(paths(bits), 0); }

// Bytes of a column's span: what is transposed of a task's weights at a time stays near for all
// rows.
constexpr int64_t kSpanBytes = 1024;
constexpr int64_t kTaskColumns = 32;

class Multiplication {
 public:
  Multiplication(const Product& product, const Path& path)
      : p_(product), path_(path), blocks_(product.blocks()) {
    if (path.rows == 0) return;
    few_ = product.rows <= kFewRows;
    row_tiles_ = ceil_div(p_.rows, path.rows);
  }

  // False where there is no memory for the rounded inputs.
  bool allocate() {
    if (path_.rows == 0) return true;
    if (few_) return few_rows_.allocate(p_);
    const int64_t rows = row_tiles_ * path_.rows;
    values_.reset(new (std::nothrow) int8_t[rows * blocks_ * p_.block]);
    scales_.reset(new (std::nothrow) float[rows * blocks_]);
    starts_.reset(new (std::nothrow) int32_t[rows * blocks_]);
    return values_ != nullptr && scales_ != nullptr && starts_ != nullptr;
  }

  // Tasks of the two passes; the first must be done before the second begins.
  int64_t roundings() const { return path_.rows == 0 ? 0 : p_.rows; }
  int64_t products() const {
    return path_.rows == 0 ? p_.rows : ceil_div(p_.columns, kTaskColumns);
  }

  void round(int64_t row) const {
    if (few_) return path_.round_few(p_, few_rows_, row);
    const int64_t tile = row / path_.rows, place = row % path_.rows;
    const int64_t first = tile * path_.rows * blocks_ + place;
    path_.round_row(p_.x + row * p_.inputs, p_.inputs, p_.block,
                    values_.get() + tile * path_.rows * blocks_ * p_.block + path_.unit * place,
                    scales_.get() + first, starts_.get() + first);
  }

  void multiply(int64_t task) const {
    if (path_.rows == 0) return p_.bits == 4 ? plain_row<4>(p_, task) : plain_row<8>(p_, task);
    const int64_t from = task * kTaskColumns, to = std::min(from + kTaskColumns, p_.columns);
    if (few_) {
      path_.multiply_few(p_, few_rows_, from, to);
    } else {
      multiply_tiles(from, to);
    }
    for (int64_t row = 0; p_.bias != nullptr && row < p_.rows; ++row) {
      for (int64_t n = from; n < to; ++n) p_.y[row * p_.columns + n] += p_.bias[n];
    }
  }

 private:
  void multiply_tiles(int64_t from, int64_t to) const {
    alignas(64) uint8_t values[kTaskColumns * kSpanBytes];
    alignas(64) float scales[kTaskColumns * kSpanBytes / kLeastBlockBytes];
    const int64_t step = kSpanBytes / p_.block_bytes();
    for (int64_t block = 0; block < blocks_; block += step) {
      const Span span{std::min(step, blocks_ - block), p_.block, block == 0};
      for (int64_t n = from; n < to; n += path_.columns) {
        const int64_t place = (n - from) * step;
        load(n, block, span, {values + place * p_.block_bytes(), scales + place});
      }
      for (int64_t tile = 0; tile < row_tiles_; ++tile) {
        for (int64_t n = from; n < to; n += path_.columns) {
          const int64_t place = (n - from) * step;
          multiply_tile(tile, n, block, span, {values + place * p_.block_bytes(), scales + place});
        }
      }
    }
  }

  static constexpr int64_t kLeastBlockBytes = 16;

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  int given(int64_t n) const {
    return static_cast<int>(std::min<int64_t>(path_.columns, p_.columns - n));
  }

  struct Room {
    uint8_t* values;
    float* scales;
  };

  // Transposes the weights of a panel from column `n` on, and fetches the next panel's scales.
  void load(int64_t n, int64_t block, const Span& span, const Room& room) const {
    const float* scales = p_.scales + n * blocks_ + block;
    path_.transpose_weights({p_.values + n * p_.column_bytes() + block * p_.block_bytes(),
                             p_.column_bytes(), given(n), span.blocks * p_.block_bytes() / 4},
                            room.values);
    path_.transpose_scales({bytes(scales), 4 * blocks_, given(n), span.blocks},
                           reinterpret_cast<uint8_t*>(room.scales));
    for (int i = 0; i < path_.columns; ++i) fetch(scales + (path_.columns + i) * blocks_);
  }

  static const uint8_t* bytes(const float* values) {
    return reinterpret_cast<const uint8_t*>(values);
  }

  // The share of this span in the next panel, in the order in which that lies.
  const uint8_t* ahead(int64_t n, int64_t block) const {
    const int64_t next = (n + path_.columns) * blocks_ + block * path_.columns;
    return p_.values + next * p_.block_bytes();
  }

  void multiply_tile(int64_t tile, int64_t n, int64_t block, const Span& span,
                     const Room& room) const {
    const int64_t row = tile * path_.rows, first = row * blocks_ + block * path_.rows;
    const Inputs inputs{values_.get() + first * p_.block, scales_.get() + first,
                        starts_.get() + first};
    const Panel panel{room.values, room.scales, tile == 0 ? ahead(n, block) : room.values};
    const int rows = static_cast<int>(std::min<int64_t>(path_.rows, p_.rows - row));
    float* y = p_.y + row * p_.columns + n;
    if (n + path_.columns <= p_.columns) {
      return path_.multiply(rows, inputs, panel, span, y, p_.columns);
    }
    float edge[kMostRows * kMostColumns];  // a tile that is wider than what is left
    copy(edge, path_.columns, y, p_.columns, span.first ? 0 : rows, given(n));
    path_.multiply(rows, inputs, panel, span, edge, path_.columns);
    copy(y, p_.columns, edge, path_.columns, rows, given(n));
  }

  static constexpr int kMostRows = 12, kMostColumns = 32;

  static void copy(float* to, int64_t to_apart, const float* from, int64_t from_apart, int rows,
                   int columns) {
    for (int r = 0; r < rows; ++r) {
      std::memcpy(to + r * to_apart, from + r * from_apart, columns * sizeof(float));
    }
  }

  Product p_;
  const Path& path_;
  int64_t blocks_, row_tiles_ = 0;
  bool few_ = false;
  FewRows few_rows_;
  std::unique_ptr<int8_t[]> values_;
  std::unique_ptr<float[]> scales_;
  std::unique_ptr<int32_t[]> starts_;
};

}  // namespace ive::blocks
