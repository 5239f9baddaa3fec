// silu(gate) * up, as the compiler turns into vectors.
#pragma once

#include <cstdint>
#include <cstring>

#include "product.h"

namespace ive::blocks {

// e^x for x up to 88, below -87 as of that: Cephes' polynomial, 2e-7 of the value at most.
IVE_INLINE float exponential(float x) {
  x = x < -87.f ? -87.f : x;
  x = x > 88.f ? 88.f : x;
  constexpr float kShift = 12582912.f;  // 1.5 * 2^23: adding it rounds
  const float shifted = x * 1.44269504f + kShift;
  const float whole = shifted - kShift;
  const float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  float value = 1.9875691500e-4f;
  value = value * rest + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * rest * rest + rest + 1.f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000u + 127u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return value * power;
}

// Gates and ups in turns -> (width).
inline void gate(const float* both, int64_t width, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float given = both[2 * i];
    out[i] = given / (1.f + exponential(-given)) * both[2 * i + 1];
  }
}

}  // namespace ive::blocks
