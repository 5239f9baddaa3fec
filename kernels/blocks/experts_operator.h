// Experts as an operator: QMoE.
#pragma once

#include "../operators/operator.h"
#include "experts.h"

namespace ive::blocks {

class ExpertsOperator {
 public:
  static constexpr const char* kName = "QMoE";
  // As QMoE has them, where shares are normed; biases must be absent.
  static constexpr ort::Input kInputs[] = {
      {ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kRequired}, {ort::kUint8, ort::kRequired},
      {ort::kFloat, ort::kRequired}, {ort::kFloat, ort::kOptional}, {ort::kUint8, ort::kRequired},
      {ort::kFloat, ort::kRequired}};
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  ort::Status* start(const ort::Info* info) {
    const ort::Attribute attributes[] = {
        {"k", &chosen_}, {"expert_weight_bits", &bits_}, {"block_size", &block_}};
    if (ort::Status* status = ort::read_attributes(api, info, attributes)) return status;
    const bool known = block_ == 32 || block_ == 64 || block_ == 128 || block_ == kMaxBlock;
    if ((bits_ != 4 && bits_ != 8) || !known || chosen_ < 1) {
      return ort::refuse(api, "bits must be 4 or 8, block_size 32, 64, 128 or 256, k at least 1");
    }
    return nullptr;
  }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[std::size(kInputs)];
    if (ort::Status* status = call.read(given)) return status;
    Layer layer{};
    if (const char* wrong = read(given, layer)) return call.refuse(wrong);
    if (ort::Status* status = call.make(0, given[kX], &layer.y)) return status;
    if (layer.rows == 0) return nullptr;
    Mixture mixture(layer, best_path(bits_));
    if (!mixture.allocate()) return call.refuse("no memory for the routes");
    return run(call, mixture, layer);
  }

  ort::Api api = nullptr;

 private:
  enum { kX, kLogits, kGated, kGatedScales, kBias, kDown, kDownScales };
  // Into which tasks of unequal experts are cut.
  static constexpr size_t kParts = 64;

  static const float* floats(const ort::Tensor& tensor) {
    return static_cast<const float*>(tensor.data);
  }

  // What is wrong with the inputs, or null.
  const char* read(const ort::Tensor (&given)[std::size(kInputs)], Layer& layer) const {
    const ort::Tensor &x = given[kX], &logits = given[kLogits], &gated = given[kGated],
                      &down = given[kDown];
    if (given[kBias].given()) return "a bias is not supported";
    if (x.dimensions != 2 || logits.dimensions != 2 || logits.shape[0] != x.shape[0])
      return "x and the router's logits must be of the same rows";
    if (gated.dimensions != 3 || down.dimensions != 3) return "weights must have 3 dimensions";
    layer.rows = x.shape[0], layer.experts = logits.shape[1], layer.chosen = chosen_;
    layer.x = floats(x), layer.logits = floats(logits);
    const int64_t width = gated.shape[1] / 2;
    layer.gated = stack(gated, given[kGatedScales], x.shape[1], 2 * width);
    layer.down = stack(down, given[kDownScales], width, x.shape[1]);
    if (layer.experts < chosen_) return "k is more than there are experts";
    if (!fits(layer.gated, layer.experts, gated, given[kGatedScales]))
      return "the weights of gates and ups are not those of x";
    if (!fits(layer.down, layer.experts, down, given[kDownScales]))
      return "the weights that lead back are not those of gates and ups";
    return nullptr;
  }

  Stack stack(const ort::Tensor& values, const ort::Tensor& scales, int64_t inputs,
              int64_t columns) const {
    return {
        static_cast<const uint8_t*>(values.data), floats(scales), inputs, columns, block_, bits_};
  }

  // Whether a stack's tensors are of whole blocks of its inputs, and of its columns.
  bool fits(const Stack& stack, int64_t experts, const ort::Tensor& values,
            const ort::Tensor& scales) const {
    return stack.inputs > 0 && stack.inputs % block_ == 0 && values.shape[0] == experts &&
           values.shape[1] == stack.columns && values.shape[2] == stack.inputs * bits_ / 8 &&
           scales.count() == experts * stack.columns * (stack.inputs / block_);
  }

  static ort::Status* run(const ort::Call& call, Mixture& mixture, const Layer& layer) {
    const auto rows = static_cast<size_t>(layer.rows), routes = static_cast<size_t>(layer.routes());
    const size_t parts = rows == 1 ? 0 : kParts;
    if (ort::Status* status = call.each(choose, rows, &mixture)) return status;
    mixture.sort();
    if (ort::Status* status = call.each(gather, routes, &mixture)) return status;
    if (!mixture.begin_gated()) return call.refuse("no memory for the rounded inputs");
    if (ort::Status* status = multiply(call, mixture, parts)) return status;
    if (ort::Status* status = call.each(activate, routes, &mixture)) return status;
    if (!mixture.begin_down()) return call.refuse("no memory for the rounded inputs");
    if (ort::Status* status = multiply(call, mixture, parts)) return status;
    return call.each(combine, rows, &mixture);
  }

  static ort::Status* multiply(const ort::Call& call, Mixture& mixture, size_t parts) {
    const Products& products = mixture.products();
    if (ort::Status* status = call.each(round, products.roundings(), &mixture)) return status;
    return call.each(product, products.tasks(), &mixture, parts);
  }

  static Mixture& as(void* mixture) { return *static_cast<Mixture*>(mixture); }
  static void choose(void* mixture, size_t row) { as(mixture).choose(row); }
  static void gather(void* mixture, size_t route) { as(mixture).gather(route); }
  static void activate(void* mixture, size_t route) { as(mixture).activate(route); }
  static void combine(void* mixture, size_t row) { as(mixture).combine(row); }
  static void round(void* mixture, size_t row) { as(mixture).products().round(row); }
  static void product(void* mixture, size_t task) { as(mixture).products().multiply(task); }

  int64_t chosen_ = 0, bits_ = 0, block_ = 0;
};

}  // namespace ive::blocks
