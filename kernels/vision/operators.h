// The operations as operators for ONNX Runtime, whose names say what they replace. The rounded ones
// take the scale and the zero point of the QuantizeLinear after them, and the factors before it.
#pragma once

#include "../operators/operator.h"
#include "paths.h"

namespace ive::vision {

inline const float* floats(const ort::Tensor& tensor) {
  return static_cast<const float*>(tensor.data);
}

constexpr ort::Input kNeeded = {ort::kFloat, ort::kRequired};
constexpr ort::Input kPerhaps = {ort::kFloat, ort::kOptional};
constexpr ort::Input kZeroPoint = {ort::kUint8, ort::kRequired};

// The rounding that a scale, a zero point and factors mean, for so many columns; why not, or null.
inline const char* read_rounding(const ort::Tensor& scale, const ort::Tensor& zero,
                                 const ort::Tensor& factors, int64_t columns, Rounding& rounding) {
  if (scale.count() != 1 || zero.count() != 1) return "scale and zero point must be single values";
  if (factors.given() && factors.count() != columns) return "factors are not of every column";
  rounding = {floats(factors), *floats(scale), *static_cast<const uint8_t*>(zero.data)};
  return nullptr;
}

template <bool kRounds>
ort::Status* make_output(const ort::Call& call, const ort::Tensor& like, Output& out) {
  out.apart = like.last();
  if (kRounds) return call.make(0, like, &out.bytes);
  return call.make(0, like, &out.floats);
}

// Norms of root mean squares, or of deviations from the mean; of sums of two where it adds, which
// are then the second output.
template <bool kAdds, bool kRounds>
class NormOperator {
 public:
  static constexpr const char* kName =
      kAdds ? (kRounds ? "AddNormRounded" : "AddNorm") : (kRounds ? "NormRounded" : "Norm");
  // Inputs are x, weight, bias; then scale, zero point, factors; what is added comes first.
  static constexpr ort::Input kAll[] = {kNeeded, kNeeded,    kNeeded, kPerhaps,
                                        kNeeded, kZeroPoint, kPerhaps};
  static constexpr size_t kFirst = kAdds ? 0 : 1, kCount = (kRounds ? 7 : 4) - kFirst;
  static constexpr auto kInputs = [] {
    std::array<ort::Input, kCount> inputs{};
    for (size_t i = 0; i < kCount; ++i) inputs[i] = kAll[i + kFirst];
    return inputs;
  }();
  static constexpr auto kOutputs = [] {
    std::array<ort::ElementType, kAdds ? 2 : 1> outputs{};
    for (auto& one : outputs) one = ort::kFloat;
    if (kRounds) outputs[0] = ort::kUint8;
    return outputs;
  }();

  ort::Status* start(const ort::Info* info) {
    int64_t centred = 0;
    const ort::Attribute attributes[] = {{"centred", &centred}};
    if (ort::Status* status = ort::read_attributes(api, info, attributes)) return status;
    centred_ = centred != 0;
    return ort::read_attribute(api, info, "epsilon", &epsilon_);
  }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor all[7], given[kCount];
    if (ort::Status* status = call.read(given)) return status;
    std::copy(given, given + kCount, all + kFirst);
    const auto& [added, x, weight, bias, scale, zero, factors] = all;
    Norm norm{};
    norm.width = x.last();
    norm.rows = norm.width == 0 ? 0 : x.count() / norm.width;
    if (weight.count() != norm.width) return call.refuse("the weight is not of every column");
    if (bias.given() && bias.count() != norm.width) return call.refuse("the bias is not, either");
    if (kAdds && added.count() != x.count()) return call.refuse("what is added has another shape");
    if (kRounds) {
      const char* wrong = read_rounding(scale, zero, factors, norm.width, norm.out.rounding);
      if (wrong != nullptr) return call.refuse(wrong);
    }
    norm.x = floats(x), norm.weight = floats(weight), norm.bias = floats(bias);
    norm.epsilon = epsilon_, norm.centred = centred_;
    if (ort::Status* status = make_output<kRounds>(call, x, norm.out)) return status;
    if (kAdds) {
      norm.added = floats(added);
      if (ort::Status* status = call.make(1, x, &norm.sum)) return status;
    }
    return call.each(run, norm.rows, &norm);
  }

  ort::Api api = nullptr;

 private:
  static void run(void* norm, size_t row) { best_path().norm_row(*static_cast<Norm*>(norm), row); }

  float epsilon_ = 0;
  bool centred_ = false;
};

// GELU of runs of a row's columns that are inputs of their own, rounded into one.
class GeluRoundedOperator {
 public:
  static constexpr const char* kName = "GeluRounded";
  static constexpr size_t kMostRuns = 8, kRun = 2, kFactors = kRun + kMostRuns;
  // Scale, zero point; runs; factors of each run.
  static constexpr auto kInputs = [] {
    std::array<ort::Input, kFactors + kMostRuns> inputs{};
    for (auto& one : inputs) one = kPerhaps;
    inputs[0] = inputs[kRun] = kNeeded, inputs[1] = kZeroPoint;
    return inputs;
  }();
  static constexpr ort::ElementType kOutputs[] = {ort::kUint8};

  ort::Status* start(const ort::Info*) { return nullptr; }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[kFactors + kMostRuns];
    if (ort::Status* status = call.read(given)) return status;
    Runs runs;
    ort::Tensor shape = given[kRun];
    const int64_t width = shape.last(), rows = width == 0 ? 0 : shape.count() / width;
    shape.shape[shape.dimensions - 1] = 0;
    for (; runs.count < kMostRuns && given[kRun + runs.count].given(); ++runs.count) {
      const ort::Tensor& x = given[kRun + runs.count];
      Gelu& gelu = runs.gelu[runs.count];
      gelu.x = floats(x), gelu.rows = rows, gelu.width = x.last();
      if (x.count() != rows * x.last()) return call.refuse("runs are not of the same rows");
      const char* wrong = read_rounding(given[0], given[1], given[kFactors + runs.count], x.last(),
                                        gelu.out.rounding);
      if (wrong != nullptr) return call.refuse(wrong);
      shape.shape[shape.dimensions - 1] += x.last();
    }
    Output out{};
    if (ort::Status* status = make_output<true>(call, shape, out)) return status;
    for (size_t i = 0; i < runs.count; ++i) {
      Output& own = runs.gelu[i].out;
      own.bytes = out.bytes, own.apart = out.apart;
      out.bytes += runs.gelu[i].width;
    }
    return call.each(run, rows, &runs);
  }

  ort::Api api = nullptr;

 private:
  struct Runs {
    Gelu gelu[kMostRuns] = {};
    size_t count = 0;
  };

  static void run(void* work, size_t row) {
    const auto& runs = *static_cast<const Runs*>(work);
    for (size_t i = 0; i < runs.count; ++i) best_path().gelu_row(runs.gelu[i], row);
  }
};

class GeluOperator {
 public:
  static constexpr const char* kName = "Gelu";
  static constexpr ort::Input kInputs[] = {kNeeded};
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  ort::Status* start(const ort::Info*) { return nullptr; }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[1];
    if (ort::Status* status = call.read(given)) return status;
    Gelu gelu{};
    gelu.x = floats(given[0]), gelu.width = given[0].last();
    gelu.rows = gelu.width == 0 ? 0 : given[0].count() / gelu.width;
    if (ort::Status* status = make_output<false>(call, given[0], gelu.out)) return status;
    return call.each(run, gelu.rows, &gelu);
  }

  ort::Api api = nullptr;

 private:
  static void run(void* gelu, size_t row) { best_path().gelu_row(*static_cast<Gelu*>(gelu), row); }
};

// Gemm with transB, of floats.
class ProductOperator {
 public:
  static constexpr const char* kName = "FloatProduct";
  static constexpr ort::Input kInputs[] = {kNeeded, kNeeded, kPerhaps};
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  ort::Status* start(const ort::Info*) { return nullptr; }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[3];
    if (ort::Status* status = call.read(given)) return status;
    auto& [x, weight, bias] = given;
    if (weight.dimensions != 2) return call.refuse("the weight must have 2 dimensions");
    Product product{};
    product.columns = weight.shape[0], product.inputs = weight.shape[1];
    if (product.inputs < 1 || x.last() != product.inputs) return call.refuse("x is not of inputs");
    if (bias.given() && bias.count() != product.columns) return call.refuse("bias is not of N");
    product.rows = x.count() / product.inputs;
    product.x = floats(x), product.weight = floats(weight), product.bias = floats(bias);
    x.shape[x.dimensions - 1] = product.columns;
    if (ort::Status* status = call.make(0, x, &product.y)) return status;
    return call.each(run, product_tasks(product), &product);
  }

  ort::Api api = nullptr;

 private:
  static void run(void* product, size_t task) {
    best_path().multiply_columns(*static_cast<Product*>(product), task);
  }
};

}  // namespace ive::vision
