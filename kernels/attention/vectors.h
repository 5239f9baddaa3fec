// Tasks in vectors: included once for each kind of CPU, in its namespace, where there are
//   IVE_TARGET  the attribute of its functions
//   kLanes, kRows, kColumns, kFewLines  of a vector; of a tile of products: lines, and columns in
//     vectors; of few lines
//   all, fma, take, sum_four, widen, narrow, transpose  see plain.h
// GCC turns vectors into instructions before it inlines: so templates of a width would not do.

constexpr int kVectors = kColumns / kLanes;
constexpr int64_t kBlock = 128;     // keys at a time: their weights and values stay near
constexpr int64_t kTaskLines = 96;  // lines that share what is read of the cache
// Floats between lines: known, so that they need one register; no power of two, for the cache.
constexpr int64_t kQueryApart = kMostHead + 16, kScoreApart = kBlock + 16;
static_assert(kBlock % kColumns == 0 && kTaskLines % kRows == 0, "tiles fill blocks and tasks");

typedef float Loose __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

IVE_TARGET IVE_INLINE Vec load(const float* from) { return *reinterpret_cast<const Loose*>(from); }

IVE_TARGET IVE_INLINE void store(float* to, Vec values) { *reinterpret_cast<Loose*>(to) = values; }

// Adds a (R lines, A floats apart) times b (depth, columns) to c, or puts it there.
template <int R, int64_t A>
IVE_TARGET void product(const float* a, const float* b, int64_t b_apart, int64_t depth, float* c,
                        int64_t c_apart, bool add) {
  Vec sums[R][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = add ? load(c + r * c_apart + v * kLanes) : all(0);
    }
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k, ++a, b += b_apart) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const Vec factor = all(a[r * A]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(factor, row[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c + r * c_apart + v * kLanes, sums[r][v]);
  }
}

template <int64_t A, int R = kRows>
IVE_TARGET void products(int64_t lines, const float* a, const float* b, int64_t b_apart,
                         int64_t depth, float* c, int64_t c_apart, bool add) {
  if (lines == R) return product<R, A>(a, b, b_apart, depth, c, c_apart, add);
  if constexpr (R > 1) products<A, R - 1>(lines, a, b, b_apart, depth, c, c_apart, add);
}

#include "few.h"

// e to the power of what is not above zero; of what is not a number, that.
IVE_TARGET IVE_INLINE Vec power(Vec x) {
  const Vec least = all(-87.3f), shift = all(12582912.f);  // adding 1.5 * 2^23 rounds
  const Vec shifted = fma(x, all(1.44269504f), shift), whole = shifted - shift;
  Vec left = fma(whole, all(-0.693359375f), x);
  left = fma(whole, all(2.12194440e-4f), left);
  Vec sum = fma(all(1.9875691500e-4f), left, all(1.3981999507e-3f));
  sum = fma(sum, left, all(8.3334519073e-3f));
  sum = fma(sum, left, all(4.1665795894e-2f));
  sum = fma(sum, left, all(1.6666665459e-1f));
  sum = fma(sum, left, all(5.0000001201e-1f));
  sum = fma(sum * left, left, left) + all(1);
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < least ? all(0) : sum * scale;
}

IVE_TARGET IVE_INLINE float largest_of(Vec values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i)
      lanes[i] = lanes[i + step] > lanes[i] ? lanes[i + step] : lanes[i];
  }
  return lanes[0];
}

IVE_TARGET IVE_INLINE float sum_of(Vec values) {
  float lanes[kLanes];
  store(lanes, values);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

IVE_TARGET IVE_INLINE float power(float x) { return power(all(x))[0]; }

// Of a line: the largest score so far, and the sum of weights relative to that.
struct Running {
  float largest = -__builtin_inff(), sum = 0;
};

// Turns the scores that a line sees into weights, others into none; returns the factor of what
// was summed by weights before.
IVE_TARGET inline float soften(float* scores, int64_t seen, int64_t count, Running& running) {
  if (seen == 0) {
    std::memset(scores, 0, count * sizeof(float));
    return 1;
  }
  const int64_t end = (seen + kLanes - 1) / kLanes * kLanes;
  for (int64_t i = seen; i < end; ++i) scores[i] = -__builtin_inff();
  Vec top = load(scores);
  for (int64_t i = kLanes; i < end; i += kLanes) {
    const Vec next = load(scores + i);
    top = next > top ? next : top;
  }
  const float found = largest_of(top);
  const float largest = found > running.largest ? found : running.largest;
  const float factor = power(running.largest - largest);
  Vec sums = all(0);
  for (int64_t i = 0; i < end; i += kLanes) {
    const Vec weights = power(load(scores + i) - all(largest));
    store(scores + i, weights);
    sums += weights;
  }
  if (end < count) std::memset(scores + end, 0, (count - end) * sizeof(float));
  running = {largest, running.sum * factor + sum_of(sums)};
  return factor;
}

// Turns both halves of a head by the angles of its row.
IVE_TARGET inline void rotate(const Pass& p, int64_t row, float* head) {
  if (p.cos == nullptr) return;
  const int64_t half = p.head / 2;
  float cos[kMostHead / 2], sin[kMostHead / 2];
  widen(value_at(p.cos, p.given, row * half), p.given, cos, half);
  widen(value_at(p.sin, p.given, row * half), p.given, sin, half);
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// Writes keys and values of a row of a sequence into its cache.
IVE_TARGET inline void append(const Pass& p, const Sequence& s, int64_t row) {
  float head[kMostHead];
  const int64_t from = s.first + row;
  for (int64_t h = 0; h < p.kv_heads; ++h) {
    const int64_t place = (h * s.capacity + s.cached + row) * p.head * bytes_of(p.cached);
    widen(value_at(p.key, p.given, from * p.key_apart + h * p.head), p.given, head, p.head);
    rotate(p, from, head);
    narrow(head, p.key_scales == nullptr ? nullptr : p.key_scales + h * p.head, p.cached,
           s.keys + place, p.head);
    widen(value_at(p.value, p.given, from * p.value_apart + h * p.head), p.given, head, p.head);
    narrow(head, p.value_scales == nullptr ? nullptr : p.value_scales + h * p.head, p.cached,
           s.values + place, p.head);
  }
}

// Floats of a head's values in columns of tiles.
inline int64_t padded(int64_t head) { return (head + kColumns - 1) / kColumns * kColumns; }

// Floats that a task needs.
inline int64_t room_of(const Pass& p, int64_t lines) {
  const int64_t width = padded(p.head);
  const bool whole = is_few(p, lines) || (p.cached == kFloat && width == p.head);
  return lines * (kQueryApart + kScoreApart + width) + kColumns * p.head +
         (whole ? 0 : kBlock * width);
}

// Writes a head of a row: a sum by weights over their sum.
IVE_TARGET inline void give(const Pass& p, int64_t row, int64_t head, float* sums, float weights) {
  const float* scales = p.value_scales;
  if (scales != nullptr) scales += head / p.group() * p.head;
  for (int64_t i = 0; i < p.head; ++i) {
    sums[i] = sums[i] / weights * (scales == nullptr ? 1 : scales[i]);
  }
  char* to = static_cast<char*>(p.out) + (row * p.heads + head) * p.head * bytes_of(p.given);
  narrow(sums, nullptr, p.given, to, p.head);
}

class Attending {
 public:
  IVE_TARGET Attending(const Pass& pass, const Task& task, float* room)
      : p_(pass),
        t_(task),
        s_(pass.sequence(task.sequence)),
        width_(padded(pass.head)),
        few_(is_few(pass, task.lines)) {
    queries_ = room;
    scores_ = queries_ + t_.lines * kQueryApart;
    sums_ = scores_ + t_.lines * kScoreApart;
    panel_ = sums_ + t_.lines * width_;
    wide_ = panel_ + kColumns * p_.head;
  }

  IVE_TARGET void run() {
    for (int64_t line = 0; line < t_.lines; ++line) query(line);
    for (int64_t done = 0; done < t_.keys; done += kBlock) {
      const int64_t key = t_.key + done;
      const int64_t count = t_.keys - done < kBlock ? t_.keys - done : kBlock;
      score_block(key, count);
      for (int64_t line = 0; line < t_.lines; ++line) weigh(line, key, count);
      add(key, count, done > 0);
    }
    for (int64_t line = 0; line < t_.lines; ++line) finish(line);
  }

 private:
  int64_t row(int64_t line) const { return (t_.line + line) / p_.group(); }
  int64_t head(int64_t line) const {
    return t_.kv_head * p_.group() + (t_.line + line) % p_.group();
  }
  const char* cached(const char* of, int64_t key) const {
    return value_at(of, p_.cached, (t_.kv_head * s_.capacity + key) * p_.head);
  }

  IVE_TARGET void query(int64_t line) {
    float* to = queries_ + line * kQueryApart;
    const int64_t from = s_.first + row(line);
    widen(value_at(p_.query, p_.given, from * p_.query_apart + head(line) * p_.head), p_.given, to,
          p_.head);
    rotate(p_, from, to);
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(p_.head));
    const float* scales = p_.key_scales;
    for (int64_t i = 0; i < p_.head; ++i) {
      to[i] *= scales == nullptr ? scale : scale * scales[t_.kv_head * p_.head + i];
    }
  }

  IVE_TARGET void score_block(int64_t key, int64_t count) {
    if (few_) {
      return each_few([=](const Few& few, int64_t line) {
        few.score(queries_ + line * kQueryApart, cached(s_.keys, key), p_.head, count,
                  scores_ + line * kScoreApart);
      });
    }
    for (int64_t c = 0; c < count; c += kColumns) score(key + c, count - c, scores_ + c);
  }

  template <typename Function>
  void each_few(const Function& function) {
    const int64_t step = few_at_a_time(t_.lines);
    for (int64_t line = 0; line < t_.lines; line += step) {
      function(few_of(p_.cached, t_.lines - line < step ? t_.lines - line : step), line);
    }
  }

  // Scores of all lines with some keys, as many as a tile has columns.
  IVE_TARGET void score(int64_t key, int64_t left, float* scores) {
    const int64_t count = left < kColumns ? left : kColumns;
    const float* keys = reinterpret_cast<const float*>(cached(s_.keys, key));
    if (p_.cached != kFloat) {
      widen(cached(s_.keys, key), p_.cached, wide_, count * p_.head);
      keys = wide_;
    }
    transpose(keys, p_.head, static_cast<int>(count), panel_);
    for (int64_t line = 0; line < t_.lines; line += kRows) {
      products<kQueryApart>(group_of(line), queries_ + line * kQueryApart, panel_, kColumns,
                            p_.head, scores + line * kScoreApart, kScoreApart, false);
    }
  }

  IVE_TARGET void weigh(int64_t line, int64_t key, int64_t count) {
    int64_t seen = s_.cached + row(line) + 1 - key;
    seen = seen < 0 ? 0 : seen < count ? seen : count;
    const float factor = soften(scores_ + line * kScoreApart, seen, count, running_[line]);
    if (factor == 1) return;
    float* sums = sums_ + line * width_;
    if (factor == 0) return std::memset(sums, 0, width_ * sizeof(float)), void();
    for (int64_t i = 0; i < width_; i += kLanes) store(sums + i, load(sums + i) * all(factor));
  }

  // Adds values by their weights.
  IVE_TARGET void add(int64_t key, int64_t count, bool more) {
    const char* from = cached(s_.values, key);
    if (few_) {
      return each_few([=](const Few& few, int64_t line) {
        few.add(scores_ + line * kScoreApart, from, p_.head, count, sums_ + line * width_, more);
      });
    }
    const float* values = reinterpret_cast<const float*>(from);
    if (p_.cached != kFloat || width_ != p_.head) {
      for (int64_t i = 0; i < count; ++i) {
        widen(value_at(from, p_.cached, i * p_.head), p_.cached, wide_ + i * width_, p_.head);
        for (int64_t pad = p_.head; pad < width_; ++pad) wide_[i * width_ + pad] = 0;
      }
      values = wide_;
    }
    for (int64_t c = 0; c < width_; c += kColumns) {
      for (int64_t line = 0; line < t_.lines; line += kRows) {
        products<kScoreApart>(group_of(line), scores_ + line * kScoreApart, values + c, width_,
                              count, sums_ + line * width_ + c, width_, more);
      }
    }
  }

  IVE_TARGET void finish(int64_t line) {
    float* sums = sums_ + line * width_;
    const Running& running = running_[line];
    if (t_.partial != nullptr) {
      float* to = t_.partial + line * partial_floats(p_);
      std::memcpy(to, sums, p_.head * sizeof(float));
      to[p_.head] = running.largest, to[p_.head + 1] = running.sum;
      return;
    }
    give(p_, s_.first + row(line), head(line), sums, running.sum);
  }

  int64_t group_of(int64_t line) const { return t_.lines - line < kRows ? t_.lines - line : kRows; }

  const Pass& p_;
  const Task& t_;
  const Sequence s_;
  const int64_t width_;
  const bool few_;
  float *queries_, *scores_, *sums_, *panel_, *wide_;
  Running running_[kTaskLines];
};

IVE_TARGET inline void attend(const Pass& p, const Task& t, float* room) {
  Attending(p, t, room).run();
}

// Joins what `count` tasks over runs of the same sequence's keys have left.
IVE_TARGET inline void merge(const Pass& p, const Task* tasks, int64_t count) {
  const Task& t = tasks[0];
  for (int64_t line = 0; line < t.lines; ++line) {
    float sums[kMostHead] = {};
    Running joined;
    for (int64_t i = 0; i < count; ++i) {
      const float* from = tasks[i].partial + line * partial_floats(p);
      const float top = from[p.head];
      if (top > joined.largest) joined.largest = top;
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* from = tasks[i].partial + line * partial_floats(p);
      const float factor = power(from[p.head] - joined.largest);
      joined.sum += factor * from[p.head + 1];
      for (int64_t k = 0; k < p.head; ++k) sums[k] += factor * from[k];
    }
    const int64_t index = t.line + line, group = p.group();
    give(p, p.sequence(t.sequence).first + index / group, t.kv_head * group + index % group, sums,
         joined.sum);
  }
}

constexpr Path kPath = {kName, kTaskLines, runs_here, append, room_of, attend, merge};
