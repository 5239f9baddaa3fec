// Attention by integer products; included once for each path, after lanes.h.

// Rounds a head's part of a row, normed where there is a weight; returns its scale. Rows whose
// largest value is below 2^-118 count as zero; one that is not finite has scale NaN.
IVE_TARGET IVE_INLINE float round_head(const float* x, const float* weight, float factor,
                                       int64_t size, int16_t* to) {
  alignas(64) float room[kMostSize];
  Floats top = all(0.f);
  for (int64_t i = 0; i < size; i += kLanes) {
    Floats v = load(x + i, size - i);
    if (weight != nullptr) v = v * all(factor) * load(weight + i, size - i);
    store(room + i, v);
    // The bits of absolute values stand in the order of the values.
    const Ints a = bits(absolute(v)), b = bits(top);
    Ints higher;
    for (int j = 0; j < kParts; ++j) {
      higher.part[j] = a.part[j] > b.part[j] ? a.part[j] : b.part[j];
    }
    top = floats(higher);
  }
  float lane[kLanes];
  store(lane, top);
  int32_t high = 0;
  for (const float& one : lane) {
    int32_t place;
    std::memcpy(&place, &one, sizeof place);
    high = place > high ? place : high;
  }
  constexpr int32_t kInfinity = 0x7f800000, kLeast = 0x04800000;  // kLeast: 2^-118
  const bool used = high >= kLeast && high < kInfinity;
  float most = 0;
  std::memcpy(&most, &high, sizeof most);
  const float scale = used ? kLargest / most : 0.f;
  for (int64_t i = 0; i < size; i += kLanes) {
    const Ints whole = nearest(used ? load(room + i) * all(scale) : all(0.f));
    store_short(to + i, whole);
  }
  if (used) return most / kLargest;
  return high < kLeast ? 0.f : std::numeric_limits<float>::quiet_NaN();
}

// Sixteen tokens of a tile, those beyond the last as zeros.
IVE_TARGET inline void pack_run(const Attention& a, const Packed& p, int64_t tile, int64_t run) {
  const int64_t width = a.width(), padded = round_up(a.size, kLanes);
  float factors[2][kLanes] = {};
  const int64_t first = run * kLanes;
  const int64_t given = std::min<int64_t>(kLanes, a.tokens - first);
  const int64_t origin = (tile * a.tokens + first) * width;
  for (int64_t r = 0; r < given && a.query_weight != nullptr; ++r) {
    factors[0][r] = inverse_rms(a.query + origin + r * width, width, a.epsilon);
  }
  for (int64_t r = 0; r < given && a.key_weight != nullptr; ++r) {
    factors[1][r] = inverse_rms(a.key + origin + r * width, width, a.epsilon);
  }
  for (int64_t h = 0; h < a.heads; ++h) {
    const float* query_weight = a.query_weight == nullptr ? nullptr : a.query_weight + h * a.size;
    const float* key_weight = a.key_weight == nullptr ? nullptr : a.key_weight + h * a.size;
    alignas(64) int16_t keys[kLanes][kMostSize], values[kLanes][kMostSize];
    for (int r = 0; r < kLanes; ++r) {
      std::memset(keys[r], 0, p.size * sizeof(int16_t));
      std::memset(values[r], 0, p.size * sizeof(int16_t));
    }
    float* scales[] = {p.query_scales.get(), p.key_scales.get(), p.value_scales.get()};
    for (float*& one : scales) one += h * p.tokens + first;
    for (int64_t r = 0; r < given; ++r) {
      const int64_t place = origin + r * width + h * a.size;
      int16_t* query = p.query(h, first + r);
      scales[0][r] = round_head(a.query + place, query_weight, factors[0][r], a.size, query);
      scales[1][r] = round_head(a.key + place, key_weight, factors[1][r], a.size, keys[r]);
      scales[2][r] = round_head(a.value + place, nullptr, 0, a.size, values[r]);
    }
    int16_t* to = p.key_run(h, run);
    for (int64_t pair = 0; pair < padded / 2; ++pair, to += 2 * kLanes) {
      for (int r = 0; r < kLanes; ++r) std::memcpy(to + 2 * r, keys[r] + 2 * pair, 4);
    }
    for (int64_t d = 0; d < p.size; d += kLanes) {
      int16_t* pairs = p.value_run(h, d) + first * kLanes;
      for (int r = 0; r < kLanes; r += 2, pairs += 2 * kLanes) {
        interleave(pairs, values[r] + d, values[r + 1] + d);
      }
    }
  }
}

// Sums of kRows rows and kBlocks runs of 16 columns.
constexpr int kColumns = kBlocks * kLanes;
using Sums = int32_t[kRows][kColumns];

// Products of kRows rows and runs of 16 columns, `apart` numbers apart. Rows are so by a constant,
// so that one register leads to all of them. GCC 12 keeps the sums in registers where they are a
// flat array of a function that does nothing else.
template <int64_t kApart>
IVE_TARGET __attribute__((noinline)) void multiply(const int16_t (&x)[kRows][kApart],
                                                   const int16_t* panel, int64_t apart,
                                                   int64_t count, Sums& results) {
  constexpr int kNatives = kBlocks * kParts, kSums = kRows * kNatives;
  NativeInt sums[kSums];
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) sums[i] = NativeInt{};
  for (int64_t k = 0; k < count; k += 2) {
    NativeInt columns[kNatives];
#pragma GCC unroll 4
    for (int i = 0; i < kNatives; ++i) {
      const int16_t* from = panel + i / kParts * apart + i % kParts * 2 * kWidth;
      std::memcpy(&columns[i], from + k * kLanes, sizeof columns[i]);
    }
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      int32_t pair;
      std::memcpy(&pair, &x[i / kNatives][k], sizeof pair);
      dot(sums[i], columns[i % kNatives], pair - NativeInt{});
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < kSums; ++i) {
    std::memcpy(&results[i / kNatives][i % kNatives * kWidth], &sums[i], sizeof sums[i]);
  }
}

IVE_TARGET IVE_INLINE Floats converted(const int32_t* sums) {
  Ints values;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) {
    std::memcpy(&values.part[i], sums + i * kWidth, sizeof(NativeInt));
  }
  return converted(values);
}

struct Queries {
  alignas(64) int16_t values[kRows][kMostSize];
  float scales[kRows];  // of the scores
};

IVE_TARGET IVE_INLINE void load(const Attention& a, const Packed& p, int64_t head, int64_t token,
                                Queries& queries) {
  const float shrink = 1.f / std::sqrt(static_cast<float>(a.size));
  const float* scales = p.query_scales.get() + head * p.tokens + token;
  for (int r = 0; r < kRows; ++r) {
    std::memcpy(queries.values[r], p.query(head, token + r), p.size * sizeof(int16_t));
    queries.scales[r] = scales[r] * shrink;
  }
}

// What is known of kRows queries after some of the keys: the largest score, the sum of the shares
// as of that, and the values weighted by them. What each row has one of stands in lanes.
struct Rows {
  alignas(64) float largest[kLanes];
  alignas(64) float sum[kLanes];
  alignas(64) float values[kRows][kMostSize];
};

// What the next keys make of that: by what it is multiplied before theirs are added, and the scale
// of their shares.
struct Step {
  alignas(64) float kept[kLanes];
  alignas(64) float scales[kLanes];
};

// Scores of kRows queries and `count` keys from `key` on.
IVE_TARGET IVE_INLINE void score(const Attention& a, const Packed& p, int64_t head, int64_t key,
                                 int64_t count, const Queries& queries,
                                 float (&scores)[kRows][kKeys]) {
  for (int64_t k = 0; k < count; k += kColumns) {
    alignas(64) Sums sums;
    multiply(queries.values, p.key_run(head, (key + k) / kLanes), p.size * kLanes,
             round_up(a.size, 2), sums);
    for (int b = 0; b < kColumns; b += kLanes) {
      const Floats scales = load(p.key_scales.get() + head * p.tokens + key + k + b);
      for (int r = 0; r < kRows; ++r) {
        store(&scores[r][k + b], converted(&sums[r][b]) * (scales * all(queries.scales[r])));
      }
    }
  }
}

// Sets the scores of keys beyond the last, and finds each row's largest.
IVE_TARGET IVE_INLINE void find_largest(int64_t given, int64_t count, float (&scores)[kRows][kKeys],
                                        Rows& rows, Step& step) {
  constexpr float kLeast = -3e38f;
  const Floats before = load(rows.largest);
  for (int r = 0; r < kRows; ++r) {
    for (int64_t k = given; k < count; ++k) scores[r][k] = kLeast;
    Floats most = all(rows.largest[r]);
    for (int64_t k = 0; k < count; k += kLanes) most = larger(load(&scores[r][k]), most);
    rows.largest[r] = largest(most);
  }
  store(step.kept, exponential(before - load(rows.largest)));
}

// Turns the scores of a row into shares times the scales of the values; returns their largest.
IVE_TARGET IVE_INLINE float weigh(const float* scales, int64_t given, int64_t count, float top,
                                  float* scores, float& sum) {
  Floats sums = all(0.f), high = all(0.f);
  const int64_t whole = given / kLanes * kLanes;
  for (int64_t k = 0; k < count; k += kLanes) {
    const Floats e = exponential(load(scores + k) - all(top));
    const Floats weighted = e * load(scales + k);
    high = larger(weighted, high);
    store(scores + k, weighted);
    if (k < whole) {
      sums = sums + e;
    } else {
      float lane[kLanes];
      store(lane, e);
      sums = sums + load(lane, given > k ? given - k : 0);
    }
  }
  sum = total(sums);
  return largest(high);
}

// Turns the scores of kRows queries into rounded shares. What is done once for each row is so for
// all of them together: one after the other they would wait for each step.
IVE_TARGET IVE_INLINE void share(const float* scales, int64_t given, int64_t count,
                                 float (&scores)[kRows][kKeys], Rows& rows, Step& step,
                                 int16_t (&shares)[kRows][kKeys]) {
  alignas(64) float sums[kLanes] = {}, factors[kLanes];
  find_largest(given, count, scores, rows, step);
  for (int r = 0; r < kRows; ++r) {
    step.scales[r] = weigh(scales, given, count, rows.largest[r], scores[r], sums[r]);
  }
  store(rows.sum, load(rows.sum) * load(step.kept) + load(sums));
  const Floats peaks = load(step.scales);
  store(factors, all(kLargestShare) / larger(peaks, all(1e-30f)));  // of zeros any will do
  store(step.scales, peaks / all(kLargestShare));
  for (int r = 0; r < kRows; ++r) {
    for (int64_t k = 0; k < count; k += kLanes) {
      store_short(&shares[r][k], nearest(load(&scores[r][k]) * all(factors[r])));
    }
  }
}

// Adds the values of `count` keys, weighted by their shares.
IVE_TARGET IVE_INLINE void add_values(const Packed& p, int64_t head, int64_t key, int64_t count,
                                      const int16_t (&shares)[kRows][kKeys], const Step& step,
                                      Rows& rows) {
  for (int64_t d = 0; d < p.size; d += kColumns) {
    alignas(64) Sums sums;
    multiply(shares, p.value_run(head, d) + key * kLanes, p.tokens * kLanes, count, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int b = 0; b < kColumns; b += kLanes) {
        float* values = &rows.values[r][d + b];
        const Floats before = load(values) * all(step.kept[r]);
        store(values, before + converted(&sums[r][b]) * all(step.scales[r]));
      }
    }
  }
}

// Zero; NaN where a key or a value of a head is not finite.
IVE_TARGET IVE_INLINE float damage(const Packed& p, int64_t head) {
  Floats sum = all(0.f);
  for (int64_t t = head * p.tokens; t < (head + 1) * p.tokens; t += kLanes) {
    sum = sum + load(p.key_scales.get() + t) * all(0.f) + load(p.value_scales.get() + t) * all(0.f);
  }
  return total(sum);
}

// kRows queries of a head from `token` on.
IVE_TARGET inline void attend_rows(const Attention& a, const Packed& p, int64_t tile, int64_t head,
                                   int64_t token, float damaged) {
  alignas(64) float scores[kRows][kKeys];
  alignas(64) int16_t shares[kRows][kKeys];
  Queries queries;
  load(a, p, head, token, queries);
  Rows rows;
  Step step = {};
  store(rows.largest, all(-1e38f));
  store(rows.sum, all(0.f));
  for (auto& values : rows.values) std::memset(values, 0, p.size * sizeof(float));
  for (int64_t key = 0; key < p.tokens; key += kKeys) {
    const int64_t count = std::min(kKeys, p.tokens - key);
    const float* scales = p.value_scales.get() + head * p.tokens + key;
    score(a, p, head, key, count, queries, scores);
    share(scales, std::min(count, a.tokens - key), count, scores, rows, step, shares);
    add_values(p, head, key, count, shares, step, rows);
  }
  for (int64_t r = 0; r < kRows && token + r < a.tokens; ++r) {
    const float scale = p.query_scales[head * p.tokens + token + r];
    const Floats factor = all(1.f / (rows.sum[r] + scale * 0.f + damaged));
    for (int64_t d = 0; d < a.size; d += kLanes) {
      store(a.out, tile * a.tokens + token + r, head * a.size + d,
            load(&rows.values[r][d]) * factor, a.size - d);
    }
  }
}

// Part of a head's queries.
IVE_TARGET inline void attend(const Attention& a, const Packed& p, int64_t tile, int64_t task) {
  const int64_t runs = round_up(a.tokens, kTaskTokens) / kTaskTokens;
  const int64_t head = task / runs, first = task % runs * kTaskTokens;
  const float damaged = damage(p, head);
  for (int64_t t = first; t < std::min(first + kTaskTokens, a.tokens); t += kRows) {
    attend_rows(a, p, tile, head, t, damaged);
  }
}
