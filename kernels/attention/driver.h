// One pass: which path takes it, and how it is cut into tasks that may run side by side.
#pragma once

#include <atomic>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>

#include "../operators/paths.h"
#include "plain.h"
#if defined(__x86_64__)
#include "avx2.h"
#include "avx512.h"
#elif defined(__aarch64__)
#include "neon.h"
#endif

namespace ive::attention {

// The fastest first.
constexpr Path kPaths[] = {
#if defined(__x86_64__)
    avx512::kPath, avx2::kPath,
#elif defined(__aarch64__)
    neon::kPath,
#endif
    plain::kPath};

inline const Path& best_path() { return *path_at(kPaths, 0); }

// What is wrong with the sequences of a pass, or null.
inline const char* wrong_sequences(const Pass& p) {
  int64_t rows = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const Sequence s = p.sequence(i);
    if (s.first != rows || s.rows < 1) return "sequences are not one after the other";
    if (s.cached < 0 || s.capacity - s.cached < s.rows) return "a cache has no room for its rows";
    if (s.keys == nullptr || s.values == nullptr) return "a cache has no address";
    rows += s.rows;
  }
  return rows == p.rows ? nullptr : "sequences are not all rows of the pass";
}

// Keys of a task where there are few lines: other tasks take other runs of them. What is summed
// depends on the sequence alone, not on others in the pass.
constexpr int64_t kRunKeys = 1024;

// Room for tasks that run at a time, taken and given back.
class Rooms {
 public:
  // Most that are in use at a time, and floats of each.
  bool allocate(int64_t most, int64_t floats) {
    floats_ = floats;
    all_.reset(new (std::nothrow) std::unique_ptr<float[]>[most]);
    free_.reset(new (std::nothrow) float*[most]);
    return all_ != nullptr && free_ != nullptr;
  }

  float* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_count_ > 0) return free_[--free_count_];
    float* made = new (std::nothrow) float[floats_];
    if (made != nullptr) all_[count_++].reset(made);
    return made;
  }

  void give(float* room) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[free_count_++] = room;
  }

 private:
  std::mutex mutex_;
  std::unique_ptr<std::unique_ptr<float[]>[]> all_;
  std::unique_ptr<float*[]> free_;
  int64_t count_ = 0, free_count_ = 0, floats_ = 0;
};

class Work {
 public:
  Work(const Pass& pass, const Path& path) : p_(pass), path_(path) {}

  // False where there is no memory. Sequences must be right.
  bool allocate() {
    int64_t partials = 0, lines = 0;
    for (int64_t i = 0; i < p_.count; ++i) {
      const Cut cut(*this, p_.sequence(i));
      count_ += p_.kv_heads * cut.tiles * cut.runs;
      if (cut.runs > 1) partials += p_.kv_heads * cut.runs * cut.lines * partial_floats(p_);
      lines = cut.lines > lines ? cut.lines : lines;
    }
    lines = lines < path_.lines ? lines : path_.lines;
    tasks_.reset(new (std::nothrow) Task[count_]);
    partials_.reset(new (std::nothrow) float[partials]);
    if (tasks_ == nullptr || partials_ == nullptr) return false;
    if (!rooms_.allocate(count_, path_.room(p_, lines))) return false;
    cut();
    return true;
  }

  // Tasks of the passes; each must be done before the next begins.
  int64_t appends() const { return p_.rows; }
  int64_t tasks() const { return count_; }
  int64_t merges() const { return partials_ == nullptr ? 0 : count_; }

  void append(int64_t row) const {
    for (int64_t i = 0; i < p_.count; ++i) {
      const Sequence s = p_.sequence(i);
      if (row < s.first + s.rows) return path_.append(p_, s, row - s.first);
    }
  }

  void attend(int64_t task) {
    float* room = rooms_.take();
    if (room == nullptr) {
      failed_ = true;
      return;
    }
    path_.attend(p_, tasks_[task], room);
    rooms_.give(room);
  }

  // Whether there was no memory for a task.
  bool failed() const { return failed_; }

  void merge(int64_t task) const {
    const Task& first = tasks_[task];
    if (first.partial == nullptr || first.key != 0) return;
    const Sequence s = p_.sequence(first.sequence);
    path_.merge(p_, &first, ceil_div(s.total(), kRunKeys));
  }

 private:
  // How one sequence is cut: lines into tiles, or keys into runs.
  struct Cut {
    Cut(const Work& work, const Sequence& s)
        : lines(s.rows * work.p_.group()),
          tiles(ceil_div(lines, work.path_.lines)),
          runs(tiles > 1 ? 1 : ceil_div(s.total(), kRunKeys)) {}
    int64_t lines, tiles, runs;
  };

  static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

  void cut() {
    Task* task = tasks_.get();
    float* partial = partials_.get();
    for (int64_t i = 0; i < p_.count; ++i) {
      const Sequence s = p_.sequence(i);
      const Cut cut(*this, s);
      for (int64_t head = 0; head < p_.kv_heads; ++head) {
        for (int64_t line = 0; line < cut.lines; line += path_.lines) {
          const int64_t left = cut.lines - line, lines = left < path_.lines ? left : path_.lines;
          const int64_t seen = s.cached + (line + lines - 1) / p_.group() + 1;
          for (int64_t run = 0; run < cut.runs; ++run, ++task) {
            const int64_t key = run * kRunKeys;
            const int64_t keys = cut.runs > 1 && run + 1 < cut.runs ? kRunKeys : seen - key;
            *task = {i, head, line, lines, key, keys, cut.runs > 1 ? partial : nullptr};
            if (cut.runs > 1) partial += lines * partial_floats(p_);
          }
        }
      }
    }
  }

  const Pass& p_;
  const Path& path_;
  int64_t count_ = 0;
  std::unique_ptr<Task[]> tasks_;
  std::unique_ptr<float[]> partials_;
  Rooms rooms_;
  std::atomic<bool> failed_{false};
};

}  // namespace ive::attention
