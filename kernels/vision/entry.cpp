// Entry points of the operations by themselves, for the tests and to know their paths; and as
// operators.
#include "../operators/exported.h"
#include "../operators/turns.h"
#include "attention_operator.h"
#include "integer_operator.h"

namespace vision = ive::vision;

namespace {

const vision::Path* path_at(int32_t index) {
  for (const vision::Path& path : vision::kPaths) {
    if (path.runs_here() && index-- == 0) return &path;
  }
  return nullptr;
}

}  // namespace

// Names of the paths that run on this CPU, the fastest first; null past the last.
IVE_EXPORT const char* ive_vision_path(int32_t index) {
  const vision::Path* path = path_at(index);
  return path == nullptr ? nullptr : path->name;
}

// Whether that path's integer products are as fast as ONNX Runtime's.
IVE_EXPORT bool ive_vision_multiplies_fast(int32_t index) { return path_at(index)->integers.fast; }

// Each runs on this thread, by the path of that index.
IVE_EXPORT void ive_vision_norm(const vision::Norm* norm, int32_t index) {
  for (int64_t row = 0; row < norm->rows; ++row) path_at(index)->norm_row(*norm, row);
}

IVE_EXPORT void ive_vision_gelu(const vision::Gelu* gelu, int32_t index) {
  for (int64_t row = 0; row < gelu->rows; ++row) path_at(index)->gelu_row(*gelu, row);
}

IVE_EXPORT void ive_vision_multiply(const vision::Product* product, int32_t index) {
  const int64_t tasks = vision::product_tasks(*product);
  for (int64_t task = 0; task < tasks; ++task) path_at(index)->multiply_columns(*product, task);
}

// 0, or 1 where there is no memory.
IVE_EXPORT int32_t ive_vision_multiply_integers(const vision::IntegerProduct* product,
                                                int32_t index) {
  const vision::Integers& how = path_at(index)->integers;
  vision::InputBlock inputs;
  if (!inputs.allocate(*product, how.tile_rows, how.unit_inputs)) return 1;
  while (inputs.next(*product)) {
    for (int64_t i = 0; i < packings(how, inputs); ++i) how.pack(*product, inputs, i);
    for (int64_t i = 0; i < product_tasks(*product); ++i) how.multiply(*product, inputs, i);
  }
  return 0;
}

IVE_EXPORT int32_t ive_vision_attend(const vision::Attention* attention, int32_t index) {
  const vision::Path& path = *path_at(index);
  vision::Packed packed;
  if (!packed.allocate(*attention)) return 1;
  for (int64_t tile = 0; tile < attention->tiles; ++tile) {
    for (int64_t i = 0; i < vision::packings(packed); ++i) {
      path.pack_run(*attention, packed, tile, i);
    }
    for (int64_t i = 0; i < vision::attendings(*attention); ++i) {
      path.attend(*attention, packed, tile, i);
    }
  }
  return 0;
}

namespace ive::vision {

template <typename Operator>
ort::CustomOp in_turn() {
  return ort::describe<Operator, rest>();
}

// What the library registers.
ort::Operators operators() {
  static const ort::CustomOp kAll[] = {in_turn<NormOperator<false, false>>(),
                                       in_turn<NormOperator<false, true>>(),
                                       in_turn<NormOperator<true, false>>(),
                                       in_turn<NormOperator<true, true>>(),
                                       in_turn<GeluOperator>(),
                                       in_turn<GeluRoundedOperator>(),
                                       in_turn<ProductOperator>(),
                                       in_turn<IntegerProductOperator>(),
                                       in_turn<IntegerProductGeluOperator>(),
                                       in_turn<AttentionOperator<false>>(),
                                       in_turn<AttentionOperator<true>>()};
  return {kAll, std::size(kAll)};
}

}  // namespace ive::vision
