// Which paths of a kernel run on this CPU.
#pragma once

#include <cstdint>
#include <iterator>

namespace ive {

// The path of that index among those that run here, the fastest first; null past the last.
template <typename Paths>
auto path_at(const Paths& paths, int32_t index) -> decltype(&*std::begin(paths)) {
  for (const auto& path : paths) {
    if (path.runs_here() && index-- == 0) return &path;
  }
  return nullptr;
}

template <typename Paths>
const char* path_name(const Paths& paths, int32_t index) {
  const auto* path = path_at(paths, index);
  return path == nullptr ? nullptr : path->name;
}

}  // namespace ive
