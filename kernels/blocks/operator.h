// The product as an operator: MatMulNBits with four or eight bits.
#pragma once

#include "../operators/operator.h"
#include "driver.h"

namespace ive::blocks {

class Operator {
 public:
  static constexpr const char* kName = "MatMulNBits";
  // As MatMulNBits has them; zero points and the order of groups must be absent.
  static constexpr ort::Input kInputs[] = {
      {ort::kFloat, ort::kRequired}, {ort::kUint8, ort::kRequired}, {ort::kFloat, ort::kRequired},
      {ort::kUint8, ort::kOptional}, {ort::kInt32, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  static constexpr ort::ElementType kOutputs[] = {ort::kFloat};

  ort::Status* start(const ort::Info* info) {
    const ort::Attribute attributes[] = {
        {"K", &inputs_}, {"N", &columns_}, {"bits", &bits_}, {"block_size", &block_}};
    if (ort::Status* status = ort::read_attributes(api, info, attributes)) return status;
    const bool known = block_ == 32 || block_ == 64 || block_ == 128 || block_ == kMaxBlock;
    if ((bits_ != 4 && bits_ != 8) || !known || inputs_ < 1 || columns_ < 1) {
      return ort::refuse(api,
                         "bits must be 4 or 8, block_size 32, 64, 128 or 256, K and N at least 1");
    }
    return nullptr;
  }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[std::size(kInputs)];
    if (ort::Status* status = call.read(given)) return status;
    if (const char* wrong = check(given)) return call.refuse(wrong);
    ort::Tensor& x = given[kX];
    Product product{};
    product.inputs = inputs_, product.columns = columns_, product.block = block_;
    product.bits = bits_;
    product.rows = x.count() / inputs_;
    product.x = static_cast<const float*>(x.data);
    product.values = static_cast<const uint8_t*>(given[kValues].data);
    product.scales = static_cast<const float*>(given[kScales].data);
    product.bias = static_cast<const float*>(given[kBias].data);
    x.shape[x.dimensions - 1] = columns_;
    if (ort::Status* status = call.make(0, x, &product.y)) return status;
    if (product.rows == 0) return nullptr;
    Multiplication work(product, best_path(bits_));
    if (!work.allocate()) return call.refuse("no memory for the rounded inputs");
    if (product.rows * product.inputs < kSideBySide) {
      for (int64_t row = 0; row < work.roundings(); ++row) work.round(row);
    } else if (ort::Status* status = call.each(round, work.roundings(), &work)) {
      return status;
    }
    return call.each(multiply, work.products(), &work);
  }

  ort::Api api = nullptr;

 private:
  enum { kX, kValues, kScales, kZeroPoints, kGroups, kBias };
  // Inputs that one thread rounds while others would only wake up.
  static constexpr int64_t kSideBySide = 1 << 16;

  static void round(void* work, size_t row) { static_cast<Multiplication*>(work)->round(row); }
  static void multiply(void* work, size_t task) {
    static_cast<Multiplication*>(work)->multiply(task);
  }

  // What is wrong with the inputs, or null.
  const char* check(const ort::Tensor (&given)[std::size(kInputs)]) const {
    const int64_t blocks = (inputs_ + block_ - 1) / block_;
    const ort::Tensor& bias = given[kBias];
    if (given[kX].last() != inputs_) return "x must end with K";
    if (given[kValues].count() != columns_ * blocks * block_ * bits_ / 8)
      return "B is not of N x K";
    if (given[kScales].count() != columns_ * blocks) return "scales are not those of N x K";
    if (given[kZeroPoints].given()) return "zero points are not supported";
    if (given[kGroups].given()) return "g_idx is not supported";
    if (bias.given() && bias.count() != columns_) return "bias is not of N";
    return nullptr;
  }

  int64_t inputs_ = 0, columns_ = 0, block_ = 0, bits_ = 0;
};

}  // namespace ive::blocks
