// What every operator of ours shares: its attributes, inputs, outputs and threads, as ONNX Runtime
// has them.
#pragma once

#include <cstring>
#include <iterator>
#include <memory>
#include <new>
#include <utility>

#include "abi.h"

namespace ive::ort {

constexpr int kMostDimensions = 4;

// An input, or the shape of an output; one that is absent has no dimensions.
struct Tensor {
  void* data = nullptr;
  int64_t shape[kMostDimensions] = {};
  size_t dimensions = 0;

  bool given() const { return dimensions != 0; }
  int64_t last() const { return given() ? shape[dimensions - 1] : 0; }
  int64_t count() const {
    int64_t product = 1;
    for (size_t i = 0; i < dimensions; ++i) product *= shape[i];
    return product;
  }
};

inline Status* refuse(Api api, const char* reason) {
  return at<Status* (*)(int, const char*)>(api, kCreateStatus)(kInvalidArgument, reason);
}

using Attribute = std::pair<const char*, int64_t*>;

// Reads attributes that are integers, all of which must be there.
template <size_t count>
Status* read_attributes(Api api, const Info* info, const Attribute (&attributes)[count]) {
  const auto get =
      at<Status* (*)(const Info*, const char*, int64_t*)>(api, kKernelInfoGetAttributeInt64);
  for (const auto& [name, value] : attributes) {
    if (Status* status = get(info, name, value)) return status;
  }
  return nullptr;
}

// Reads an attribute that is a float, which must be there.
inline Status* read_attribute(Api api, const Info* info, const char* name, float* value) {
  return at<Status* (*)(const Info*, const char*, float*)>(api, kKernelInfoGetAttributeFloat)(
      info, name, value);
}

// One run of an operator.
class Call {
 public:
  // Waits while others go first; whether they may want to again before long.
  using Rest = bool (*)();

  Call(Api api, Context* context, Rest rest) : api_(api), context_(context), rest_(rest) {}

  Status* refuse(const char* reason) const { return ort::refuse(api_, reason); }

  // Reads the inputs that are there; those beyond the array are left.
  template <size_t count>
  Status* read(Tensor (&inputs)[count]) const {
    const auto number = at<Status* (*)(Context*, size_t*)>(api_, kKernelContextGetInputCount);
    const auto get = at<Status* (*)(Context*, size_t, const Value**)>(api_, kKernelContextGetInput);
    size_t given = 0;
    if (Status* status = number(context_, &given)) return status;
    for (size_t i = 0; i < given && i < count; ++i) {
      const Value* value = nullptr;
      if (Status* status = get(context_, i, &value)) return status;
      if (value == nullptr) continue;
      if (Status* status = read(value, inputs[i])) return status;
    }
    return nullptr;
  }

  // Makes an output of the shape that `like` has.
  template <typename T>
  Status* make(size_t index, const Tensor& like, T** data) const {
    const auto get = at<Status* (*)(Context*, size_t, const int64_t*, size_t, Value**)>(
        api_, kKernelContextGetOutput);
    const auto address = at<Status* (*)(Value*, void**)>(api_, kGetTensorMutableData);
    Value* value = nullptr;
    if (Status* status = get(context_, index, like.shape, like.dimensions, &value)) return status;
    void* place = nullptr;
    if (Status* status = address(value, &place)) return status;
    *data = static_cast<T*>(place);
    return nullptr;
  }

  // Runs task(work, i) for every i below count, side by side on the session's threads: each gets
  // as many as the others, or, cut into so many `parts`, another part when it is done with one.
  // Who rests does so before, and in between where others come and go.
  Status* each(void (*task)(void*, size_t), size_t count, void* work, size_t parts = 0) const {
    if (rest_ == nullptr) return side_by_side(task, count, work, parts);
    const size_t step = rest_() ? (count + kPieces - 1) / kPieces : count;
    for (Piece piece{task, work, 0}; piece.first < count; piece.first += step) {
      if (piece.first != 0) rest_();
      const size_t left = count - piece.first, some = left < step ? left : step;
      if (Status* status = side_by_side(Piece::run, some, &piece, parts)) return status;
    }
    return nullptr;
  }

 private:
  // Between which an operator rests.
  static constexpr size_t kPieces = 8;

  // Some of the tasks, which are numbered from `first` on.
  struct Piece {
    void (*task)(void*, size_t);
    void* work;
    size_t first;

    static void run(void* self, size_t i) {
      const auto& piece = *static_cast<const Piece*>(self);
      piece.task(piece.work, piece.first + i);
    }
  };

  Status* side_by_side(void (*task)(void*, size_t), size_t count, void* work, size_t parts) const {
    return at<Status* (*)(Context*, void (*)(void*, size_t), size_t, size_t, void*)>(
        api_, kKernelContextParallelFor)(context_, task, count, parts, work);
  }

  Status* read(const Value* value, Tensor& tensor) const {
    const auto data = at<Status* (*)(const Value*, void**)>(api_, kGetTensorMutableData);
    const auto shape = at<Status* (*)(const Value*, Shape**)>(api_, kGetTensorTypeAndShape);
    const auto release = at<void (*)(Shape*)>(api_, kReleaseTensorTypeAndShapeInfo);
    if (Status* status = data(value, &tensor.data)) return status;
    Shape* found = nullptr;
    if (Status* status = shape(value, &found)) return status;
    Status* status = read(found, tensor);
    release(found);
    return status;
  }

  Status* read(const Shape* shape, Tensor& tensor) const {
    const auto count = at<Status* (*)(const Shape*, size_t*)>(api_, kGetDimensionsCount);
    const auto get = at<Status* (*)(const Shape*, int64_t*, size_t)>(api_, kGetDimensions);
    if (Status* status = count(shape, &tensor.dimensions)) return status;
    if (tensor.dimensions > kMostDimensions) {
      return refuse("an input must have 4 dimensions at most");
    }
    if (tensor.dimensions == 0) {  // a single value
      tensor.dimensions = tensor.shape[0] = 1;
      return nullptr;
    }
    return get(shape, tensor.shape, tensor.dimensions);
  }

  Api api_;
  Context* context_;
  Rest rest_;
};

struct Input {
  ElementType type;
  Characteristic need;
};

// What ONNX Runtime asks of an operator: a class with its kName, its kInputs, the types of its
// kOutputs, start(api, info), which returns why it cannot be, and compute(call).
template <typename Operator, Call::Rest kRest = nullptr>
CustomOp describe() {
  CustomOp op{};
  op.version = kVersion;
  op.name = [](const CustomOp*) { return Operator::kName; };
  op.provider = [](const CustomOp*) { return "CPUExecutionProvider"; };
  op.input_count = [](const CustomOp*) { return std::size(Operator::kInputs); };
  op.input_type = [](const CustomOp*, size_t i) -> int { return Operator::kInputs[i].type; };
  op.input_characteristic = [](const CustomOp*, size_t i) -> int {
    return Operator::kInputs[i].need;
  };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  op.output_count = [](const CustomOp*) { return std::size(Operator::kOutputs); };
  op.output_type = [](const CustomOp*, size_t i) -> int { return Operator::kOutputs[i]; };
  op.output_characteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op.variadic_input_arity = op.variadic_output_arity = [](const CustomOp*) { return 1; };
  op.variadic_input_homogeneity = op.variadic_output_homogeneity = op.variadic_input_arity;
  op.first_version = op.variadic_input_arity;
  op.last_version = [](const CustomOp*) { return INT32_MAX; };
  op.create_checked = [](const CustomOp*, Api api, const Info* info, void** made) -> Status* {
    std::unique_ptr<Operator> self(new (std::nothrow) Operator);
    if (self == nullptr) return refuse(api, "no memory for the operator");
    self->api = api;
    if (Status* status = self->start(info)) return status;
    *made = self.release();
    return nullptr;
  };
  op.compute_checked = [](void* kernel, Context* context) {
    const auto* self = static_cast<const Operator*>(kernel);
    return self->compute(Call(self->api, context, kRest));
  };
  op.destroy = [](void* kernel) { delete static_cast<Operator*>(kernel); };
  op.may_inplace = op.aliases = [](int**, int**) -> size_t { return 0; };
  op.release_may_inplace = op.release_aliases = [](int*, int*) {};
  return op;
}

// Operators of a room.
struct Operators {
  const CustomOp* all;
  size_t count;
};

}  // namespace ive::ort
