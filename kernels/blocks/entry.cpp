// Entry points of the product by itself, for the tests and to know its paths; and as operators.
#include "../operators/exported.h"
#include "experts_operator.h"
#include "operator.h"

using ive::blocks::Multiplication;
using ive::blocks::Path;
using ive::blocks::Product;

// Names of the paths that run on this CPU, the fastest first; null past the last.
IVE_EXPORT const char* ive_blocks_path(int32_t index) {
  return ive::path_name(ive::blocks::paths(4), index);
}

// One product on this thread by the path of that index; 0, or 1 where there is no memory.
IVE_EXPORT int32_t ive_blocks_multiply(const Product* product, int32_t index) {
  const Path* path = ive::path_at(ive::blocks::paths(product->bits), index);
  if (path == nullptr) return 2;
  Multiplication work(*product, *path);
  if (!work.allocate()) return 1;
  for (int64_t i = 0; i < work.roundings(); ++i) work.round(i);
  for (int64_t i = 0; i < work.products(); ++i) work.multiply(i);
  return 0;
}

namespace ive::blocks {

// What the library registers.
ort::Operators operators() {
  static const ort::CustomOp kAll[] = {ort::describe<Operator>(), ort::describe<ExpertsOperator>()};
  return {kAll, std::size(kAll)};
}

}  // namespace ive::blocks
