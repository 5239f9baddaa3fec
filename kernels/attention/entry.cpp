// Entry points of attention by itself, for the tests and to know its paths; and as operators.
#include "../operators/exported.h"
#include "operator.h"

using ive::attention::Pass;
using ive::attention::Path;
using ive::attention::Work;

// Names of the paths that run on this CPU, the fastest first; null past the last.
IVE_EXPORT const char* ive_attention_path(int32_t index) {
  return ive::path_name(ive::attention::kPaths, index);
}

// One pass on this thread by the path of that index; 0, 1 where there is no memory, 2 where its
// sequences are wrong.
IVE_EXPORT int32_t ive_attention_attend(const Pass* pass, int32_t index) {
  const Path* path = ive::path_at(ive::attention::kPaths, index);
  if (path == nullptr || ive::attention::wrong_sequences(*pass) != nullptr) return 2;
  Work work(*pass, *path);
  if (!work.allocate()) return 1;
  for (int64_t i = 0; i < work.appends(); ++i) work.append(i);
  for (int64_t i = 0; i < work.tasks(); ++i) work.attend(i);
  for (int64_t i = 0; i < work.merges(); ++i) work.merge(i);
  return work.failed() ? 1 : 0;
}

namespace ive::attention {

// What the library registers.
ort::Operators operators() {
  static const ort::CustomOp kAll[] = {ort::describe<Operator<ort::kFloat>>(),
                                       ort::describe<Operator<ort::kFloat16>>()};
  return {kAll, std::size(kAll)};
}

}  // namespace ive::attention
