// Runs layers of experts from standard input by every path of this CPU, without Python: under an
// emulator, or a sanitizer. Input, until it ends: rows, hidden, width, experts, chosen, block, bits
// (int64); x, logits, and of gates and ups, and of what leads back, values and scales. Output: the
// names of the paths, a line; then each path's y of each layer. Every array ends where its heap
// block ends; one that is named as an argument, one element too early.
#include <string>

#include "experts.h"
#include "runner.h"

using namespace ive::blocks;

void mix(const Layer& layer, const Path& path) {
  Mixture mixture(layer, path);
  if (!mixture.allocate()) std::exit(4);
  for (int64_t row = 0; row < layer.rows; ++row) mixture.choose(row);
  mixture.sort();
  for (int64_t route = 0; route < layer.routes(); ++route) mixture.gather(route);
  const auto multiply = [&] {
    for (int64_t i = 0; i < mixture.products().roundings(); ++i) mixture.products().round(i);
    for (int64_t i = 0; i < mixture.products().tasks(); ++i) mixture.products().multiply(i);
  };
  if (!mixture.begin_gated()) std::exit(4);
  multiply();
  for (int64_t route = 0; route < layer.routes(); ++route) mixture.activate(route);
  if (!mixture.begin_down()) std::exit(4);
  multiply();
  for (int64_t row = 0; row < layer.rows; ++row) mixture.combine(row);
}

void run(const int64_t (&shape)[7], const std::string& too_short) {
  const auto [rows, hidden, width, experts, chosen, block, bits] = shape;
  const auto x = read<float>(rows * hidden, too_short == "x");
  const auto logits = read<float>(rows * experts, too_short == "logits");
  const int64_t gated = experts * 2 * width * hidden, down = experts * hidden * width;
  const auto gated_values = read<uint8_t>(gated * bits / 8, too_short == "gated");
  const auto gated_scales = read<float>(gated / block);
  const auto down_values = read<uint8_t>(down * bits / 8, too_short == "down");
  const auto down_scales = read<float>(down / block);
  for (const Path& path : paths(bits)) {
    if (!path.runs_here()) continue;
    const std::unique_ptr<float[]> y(new float[rows * hidden]);
    mix({x.get(),
         logits.get(),
         y.get(),
         {gated_values.get(), gated_scales.get(), hidden, 2 * width, block, bits},
         {down_values.get(), down_scales.get(), width, hidden, block, bits},
         rows,
         experts,
         chosen},
        path);
    std::fwrite(y.get(), sizeof(float), static_cast<size_t>(rows * hidden), stdout);
  }
}

int main(int count, char** arguments) {
  const std::string too_short = count > 1 ? arguments[1] : "";
  print_names(paths(4));
  int64_t shape[7];
  while (std::fread(shape, sizeof shape, 1, stdin) == 1) run(shape, too_short);
}
