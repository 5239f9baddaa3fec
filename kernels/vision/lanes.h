// Sixteen floats at a time, in as many registers of a path as they take; included once for each
// path, inside its namespace, after kWidth and IVE_TARGET. No multiplication is fused with an
// addition, and what is added up is so by lane: each result is the same bits on every path.

using Native = float __attribute__((vector_size(4 * kWidth)));
using NativeInt = int32_t __attribute__((vector_size(4 * kWidth)));

constexpr int kParts = kLanes / kWidth;

struct Floats {
  Native part[kParts];
};

struct Ints {
  NativeInt part[kParts];
};

#define IVE_LANEWISE(operation)                                                       \
  IVE_TARGET IVE_INLINE Floats operator operation(const Floats& a, const Floats& b) { \
    Floats made;                                                                      \
    for (int i = 0; i < kParts; ++i) made.part[i] = a.part[i] operation b.part[i];    \
    return made;                                                                      \
  }
IVE_LANEWISE(+)
IVE_LANEWISE(-)
IVE_LANEWISE(*)
IVE_LANEWISE(/)
#undef IVE_LANEWISE

IVE_TARGET IVE_INLINE Floats all(float value) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = value - Native{};
  return made;
}

IVE_TARGET IVE_INLINE Floats load(const float* from) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) std::memcpy(&made.part[i], from + i * kWidth, sizeof(Native));
  return made;
}

IVE_TARGET IVE_INLINE void store(float* to, const Floats& values) {
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) std::memcpy(to + i * kWidth, &values.part[i], sizeof(Native));
}

// The first `left` floats, zeros after them.
IVE_TARGET IVE_INLINE Floats load(const float* from, int64_t left) {
  if (left >= kLanes) return load(from);
  float room[kLanes] = {};
  std::memcpy(room, from, left * sizeof(float));
  return load(room);
}

IVE_TARGET IVE_INLINE void store(float* to, const Floats& values, int64_t left) {
  if (left >= kLanes) return store(to, values);
  float room[kLanes];
  store(room, values);
  std::memcpy(to, room, left * sizeof(float));
}

IVE_TARGET IVE_INLINE Ints bits(const Floats& values) {
  Ints made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = reinterpret_cast<NativeInt>(values.part[i]);
  return made;
}

IVE_TARGET IVE_INLINE Floats floats(const Ints& bits) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = reinterpret_cast<Native>(bits.part[i]);
  return made;
}

IVE_TARGET IVE_INLINE Floats converted(const Ints& values) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = __builtin_convertvector(values.part[i], Native);
  return made;
}

IVE_TARGET IVE_INLINE Floats larger(const Floats& a, const Floats& b) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = a.part[i] > b.part[i] ? a.part[i] : b.part[i];
  return made;
}

IVE_TARGET IVE_INLINE Floats smaller(const Floats& a, const Floats& b) {
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] = a.part[i] < b.part[i] ? a.part[i] : b.part[i];
  return made;
}

IVE_TARGET IVE_INLINE Floats absolute(const Floats& values) {
  Ints made = bits(values);
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] &= 0x7fffffff;
  return floats(made);
}

// Sums and maxima over the lanes, always in the same order.
IVE_TARGET IVE_INLINE float total(const Floats& values) {
  float lane[kLanes];
  store(lane, values);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] + lane[i + half];
  }
  return lane[0];
}

IVE_TARGET IVE_INLINE float largest(const Floats& values) {
  float lane[kLanes];
  store(lane, values);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  }
  return lane[0];
}

// 1.5 * 2^23: adding it to less than 2^22 rounds to the nearest integer, halves to even ones.
constexpr float kShift = 12582912.f;
constexpr int32_t kShiftBits = 0x4b400000;

IVE_TARGET IVE_INLINE Ints nearest(const Floats& values) {
  Ints made = bits(values + all(kShift));
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) made.part[i] -= kShiftBits;
  return made;
}

// e to the power of x, which is at most 88; below -87 as of that. Cody and Waite's reduction, and
// the polynomial of Cephes.
IVE_TARGET IVE_INLINE Floats exponential(const Floats& x) {
  const Floats bounded = larger(x, all(-87.f));
  const Floats shifted = bounded * all(1.44269504088896341f) + all(kShift);
  const Floats whole = shifted - all(kShift);
  Floats rest = bounded - whole * all(0.693359375f);
  rest = rest - whole * all(-2.12194440e-4f);
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f,
                              1.6666665459e-1f, 5.0000001201e-1f};
  Floats sum = all(1.9875691500e-4f);
  for (const float term : kTerms) sum = sum * rest + all(term);
  sum = sum * (rest * rest) + rest + all(1.f);
  Ints power = bits(sum);
  const Ints exponent = bits(shifted);
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) power.part[i] += (exponent.part[i] - kShiftBits) << 23;
  return floats(power);
}

// What is left of the normal distribution beyond |x| on both sides, 1 - erf(|x| / sqrt(2)):
// Abramowitz and Stegun, 7.1.26.
IVE_TARGET IVE_INLINE Floats tail(const Floats& x) {
  const Floats size = absolute(x);
  const Floats t = all(1.f) / (all(1.f) + size * all(0.231641888f));  // 0.3275911 / sqrt(2)
  constexpr float kTerms[] = {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  Floats sum = all(1.061405429f);
  for (const float term : kTerms) sum = sum * t + all(term);
  return sum * t * exponential(all(-0.5f) * (size * size));
}

IVE_TARGET IVE_INLINE Floats gelu(const Floats& x) {
  const Floats half = x * all(0.5f) * tail(x);
  Floats made;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    made.part[i] = x.part[i] > 0.f ? x.part[i] - half.part[i] : half.part[i];
  }
  return made;
}

// Rounds to bytes as QuantizeLinear does.
IVE_TARGET IVE_INLINE void store_rounded(uint8_t* to, const Floats& values, const Rounding& r,
                                         int64_t left) {
  const Floats low = all(static_cast<float>(-r.zero)), high = all(static_cast<float>(255 - r.zero));
  const Ints whole = nearest(smaller(larger(values / all(r.scale), low), high));
  using Bytes = uint8_t __attribute__((vector_size(kWidth)));
  uint8_t room[kLanes];
  uint8_t* place = left >= kLanes ? to : room;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Bytes bytes = __builtin_convertvector(whole.part[i] + r.zero, Bytes);
    std::memcpy(place + i * kWidth, &bytes, sizeof bytes);
  }
  if (left < kLanes) std::memcpy(to, room, left);
}

// Sixteen results of a row from column `at` on, as floats or, times their factors, as bytes.
IVE_TARGET IVE_INLINE void store(const Output& out, int64_t row, int64_t at, const Floats& values,
                                 int64_t left) {
  const int64_t place = row * out.apart + at;
  if (out.bytes == nullptr) return store(out.floats + place, values, left);
  const float* factors = out.rounding.factors;
  const Floats scaled = factors == nullptr ? values : values * load(factors + at, left);
  store_rounded(out.bytes + place, scaled, out.rounding, left);
}

IVE_TARGET IVE_INLINE void store_short(int16_t* to, const Ints& values) {
  using Shorts = int16_t __attribute__((vector_size(2 * kWidth)));
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    const Shorts shorts = __builtin_convertvector(values.part[i], Shorts);
    std::memcpy(to + i * kWidth, &shorts, sizeof shorts);
  }
}

// Pairs of the numbers that stand at the same place in two runs of 16.
IVE_TARGET IVE_INLINE void interleave(int16_t* to, const int16_t* a, const int16_t* b) {
  for (int i = 0; i < kLanes; ++i) {
    to[2 * i] = a[i];
    to[2 * i + 1] = b[i];
  }
}

// The factor by which a norm of root mean squares scales a row.
IVE_TARGET IVE_INLINE float inverse_rms(const float* x, int64_t width, float epsilon) {
  Floats sum = all(0.f);
  for (int64_t i = 0; i < width; i += kLanes) {
    const Floats v = load(x + i, width - i);
    sum = sum + v * v;
  }
  return 1.f / std::sqrt(total(sum) / static_cast<float>(width) + epsilon);
}
