// Integer products as operators for ONNX Runtime.
#pragma once

#include "operators.h"

namespace ive::vision {

constexpr ort::Input kBytes = {ort::kUint8, ort::kRequired};

// Products of the same rows, which are packed once for all of them.
class IntegerProducts {
 public:
  static constexpr size_t kMost = 8;

  // Adds a product of what all share and of a weight; returns what is wrong with it, or null.
  const char* add(const IntegerProduct& shared, const ort::Tensor& weight,
                  const ort::Tensor& scales, const ort::Tensor& bias) {
    IntegerProduct& p = all_[count_++] = shared;
    if (weight.dimensions != 2) return "the weight must have 2 dimensions";
    p.columns = weight.shape[0];
    if (p.inputs < 1 || weight.shape[1] != p.inputs) return "x is not of the weight's inputs";
    if (scales.count() != p.columns) return "scales are not of every column";
    if (bias.given() && bias.count() != p.columns) return "the bias is not of every column";
    p.weight = static_cast<const int8_t*>(weight.data), p.scales = floats(scales);
    p.bias = static_cast<const int32_t*>(bias.data);
    return nullptr;
  }

  size_t count() const { return count_; }
  IntegerProduct& operator[](size_t i) { return all_[i]; }

  // Runs all of them.
  ort::Status* run(const ort::Call& call) {
    const IntegerProduct& p = all_[0];
    const Integers& how = best_path().integers;
    if (p.rows == 0) return nullptr;
    if (!inputs_.allocate(p, how.tile_rows, how.unit_inputs)) {
      return call.refuse("no memory for the packed inputs");
    }
    while (inputs_.next(p)) {
      if (ort::Status* status = call.each(pack, packings(how, inputs_), this)) return status;
      if (ort::Status* status = call.each(multiply, task_of(count_), this)) return status;
    }
    return nullptr;
  }

 private:
  // The first task of a product.
  int64_t task_of(size_t product) const {
    int64_t tasks = 0;
    for (size_t i = 0; i < product; ++i) tasks += product_tasks(all_[i]);
    return tasks;
  }

  static void pack(void* work, size_t tile) {
    const auto& self = *static_cast<const IntegerProducts*>(work);
    best_path().integers.pack(self.all_[0], self.inputs_, static_cast<int64_t>(tile));
  }
  static void multiply(void* work, size_t task) {
    const auto& self = *static_cast<const IntegerProducts*>(work);
    const auto given = static_cast<int64_t>(task);
    size_t product = 0;
    while (given >= self.task_of(product + 1)) ++product;
    const int64_t own = given - self.task_of(product);
    best_path().integers.multiply(self.all_[product], self.inputs_, own);
  }

  IntegerProduct all_[kMost] = {};
  size_t count_ = 0;
  InputBlock inputs_;
};

// What products of the same rows share; why not, or null.
inline const char* read_shared(const ort::Tensor& x, const ort::Tensor& scale,
                               const ort::Tensor& zero, IntegerProduct& shared) {
  if (scale.count() != 1 || zero.count() != 1) return "scale and zero point must be single values";
  shared.x = static_cast<const uint8_t*>(x.data);
  shared.inputs = x.last(), shared.rows = shared.inputs == 0 ? 0 : x.count() / shared.inputs;
  shared.scale = *floats(scale), shared.zero = *static_cast<const uint8_t*>(zero.data);
  return nullptr;
}

// QGemm of bytes and signed bytes, with float results.
class IntegerProductOperator {
 public:
  static constexpr const char* kName = "IntegerProduct";
  static constexpr ort::Input kInputs[] = {kBytes,     kNeeded,
                                           kZeroPoint, {ort::kInt8, ort::kRequired},
                                           kNeeded,    {ort::kInt32, ort::kOptional}};
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  ort::Status* start(const ort::Info*) { return nullptr; }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[6];
    if (ort::Status* status = call.read(given)) return status;
    auto& [x, scale, zero, weight, scales, bias] = given;
    IntegerProduct shared{};
    if (const char* wrong = read_shared(x, scale, zero, shared)) return call.refuse(wrong);
    IntegerProducts products;
    if (const char* wrong = products.add(shared, weight, scales, bias)) return call.refuse(wrong);
    x.shape[x.dimensions - 1] = products[0].columns;
    if (ort::Status* status = make_output<false>(call, x, products[0].out)) return status;
    return products.run(call);
  }

  ort::Api api = nullptr;
};

// Products of the same rows, GELU of their results, rounded into one.
class IntegerProductGeluOperator {
 public:
  static constexpr const char* kName = "IntegerProductGeluRounded";
  static constexpr size_t kMostRuns = IntegerProducts::kMost;
  enum { kX, kScale, kZero, kOutScale, kOutZero, kRuns, kFactors = kRuns + 3 * kMostRuns };
  // Then weight, scales and bias of each run; factors of each run.
  static constexpr auto kInputs = [] {
    std::array<ort::Input, kFactors + kMostRuns> inputs{};
    for (auto& one : inputs) one = kPerhaps;
    for (size_t i = kRuns; i < kFactors; i += 3) {
      inputs[i].type = ort::kInt8, inputs[i + 2].type = ort::kInt32;
    }
    inputs[kX] = kBytes, inputs[kScale] = inputs[kOutScale] = kNeeded;
    inputs[kZero] = inputs[kOutZero] = kZeroPoint;
    inputs[kRuns].need = inputs[kRuns + 1].need = ort::kRequired;
    return inputs;
  }();
  static constexpr ort::ElementType kOutputs[] = {ort::kUint8};

  ort::Status* start(const ort::Info*) { return nullptr; }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[kFactors + kMostRuns];
    if (ort::Status* status = call.read(given)) return status;
    IntegerProduct shared{};
    shared.gelu = true;
    const char* wrong = read_shared(given[kX], given[kScale], given[kZero], shared);
    if (wrong != nullptr) return call.refuse(wrong);
    ort::Tensor shape = given[kX];
    shape.shape[shape.dimensions - 1] = 0;
    IntegerProducts products;
    for (size_t i = 0; i < kMostRuns && given[kRuns + 3 * i].given(); ++i) {
      const ort::Tensor* run = given + kRuns + 3 * i;
      if ((wrong = products.add(shared, run[0], run[1], run[2]))) return call.refuse(wrong);
      IntegerProduct& p = products[i];
      wrong = read_rounding(given[kOutScale], given[kOutZero], given[kFactors + i], p.columns,
                            p.out.rounding);
      if (wrong != nullptr) return call.refuse(wrong);
      shape.shape[shape.dimensions - 1] += p.columns;
    }
    Output out{};
    if (ort::Status* status = make_output<true>(call, shape, out)) return status;
    for (size_t i = 0; i < products.count(); ++i) {
      Output& own = products[i].out;
      own.bytes = out.bytes, own.apart = out.apart;
      out.bytes += products[i].columns;
    }
    return products.run(call);
  }

  ort::Api api = nullptr;
};

}  // namespace ive::vision
