// Runs a vision tower's operations from standard input by every path of this CPU, without Python:
// under an emulator, or a sanitizer. Input, until it ends: the operation and seven numbers (int64),
// then its arrays; see test_vision_elsewhere.py. Output: the names of the paths, a line; then the
// results of each path. Every array ends where its heap block ends; with an argument, the last one
// an element too early.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "paths.h"

using namespace ive::vision;

enum Operation { kNorm, kGelu, kMultiply, kAttend, kIntegers };

bool too_short = false;

struct Array {
  std::unique_ptr<float[]> held;
  const float* get() const { return held.get(); }
};

Array read(int64_t count, bool given = true, bool last = false) {
  if (!given) return {};
  const auto wanted = static_cast<size_t>(count - (last && too_short ? 1 : 0));
  Array array{std::unique_ptr<float[]>(new float[wanted])};
  if (std::fread(array.held.get(), sizeof(float), wanted, stdin) != wanted) std::exit(3);
  return array;
}

// Room for results, rounded where there are factors, and what writes them out.
struct Results {
  Results(int64_t rows, int64_t columns, const float* factors) : count(rows * columns) {
    if (factors != nullptr) {
      bytes.reset(new uint8_t[count]);
    } else {
      floats.reset(new float[count]);
    }
    out = {floats.get(), bytes.get(), columns, {factors, 0.05f, 128}};
  }
  void write() const {
    for (int64_t i = 0; bytes != nullptr && i < count; ++i) std::putchar(bytes[i]);
    if (bytes == nullptr) std::fwrite(floats.get(), sizeof(float), count, stdout);
  }
  int64_t count;
  std::unique_ptr<float[]> floats;
  std::unique_ptr<uint8_t[]> bytes;
  Output out;
};

void norm(const Path& path, const int64_t (&n)[8], const std::vector<Array>& arrays) {
  const auto& [x, added, weight, bias, factors] = reinterpret_cast<const Array(&)[5]>(arrays[0]);
  const Results results(n[1], n[2], factors.get()), sums(n[1], n[2], nullptr);
  float* sum = added.get() == nullptr ? nullptr : sums.floats.get();
  const Norm given{x.get(), added.get(), sum,   weight.get(), bias.get(),
                   n[1],    n[2],        1e-6f, n[5] != 0,    results.out};
  for (int64_t row = 0; row < n[1]; ++row) path.norm_row(given, row);
  results.write();
}

void gelu(const Path& path, const int64_t (&n)[8], const std::vector<Array>& arrays) {
  const Results results(n[1], n[2], arrays[4].get());
  const Gelu given{arrays[0].get(), n[1], n[2], results.out};
  for (int64_t row = 0; row < n[1]; ++row) path.gelu_row(given, row);
  results.write();
}

void multiply(const Path& path, const int64_t (&n)[8], const std::vector<Array>& arrays) {
  const Results results(n[1], n[3], nullptr);
  const Product given{
      arrays[0].get(), arrays[2].get(), arrays[3].get(), results.floats.get(), n[1], n[2], n[3]};
  for (int64_t i = 0; i < product_tasks(given); ++i) path.multiply_columns(given, i);
  results.write();
}

void attend(const Path& path, const int64_t (&n)[8], const std::vector<Array>& arrays) {
  const Results results(n[1] * n[2], n[3] * n[4], arrays[5].get());
  const Attention given{arrays[0].get(),
                        arrays[1].get(),
                        arrays[2].get(),
                        arrays[3].get(),
                        arrays[4].get(),
                        n[1],
                        n[2],
                        n[3],
                        n[4],
                        1e-6f,
                        results.out};
  Packed packed;
  if (!packed.allocate(given)) std::exit(4);
  for (int64_t tile = 0; tile < given.tiles; ++tile) {
    for (int64_t i = 0; i < packings(packed); ++i) path.pack_run(given, packed, tile, i);
    for (int64_t i = 0; i < attendings(given); ++i) path.attend(given, packed, tile, i);
  }
  results.write();
}

// Bytes stand in arrays of floats, the last perhaps in part.
template <typename T>
std::unique_ptr<T[]> bytes_of(const Array& array, int64_t count) {
  std::unique_ptr<T[]> bytes(new T[count]);
  if (count > 0) std::memcpy(bytes.get(), array.get(), count * sizeof(T));
  return bytes;
}

void multiply_integers(const Path& path, const int64_t (&n)[8], const std::vector<Array>& arrays) {
  const Results results(n[1], n[3], arrays[4].get());
  const auto x = bytes_of<uint8_t>(arrays[0], n[1] * n[2] - too_short);
  const auto weight = bytes_of<int8_t>(arrays[1], n[3] * n[2]);
  const auto bias = bytes_of<int32_t>(arrays[3], n[6] != 0 ? n[3] : 0);
  const IntegerProduct given{
      x.get(),    weight.get(), arrays[2].get(), n[6] != 0 ? bias.get() : nullptr, n[1],
      n[2],       n[3],         0.03f,           static_cast<int32_t>(n[5]),       n[7] != 0,
      results.out};
  const Integers& how = path.integers;
  InputBlock inputs;
  if (!inputs.allocate(given, how.tile_rows, how.unit_inputs)) std::exit(4);
  while (inputs.next(given)) {
    for (int64_t i = 0; i < packings(how, inputs); ++i) how.pack(given, inputs, i);
    for (int64_t i = 0; i < product_tasks(given); ++i) how.multiply(given, inputs, i);
  }
  results.write();
}

// The last two or three numbers say which arrays there are.
std::vector<Array> arrays_of(const int64_t (&n)[8]) {
  std::vector<Array> arrays;
  const auto add = [&](int64_t count, bool given = true) {
    arrays.push_back(read(count, given, arrays.empty()));
  };
  if (n[0] == kAttend) {
    const int64_t width = n[3] * n[4];
    for (int i = 0; i < 3; ++i) add(n[1] * n[2] * width);
    for (int i = 0; i < 2; ++i) add(width, n[6] != 0);
    add(width, n[7] != 0);
    return arrays;
  }
  if (n[0] == kIntegers) {
    arrays.push_back(read((n[1] * n[2] + 3) / 4));
    arrays.push_back(read((n[3] * n[2] + 3) / 4));
    arrays.push_back(read(n[3]));
    arrays.push_back(read(n[3], n[6] != 0));
    arrays.push_back(read(n[3], n[7] != 0));
    return arrays;
  }
  const int64_t columns = n[0] == kMultiply ? n[3] : n[2];
  add(n[1] * n[2]);
  add(n[1] * n[2], n[0] == kNorm && n[4] != 0);
  add(n[0] == kMultiply ? n[3] * n[2] : columns, n[0] != kGelu);
  add(columns, n[0] != kGelu && n[6] != 0);
  add(columns, n[0] != kMultiply && n[7] != 0);
  return arrays;
}

int main(int count, char**) {
  too_short = count > 1;
  std::vector<const Path*> paths;
  for (const Path& path : kPaths) {
    if (!path.runs_here()) continue;
    std::printf("%s%s", paths.empty() ? "" : ",", path.name);
    paths.push_back(&path);
  }
  std::printf("\n");
  int64_t n[8];
  constexpr void (*kRun[])(const Path&, const int64_t (&)[8], const std::vector<Array>&) = {
      norm, gelu, multiply, attend, multiply_integers};
  while (std::fread(n, sizeof n, 1, stdin) == 1) {
    const std::vector<Array> arrays = arrays_of(n);
    for (const Path* path : paths) kRun[n[0]](*path, n, arrays);
  }
}
