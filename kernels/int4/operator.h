// The product as a custom operator of ONNX Runtime: MatMulNBits with four bits, of our own domain,
// on the threads of the session that runs it.
#pragma once

#include <array>
#include <memory>
#include <new>

#include "driver.h"
#include "onnxruntime_abi.h"

namespace ive::int4 {

using ort::at;
using ort::Status;

constexpr int kMostDimensions = 4;

struct Tensor {
  void* data = nullptr;
  int64_t shape[kMostDimensions] = {};
  size_t dimensions = 0;

  int64_t count() const {
    int64_t product = 1;
    for (size_t i = 0; i < dimensions; ++i) product *= shape[i];
    return product;
  }
};

// Inputs, as MatMulNBits has them; zero points and the order of groups must be absent.
enum Input { kX, kValues, kScales, kZeroPoints, kGroups, kBias, kInputs };

class Operator {
 public:
  static Status* create(const ort::CustomOp*, ort::Api api, const ort::Info* info, void** made) {
    std::unique_ptr<Operator> self(new (std::nothrow) Operator(api));
    if (self == nullptr) return refuse(api, "no memory for the operator");
    int64_t bits = 0;
    const std::pair<const char*, int64_t*> attributes[] = {{"K", &self->inputs_},
                                                           {"N", &self->columns_},
                                                           {"bits", &bits},
                                                           {"block_size", &self->block_}};
    for (const auto& [name, value] : attributes) {
      const auto get = at<Status* (*)(const ort::Info*, const char*, int64_t*)>(
          api, ort::kKernelInfoGetAttributeInt64);
      if (Status* status = get(info, name, value)) return status;
    }
    const bool known = self->block_ == 32 || self->block_ == 64 || self->block_ == 128 ||
                       self->block_ == kMaxBlock;
    if (bits != 4 || !known || self->inputs_ < 1 || self->columns_ < 1) {
      return refuse(api, "bits must be 4, block_size 32, 64, 128 or 256, K and N at least 1");
    }
    *made = self.release();
    return nullptr;
  }

  Status* compute(ort::Context* context) const {
    std::array<Tensor, kInputs> given;
    if (Status* status = read(context, given)) return status;
    if (const char* wrong = check(given)) return refuse(api_, wrong);
    Tensor& x = given[kX];
    Product product{};
    product.inputs = inputs_, product.columns = columns_, product.block = block_;
    product.rows = x.count() / inputs_;
    product.x = static_cast<const float*>(x.data);
    product.values = static_cast<const uint8_t*>(given[kValues].data);
    product.scales = static_cast<const float*>(given[kScales].data);
    product.bias = static_cast<const float*>(given[kBias].data);
    x.shape[x.dimensions - 1] = columns_;
    if (Status* status = make_output(context, x, &product.y)) return status;
    if (product.rows == 0) return nullptr;
    Multiplication work(product, best_path());
    if (!work.allocate()) return refuse(api_, "no memory for the rounded inputs");
    const auto each =
        at<Status* (*)(ort::Context*, void (*)(void*, size_t), size_t, size_t, void*)>(
            api_, ort::kKernelContextParallelFor);
    if (product.rows * product.inputs < kSideBySide) {
      for (int64_t row = 0; row < work.roundings(); ++row) work.round(row);
    } else if (Status* status = each(context, round, work.roundings(), 0, &work)) {
      return status;
    }
    return each(context, multiply, work.products(), 0, &work);
  }

 private:
  // Inputs that one thread rounds while others would only wake up.
  static constexpr int64_t kSideBySide = 1 << 16;

  explicit Operator(ort::Api api) : api_(api) {}

  static Status* refuse(ort::Api api, const char* reason) {
    return at<Status* (*)(int, const char*)>(api, ort::kCreateStatus)(ort::kInvalidArgument,
                                                                      reason);
  }

  static void round(void* work, size_t row) { static_cast<Multiplication*>(work)->round(row); }
  static void multiply(void* work, size_t task) {
    static_cast<Multiplication*>(work)->multiply(task);
  }

  Status* read(ort::Context* context, std::array<Tensor, kInputs>& given) const {
    const auto count =
        at<Status* (*)(ort::Context*, size_t*)>(api_, ort::kKernelContextGetInputCount);
    const auto get = at<Status* (*)(ort::Context*, size_t, const ort::Value**)>(
        api_, ort::kKernelContextGetInput);
    size_t inputs = 0;
    if (Status* status = count(context, &inputs)) return status;
    for (size_t i = 0; i < inputs && i < given.size(); ++i) {
      const ort::Value* value = nullptr;
      if (Status* status = get(context, i, &value)) return status;
      if (value == nullptr) continue;
      if (Status* status = read(value, given[i])) return status;
    }
    return nullptr;
  }

  Status* read(const ort::Value* value, Tensor& tensor) const {
    const auto data = at<Status* (*)(const ort::Value*, void**)>(api_, ort::kGetTensorMutableData);
    const auto shape =
        at<Status* (*)(const ort::Value*, ort::Shape**)>(api_, ort::kGetTensorTypeAndShape);
    const auto release = at<void (*)(ort::Shape*)>(api_, ort::kReleaseTensorTypeAndShapeInfo);
    if (Status* status = data(value, &tensor.data)) return status;
    ort::Shape* found = nullptr;
    if (Status* status = shape(value, &found)) return status;
    Status* status = read(found, tensor);
    release(found);
    return status;
  }

  Status* read(const ort::Shape* shape, Tensor& tensor) const {
    const auto count = at<Status* (*)(const ort::Shape*, size_t*)>(api_, ort::kGetDimensionsCount);
    const auto get =
        at<Status* (*)(const ort::Shape*, int64_t*, size_t)>(api_, ort::kGetDimensions);
    if (Status* status = count(shape, &tensor.dimensions)) return status;
    if (tensor.dimensions < 1 || tensor.dimensions > kMostDimensions) {
      return refuse(api_, "an input must have 1 to 4 dimensions");
    }
    return get(shape, tensor.shape, tensor.dimensions);
  }

  // What is wrong with the inputs, or null.
  const char* check(const std::array<Tensor, kInputs>& given) const {
    const int64_t blocks = (inputs_ + block_ - 1) / block_;
    const Tensor &x = given[kX], &bias = given[kBias];
    if (x.dimensions == 0 || x.shape[x.dimensions - 1] != inputs_) return "x must end with K";
    if (given[kValues].count() != columns_ * blocks * block_ / 2) return "B is not of N x K";
    if (given[kScales].count() != columns_ * blocks) return "scales are not those of N x K";
    if (given[kZeroPoints].dimensions != 0) return "zero points are not supported";
    if (given[kGroups].dimensions != 0) return "g_idx is not supported";
    if (bias.dimensions != 0 && bias.count() != columns_) return "bias is not of N";
    return nullptr;
  }

  Status* make_output(ort::Context* context, const Tensor& like, float** data) const {
    const auto get = at<Status* (*)(ort::Context*, size_t, const int64_t*, size_t, ort::Value**)>(
        api_, ort::kKernelContextGetOutput);
    const auto address = at<Status* (*)(ort::Value*, void**)>(api_, ort::kGetTensorMutableData);
    ort::Value* value = nullptr;
    if (Status* status = get(context, 0, like.shape, like.dimensions, &value)) return status;
    void* place = nullptr;
    if (Status* status = address(value, &place)) return status;
    *data = static_cast<float*>(place);
    return nullptr;
  }

  ort::Api api_;
  int64_t inputs_ = 0, columns_ = 0, block_ = 0;
};

inline size_t no_pairs(int**, int**) { return 0; }
inline void release_no_pairs(int*, int*) {}

// What ONNX Runtime asks of the operator.
inline ort::CustomOp description() {
  ort::CustomOp op{};
  op.version = ort::kVersion;
  op.name = [](const ort::CustomOp*) { return "MatMulNBits"; };
  op.provider = [](const ort::CustomOp*) { return "CPUExecutionProvider"; };
  op.input_count = [](const ort::CustomOp*) -> size_t { return kInputs; };
  op.input_type = [](const ort::CustomOp*, size_t i) -> int {
    if (i == kValues || i == kZeroPoints) return ort::kUint8;
    return i == kGroups ? ort::kInt32 : ort::kFloat;
  };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) -> int {
    return i < kZeroPoints ? ort::kRequired : ort::kOptional;
  };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.output_type = [](const ort::CustomOp*, size_t) -> int { return ort::kFloat; };
  op.output_characteristic = [](const ort::CustomOp*, size_t) -> int { return ort::kRequired; };
  op.variadic_input_arity = op.variadic_output_arity = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_homogeneity = op.variadic_output_homogeneity = op.variadic_input_arity;
  op.first_version = op.variadic_input_arity;
  op.last_version = [](const ort::CustomOp*) { return INT32_MAX; };
  op.create_checked = Operator::create;
  op.compute_checked = [](void* kernel, ort::Context* context) {
    return static_cast<Operator*>(kernel)->compute(context);
  };
  op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  op.may_inplace = op.aliases = no_pairs;
  op.release_may_inplace = op.release_aliases = release_no_pairs;
  return op;
}

}  // namespace ive::int4
