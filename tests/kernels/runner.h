// What runners of products share: arrays from standard input, and the names of the paths.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <memory>

// An array that ends where its heap block ends; one that is too short, one element too early.
template <typename T>
std::unique_ptr<T[]> read(int64_t count, bool too_short = false) {
  if (too_short) --count;
  std::unique_ptr<T[]> array(new T[count]);
  const auto wanted = static_cast<size_t>(count);
  if (std::fread(array.get(), sizeof(T), wanted, stdin) != wanted) std::exit(3);
  return array;
}

// Prints the names of the paths that run here, in a line.
template <typename Paths>
void print_names(const Paths& paths) {
  const char* between = "";
  for (const auto& path : paths) {
    if (!path.runs_here()) continue;
    std::printf("%s%s", between, path.name);
    between = ",";
  }
  std::printf("\n");
}
