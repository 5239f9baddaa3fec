// The kinds of CPU, and for each what the operations are made of.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "packed.h"
#include "tower.h"
#include "units.h"
#if defined(__x86_64__)
#include "../blocks/avx512.h"
#include "../blocks/avx_vnni.h"
#elif defined(__aarch64__)
#include "../blocks/neon.h"
#endif

namespace ive::vision {

// Columns of a float product, and queries, that make a task.
constexpr int64_t kTaskColumns = 32, kTaskTokens = 96;

// Integer products: rows of a tile, inputs of a unit.
struct Integers {
  int tile_rows, unit_inputs;
  // Whether they are as fast as ONNX Runtime's.
  bool fast;
  void (*pack)(const IntegerProduct& product, const InputBlock& inputs, int64_t tile);
  void (*multiply)(const IntegerProduct& product, const InputBlock& inputs, int64_t task);
};

struct Path {
  const char* name;
  bool (*runs_here)();
  Integers integers;
  void (*norm_row)(const Norm& norm, int64_t row);
  void (*gelu_row)(const Gelu& gelu, int64_t row);
  void (*multiply_columns)(const Product& product, int64_t task);
  // Attention of a tile: runs of 16 tokens are packed, all of them; then parts of heads attend.
  void (*pack_run)(const Attention& attention, const Packed& packed, int64_t tile, int64_t run);
  void (*attend)(const Attention& attention, const Packed& packed, int64_t tile, int64_t task);
};

#if defined(__x86_64__) || defined(__aarch64__)
// What becomes units of a strip's weights.
inline blocks::Source source(const int8_t* weight, int64_t apart, int64_t given, int64_t count) {
  return {reinterpret_cast<const uint8_t*>(weight), apart, static_cast<int>(given), count};
}
#endif

#if defined(__x86_64__)
namespace avx512 {
#define IVE_TARGET \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,prefer-vector-width=512")))
constexpr int kWidth = 16, kRows = 12, kBlocks = 2;
constexpr Unit kUnit = Unit::kBytes;
#include "lanes.h"
// GCC 12 keeps the sums of the intrinsic in memory where there are many.
IVE_TARGET IVE_INLINE void dot(NativeInt& sum, NativeInt a, NativeInt b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
IVE_TARGET IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(inputs), "v"(weights));
}
inline void transpose_fours(const int8_t* weight, int64_t apart, int64_t given, int64_t count,
                            int32_t* to) {
  blocks::avx512::transpose(source(weight, apart, given, count), reinterpret_cast<uint8_t*>(to));
}
#include "attention.h"
#include "integers.h"
#include "product.h"
#include "rows.h"
inline bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
constexpr Path kPath = {"AVX512-VNNI", runs_here,        integers<true>, norm_row,
                        gelu_row,      multiply_columns, pack_run,       attend};
#undef IVE_TARGET
}  // namespace avx512

namespace avx2 {
#define IVE_TARGET __attribute__((target("avx2")))
constexpr int kWidth = 8, kRows = 6, kBlocks = 1;
constexpr Unit kUnit = Unit::kPairs;
#include "lanes.h"
IVE_TARGET IVE_INLINE void dot(NativeInt& sum, NativeInt a, NativeInt b) {
  sum += reinterpret_cast<NativeInt>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}
IVE_TARGET IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  dot(sum, inputs, weights);
}
inline void transpose_fours(const int8_t* weight, int64_t apart, int64_t given, int64_t count,
                            int32_t* to) {
  blocks::avx2::transpose(source(weight, apart, given, count), reinterpret_cast<uint8_t*>(to));
}
#include "attention.h"
#include "integers.h"
#include "product.h"
#include "rows.h"
inline bool runs_here() { return __builtin_cpu_supports("avx2"); }
constexpr Path kPath = {"AVX2",   runs_here,        integers<true>, norm_row,
                        gelu_row, multiply_columns, pack_run,       attend};
#undef IVE_TARGET
}  // namespace avx2

#ifdef IVE_HAS_AVX_VNNI
// AVX2 but for products of bytes.
namespace avx_vnni {
#define IVE_TARGET __attribute__((target("avx2")))
constexpr int kWidth = 8, kRows = 6, kBlocks = 1;
constexpr Unit kUnit = Unit::kBytes;
#include "lanes.h"
IVE_TARGET IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(inputs), "x"(weights));
}
using avx2::transpose_fours;
#include "integers.h"
constexpr Path kPath = {"AVX-VNNI",     blocks::avx_vnni::runs_here, integers<true>, avx2::norm_row,
                        avx2::gelu_row, avx2::multiply_columns,      avx2::pack_run, avx2::attend};
#undef IVE_TARGET
}  // namespace avx_vnni
#endif
#endif

#define IVE_TARGET
#if defined(__x86_64__) || defined(__aarch64__)
namespace vectors {
constexpr int kWidth = 4, kRows = 2, kBlocks = 1;
constexpr Unit kUnit = Unit::kPairs;
#include "lanes.h"
IVE_INLINE void dot(NativeInt& sum, NativeInt a, NativeInt b) {
#if defined(__x86_64__)
  sum += reinterpret_cast<NativeInt>(
      _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  const int32x4_t low = vmull_s16(vget_low_s16(x), vget_low_s16(y));
  sum += vpaddq_s32(low, vmull_high_s16(x, y));
#endif
}
IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  dot(sum, inputs, weights);
}
#include "attention.h"
#include "fours.h"
#include "integers.h"
#include "product.h"
#include "rows.h"
inline bool runs_here() { return true; }
#if defined(__x86_64__)
constexpr const char* kName = "SSE2";
#else
constexpr const char* kName = "NEON";
#endif
constexpr Path kPath = {kName,    runs_here,        integers<false>, norm_row,
                        gelu_row, multiply_columns, pack_run,        attend};
}  // namespace vectors
#endif
#undef IVE_TARGET

#if defined(__aarch64__)
// NEON but for products of bytes.
namespace dot_products {
#define IVE_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
constexpr int kWidth = 4, kRows = 6, kBlocks = 1;
constexpr Unit kUnit = Unit::kSigned;
#include "lanes.h"
IVE_TARGET IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  sum = vdotq_s32(sum, vreinterpretq_s8_s32(inputs), vreinterpretq_s8_s32(weights));
}
inline void transpose_fours(const int8_t* weight, int64_t apart, int64_t given, int64_t count,
                            int32_t* to) {
  blocks::neon::transpose(source(weight, apart, given, count), reinterpret_cast<uint8_t*>(to));
}
#include "integers.h"
constexpr Path kPath = {"NEON dot products", blocks::neon::runs_here, integers<true>,
                        vectors::norm_row,   vectors::gelu_row,       vectors::multiply_columns,
                        vectors::pack_run,   vectors::attend};

// CPUs with products of matrices, twice as fast: ONNX Runtime has them, this has none.
constexpr Path kBesideMatrices = {
    "NEON matrix products", blocks::neon::has_matrix_products, integers<false>,   vectors::norm_row,
    vectors::gelu_row,      vectors::multiply_columns,         vectors::pack_run, vectors::attend};
#undef IVE_TARGET
}  // namespace dot_products
#endif

// As it is defined, on any CPU.
#define IVE_TARGET
namespace plain {
constexpr int kWidth = 4, kRows = 1, kBlocks = 1;
constexpr Unit kUnit = Unit::kPairs;
#include "lanes.h"
IVE_INLINE void dot(NativeInt& sum, NativeInt a, NativeInt b) {
  int16_t x[2 * kWidth], y[2 * kWidth];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  for (int i = 0; i < kWidth; ++i) sum[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
}
IVE_INLINE void multiply_units(NativeInt& sum, NativeInt inputs, NativeInt weights) {
  dot(sum, inputs, weights);
}
#include "attention.h"
#include "fours.h"
#include "integers.h"
#include "product.h"
#include "rows.h"
inline bool runs_here() { return true; }
constexpr Path kPath = {"plain",  runs_here,        integers<false>, norm_row,
                        gelu_row, multiply_columns, pack_run,        attend};
}  // namespace plain
#undef IVE_TARGET

// The fastest first.
constexpr Path kPaths[] = {
#if defined(__x86_64__)
    avx512::kPath,
#ifdef IVE_HAS_AVX_VNNI
    avx_vnni::kPath,
#endif
    avx2::kPath, vectors::kPath,
#elif defined(__aarch64__)
    dot_products::kBesideMatrices, dot_products::kPath, vectors::kPath,
#endif
    plain::kPath};

inline const Path& best_path() {
  for (const Path& path : kPaths) {
    if (path.runs_here()) return path;
  }
  return plain::kPath;
}

// Runs of tokens to pack, and tasks of attention, of each tile.
inline int64_t packings(const Packed& p) { return p.tokens / kLanes; }
inline int64_t attendings(const Attention& a) {
  return a.heads * (round_up(a.tokens, kTaskTokens) / kTaskTokens);
}
inline int64_t product_tasks(const Product& p) {
  return round_up(p.columns, kTaskColumns) / kTaskColumns;
}
// Tiles to pack of a block, and tasks of each product of it.
inline int64_t packings(const Integers& i, const InputBlock& inputs) {
  return round_up(inputs.rows, i.tile_rows) / i.tile_rows;
}
inline int64_t product_tasks(const IntegerProduct& p) {
  return round_up(p.columns, kTaskWidth) / kTaskWidth;
}

}  // namespace ive::vision
