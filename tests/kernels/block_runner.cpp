// Runs products from standard input by every path of this CPU, without Python: under an emulator,
// or a sanitizer. Input, until it ends: rows, inputs, columns, block, bits, whether there is a bias
// (int64); x, values, scales, bias. Output: the names of the paths, a line; then each path's y of
// each product. Every array ends where its heap block ends; one that is named as an argument, one
// element too early.
#include <string>

#include "driver.h"
#include "runner.h"

using ive::blocks::Multiplication;
using ive::blocks::Path;
using ive::blocks::paths;
using ive::blocks::Product;

void run(const int64_t (&shape)[6], const std::string& too_short) {
  const auto [rows, inputs, columns, block, bits, biased] = shape;
  Product product{};
  product.rows = rows, product.inputs = inputs, product.columns = columns, product.block = block;
  product.bits = bits;
  const auto x = read<float>(rows * inputs, too_short == "x");
  const auto values = read<uint8_t>(columns * product.column_bytes(), too_short == "values");
  const auto scales = read<float>(columns * product.blocks(), too_short == "scales");
  const auto bias = read<float>(biased != 0 ? columns : 0);
  product.x = x.get(), product.values = values.get(), product.scales = scales.get();
  product.bias = biased != 0 ? bias.get() : nullptr;
  for (const Path& path : paths(bits)) {
    if (!path.runs_here()) continue;
    const std::unique_ptr<float[]> y(new float[rows * columns]);
    product.y = y.get();
    Multiplication work(product, path);
    if (!work.allocate()) std::exit(4);
    for (int64_t i = 0; i < work.roundings(); ++i) work.round(i);
    for (int64_t i = 0; i < work.products(); ++i) work.multiply(i);
    std::fwrite(y.get(), sizeof(float), static_cast<size_t>(rows * columns), stdout);
  }
}

int main(int count, char** arguments) {
  const std::string too_short = count > 1 ? arguments[1] : "";
  print_names(paths(4));
  int64_t shape[6];
  while (std::fread(shape, sizeof shape, 1, stdin) == 1) run(shape, too_short);
}
