// Few lines, which nothing is transposed or widened for: included by vectors.h, in its place.

// Vectors of a row of values that are summed at a time, and most lines that take this form.
constexpr int kFewVectors = 4, kMostFew = 8;

inline bool is_few(const Pass& p, int64_t lines) {
  return lines <= kMostFew && p.head % (kLanes * kFewVectors) == 0;
}

// Lines that go through the cache together, of at most kMostFew: as many as have room in registers.
inline int64_t few_at_a_time(int64_t lines) { return lines <= kFewLines ? lines : (lines + 1) / 2; }

// Scores of R lines with keys, four at a time.
template <Kind kKind, int R>
IVE_TARGET void score_few(const float* queries, const char* keys, int64_t head, int64_t count,
                          float* scores) {
  const int64_t apart = head * bytes_of(kKind);
  for (int64_t key = 0; key < count; key += 4) {
    const char* rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = keys + (key + i < count ? key + i : count - 1) * apart;
    Vec sums[R][4] = {};
    for (int64_t d = 0; d < head; d += kLanes) {
      Vec values[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) values[i] = take<kKind>(rows[i] + d * bytes_of(kKind));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec query = load(queries + r * kQueryApart + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = fma(query, values[i], sums[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) sum_four(sums[r], scores + r * kScoreApart + key);
  }
}

// Adds values by the weights of R lines.
template <Kind kKind, int R>
IVE_TARGET void add_few(const float* weights, const char* values, int64_t head, int64_t count,
                        float* sums, bool more) {
  const int64_t apart = head * bytes_of(kKind);
  for (int64_t d = 0; d < head; d += kLanes * kFewVectors) {
    Vec added[R][kFewVectors];
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kFewVectors; ++v) {
        added[r][v] = more ? load(sums + r * head + d + v * kLanes) : all(0);
      }
    }
    const char* row = values + d * bytes_of(kKind);
    for (int64_t key = 0; key < count; ++key, row += apart) {
      Vec value[kFewVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kFewVectors; ++v)
        value[v] = take<kKind>(row + v * kLanes * bytes_of(kKind));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const Vec weight = all(weights[r * kScoreApart + key]);
#pragma GCC unroll 4
        for (int v = 0; v < kFewVectors; ++v) added[r][v] = fma(weight, value[v], added[r][v]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kFewVectors; ++v) store(sums + r * head + d + v * kLanes, added[r][v]);
    }
  }
}

struct Few {
  void (*score)(const float*, const char*, int64_t, int64_t, float*);
  void (*add)(const float*, const char*, int64_t, int64_t, float*, bool);
};

template <Kind kKind, int R = kFewLines>
Few few_of(int64_t lines) {
  if constexpr (R > 1) {
    if (lines < R) return few_of<kKind, R - 1>(lines);
  }
  return {score_few<kKind, R>, add_few<kKind, R>};
}

inline Few few_of(Kind kind, int64_t lines) {
  return kind == kFloat  ? few_of<kFloat>(lines)
         : kind == kHalf ? few_of<kHalf>(lines)
                         : few_of<kInt8>(lines);
}
