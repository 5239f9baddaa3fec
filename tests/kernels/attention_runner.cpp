// Runs passes of attention from standard input by every path of this CPU, without Python: under an
// emulator, or a sanitizer. Input, until it ends: kinds of what is given and of the caches, whether
// there are rotary angles, heads, heads of keys, their size, sequences (int64); of each of these
// its rows, positions cached, capacity; queries, keys, values, cosines and sines, scales of keys
// and of values; keys and values of each cache. Output: the names of the paths, a line; then by
// pass and path what was attended and the caches. Every array ends where its heap block ends; one
// that is named as an argument, one element too early.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

using ive::attention::bytes_of;
using ive::attention::Kind;
using ive::attention::Pass;
using ive::attention::Path;
using ive::attention::Work;

using Bytes = std::unique_ptr<char[]>;

struct Array {
  Bytes bytes;
  size_t size;
};

Array read(int64_t count, Kind kind, bool too_short = false) {
  const auto size = static_cast<size_t>((count - (too_short ? 1 : 0)) * bytes_of(kind));
  Array array{Bytes(new char[size]), size};
  if (std::fread(array.bytes.get(), 1, size, stdin) != size) std::exit(3);
  return array;
}

Bytes copy(const Array& array) {
  Bytes made(new char[array.size]);
  std::memcpy(made.get(), array.bytes.get(), array.size);
  return made;
}

void run_path(Pass pass, const Path& path, const std::vector<Array>& caches,
              std::vector<int64_t> sequences) {
  std::vector<Bytes> own;
  for (size_t i = 0; i < caches.size(); ++i) {
    own.push_back(copy(caches[i]));
    const auto address = reinterpret_cast<int64_t>(own.back().get());
    sequences[static_cast<size_t>(pass.fields) * (i / 2) + 4 + i % 2] = address;
  }
  const int64_t size = pass.rows * pass.heads * pass.head * bytes_of(pass.given);
  const Bytes out(new char[size]);
  pass.out = out.get(), pass.sequences = sequences.data();
  if (ive::attention::wrong_sequences(pass) != nullptr) std::exit(5);
  Work work(pass, path);
  if (!work.allocate()) std::exit(4);
  for (int64_t i = 0; i < work.appends(); ++i) work.append(i);
  for (int64_t i = 0; i < work.tasks(); ++i) work.attend(i);
  for (int64_t i = 0; i < work.merges(); ++i) work.merge(i);
  std::fwrite(out.get(), 1, static_cast<size_t>(size), stdout);
  for (size_t i = 0; i < own.size(); ++i) std::fwrite(own[i].get(), 1, caches[i].size, stdout);
}

void run(const int64_t (&sizes)[7], const std::vector<const Path*>& paths,
         const std::string& too_short) {
  Pass pass{};
  pass.given = static_cast<Kind>(sizes[0]), pass.cached = static_cast<Kind>(sizes[1]);
  pass.heads = sizes[3], pass.kv_heads = sizes[4], pass.head = sizes[5], pass.count = sizes[6];
  pass.fields = 6;
  std::vector<int64_t> sequences(static_cast<size_t>(pass.count * pass.fields));
  for (int64_t i = 0; i < pass.count; ++i) {
    int64_t* row = sequences.data() + i * pass.fields;
    row[0] = pass.rows;
    if (std::fread(row + 1, sizeof(int64_t), 3, stdin) != 3) std::exit(3);
    pass.rows += row[1];
  }
  const int64_t query = pass.heads * pass.head, width = pass.kv_heads * pass.head;
  const int64_t angles = sizes[2] != 0 ? pass.rows * pass.head / 2 : 0;
  const int64_t scales = pass.cached == ive::attention::kInt8 ? width : 0;
  const Array queries = read(pass.rows * query, pass.given, too_short == "query");
  const Array keys = read(pass.rows * width, pass.given, too_short == "key");
  const Array values = read(pass.rows * width, pass.given, too_short == "value");
  const Array cos = read(angles, pass.given, too_short == "cos"), sin = read(angles, pass.given);
  const Array key_scales = read(scales, ive::attention::kFloat, too_short == "scales");
  const Array value_scales = read(scales, ive::attention::kFloat);
  pass.query = queries.bytes.get(), pass.key = keys.bytes.get(), pass.value = values.bytes.get();
  pass.query_apart = query, pass.key_apart = pass.value_apart = width;
  if (angles != 0) pass.cos = cos.bytes.get(), pass.sin = sin.bytes.get();
  if (scales != 0) {
    pass.key_scales = reinterpret_cast<const float*>(key_scales.bytes.get());
    pass.value_scales = reinterpret_cast<const float*>(value_scales.bytes.get());
  }
  std::vector<Array> caches;
  for (int64_t i = 0; i < pass.count; ++i) {
    const int64_t count = width * sequences[static_cast<size_t>(i * pass.fields + 3)];
    caches.push_back(read(count, pass.cached));
    caches.push_back(read(count, pass.cached, too_short == "cache"));
  }
  for (const Path* path : paths) run_path(pass, *path, caches, sequences);
}

int main(int count, char** arguments) {
  const std::string too_short = count > 1 ? arguments[1] : "";
  std::vector<const Path*> paths;
  for (const Path& path : ive::attention::kPaths) {
    if (!path.runs_here()) continue;
    std::printf("%s%s", paths.empty() ? "" : ",", path.name);
    paths.push_back(&path);
  }
  std::printf("\n");
  int64_t sizes[7];
  while (std::fread(sizes, sizeof sizes, 1, stdin) == 1) run(sizes, paths, too_short);
}
