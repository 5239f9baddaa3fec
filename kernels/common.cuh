// What every kernel shares: storage types, half precision, launch shapes, error codes.
// Framework-free; compiles as CUDA by nvcc and as C++17 by the system's compiler.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define IVE_BODY __host__ __device__ __forceinline__
#else
#define IVE_BODY inline
#endif

namespace ive {

// Element types of outputs and of the vision features; the numbers are part of the C interface.
enum Type : int32_t { kUint8 = 0, kFloat32 = 1, kFloat16 = 2, kInt8 = 3, kUint64 = 4 };

// What the CPU entry points return; the CUDA launchers return cudaError_t.
enum Status : int32_t { kOk = 0, kOutOfMemory = 1, kBadArgument = 2 };

// IEEE binary16 as stored; its own type, so that overloads keep it apart from integers.
struct Half {
  uint16_t bits;
};

template <typename To, typename From>
IVE_BODY To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Round to nearest even, overflow to infinity, subnormals kept. Branch-free on the host, so that
// the loops it stands in are vectorised on every instruction set: adding 2^k to the magnitude makes
// the float adder itself do the rounding (the scheme of Maratyszcza's FP16 library).
IVE_BODY Half to_half(float value) {
#ifdef __CUDA_ARCH__
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t twice = bits << 1;
  const float magnitude = bit_cast<float>(bits ^ sign);
  const uint32_t exponent = twice & 0xff000000u;
  const uint32_t bias = exponent > 0x71000000u ? exponent : 0x71000000u;
  const float scaled = magnitude * 0x1p+112f * 0x1p-110f;
  const uint32_t rounded = bit_cast<uint32_t>(bit_cast<float>((bias >> 1) + 0x07800000u) + scaled);
  const uint32_t finite = ((rounded >> 13) & 0x7c00u) + (rounded & 0x0fffu);
  return Half{static_cast<uint16_t>((sign >> 16) | (twice > 0xff000000u ? 0x7e00u : finite))};
#endif
}

IVE_BODY float to_float(Half half) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(half.bits));
#else
  const uint32_t wide = static_cast<uint32_t>(half.bits) << 16;
  const uint32_t sign = wide & 0x80000000u;
  const uint32_t twice = wide + wide;
  const float normal = bit_cast<float>((twice >> 4) + (0xe0u << 23)) * 0x1p-112f;
  const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(twice < (1u << 27) ? subnormal : normal));
#endif
}

IVE_BODY float to_float(float value) { return value; }

// Largest grid in y and z that every CUDA device takes; bodies stride beyond it.
constexpr int64_t kMaxGridYZ = 65535;

struct LaunchShape {
  int64_t x, y, z;  // blocks
  int32_t threads;  // per block
};

IVE_BODY int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

}  // namespace ive
