// Turns of passes over tokens and of pictures that are encoded beside them: both use all cores, and
// a token that is waited for must not wait for a picture.
#pragma once

#include <chrono>
#include <condition_variable>
#include <mutex>

namespace ive {

// Operators of a picture's pass rest while tokens are run; a pass over tokens begins when all rest.
// Between two of these passes a picture has a share of the time, and gets on by a step at least.
class Turns {
 public:
  // Nobody waits longer for another. A pass that is not over by then has been left by an interrupt,
  // or is one for which pictures should not stop.
  static constexpr double kLongest = 2;

  // Around a pass over tiles, by whoever cannot be interrupted.
  void begin_tiles() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++under_way_;
  }
  void end_tiles() {
    const std::lock_guard<std::mutex> lock(mutex_);
    --under_way_;
    changed_.notify_all();
  }

  // At the beginning of an operator of a picture's, and in the middle of it. Whether tokens were
  // run lately.
  bool rest() {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto free = [this] { return passes_ == 0 && wanted_ == 0; };
    if (!free()) {
      ++resting_;
      changed_.notify_all();
      if (!changed_.wait_for(lock, seconds(kLongest), free)) passes_ = 0;
      --resting_;
      changed_.notify_all();
    }
    return Clock::now() - left_ < seconds(kLongest);
  }

  // Before a pass over tokens: pictures have had so many seconds since the last one, and rest now.
  // Returns how long their operators took for that; below 0: there are none.
  double enter(double share) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto none = [this] { return under_way_ == 0; };
    // Who rested through another's pass goes first.
    changed_.wait_for(lock, seconds(kLongest), [this] { return resting_ == 0; });
    share = share < kLongest ? share : kLongest;
    changed_.wait_until(lock, left_ + seconds(share), none);
    const auto asked = Clock::now();
    ++wanted_;
    changed_.wait_for(lock, seconds(kLongest), [this] { return resting_ >= under_way_; });
    --wanted_, ++passes_;
    if (none()) return -1;
    return std::chrono::duration<double>(Clock::now() - asked).count();
  }
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (passes_ > 0) --passes_;
    left_ = Clock::now();
    changed_.notify_all();
  }

 private:
  using Clock = std::chrono::steady_clock;

  static Clock::duration seconds(double count) {
    return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(count));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  int under_way_ = 0;         // passes over tiles
  int resting_ = 0;           // of their operators
  int wanted_ = 0;            // passes over tokens that wait for them
  int passes_ = 0;            // that run
  Clock::time_point left_{};  // by the last pass
};

// The turns of this process.
Turns& turns();

// What operators of a picture's do; see `ort::Call`.
inline bool rest() { return turns().rest(); }

}  // namespace ive
