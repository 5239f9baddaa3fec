// Tasks for aarch64.
#pragma once

#include "../blocks/neon.h"
#include "path.h"

namespace ive::attention::neon {

#define IVE_TARGET

typedef float Vec __attribute__((vector_size(16)));
constexpr int kLanes = 4, kRows = 6, kFewLines = 4, kColumns = blocks::neon::kColumns;
constexpr const char* kName = "NEON";

inline bool runs_here() { return true; }

IVE_INLINE Vec all(float value) { return vdupq_n_f32(value); }

IVE_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }

template <Kind kKind>
IVE_INLINE Vec take(const char* from) {
  if constexpr (kKind == kFloat) return vld1q_f32(reinterpret_cast<const float*>(from));
  if constexpr (kKind == kHalf) {
    float16x4_t halves;
    std::memcpy(&halves, from, sizeof halves);
    return vcvt_f32_f16(halves);
  }
  uint32_t four;
  std::memcpy(&four, from, sizeof four);
  const int16x8_t wide = vmovl_s8(vcreate_s8(four));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

IVE_INLINE void sum_four(const Vec (&given)[4], float* to) {
  vst1q_f32(to, vpaddq_f32(vpaddq_f32(given[0], given[1]), vpaddq_f32(given[2], given[3])));
}

inline void widen(const char* from, Kind kind, float* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  for (int64_t i = 0; i < count; i += 4) {
    vst1q_f32(to + i, kind == kHalf ? take<kHalf>(from + 2 * i) : take<kInt8>(from + i));
  }
}

inline void narrow(const float* from, const float* scales, Kind kind, char* to, int64_t count) {
  if (kind == kFloat) return std::memcpy(to, from, count * sizeof(float)), void();
  if (kind == kInt8) return round_to_bytes(from, scales, to, count);
  for (int64_t i = 0; i < count; i += 4) {
    const float16x4_t halves = vcvt_f16_f32(vld1q_f32(from + i));
    std::memcpy(to + 2 * i, &halves, sizeof halves);
  }
}

inline void transpose(const float* from, int64_t count, int given, float* to) {
  blocks::neon::transpose(
      {reinterpret_cast<const uint8_t*>(from), count * int64_t{sizeof(float)}, given, count},
      reinterpret_cast<uint8_t*>(to));
}

#include "vectors.h"
#undef IVE_TARGET

}  // namespace ive::attention::neon
