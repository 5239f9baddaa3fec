// The part of ONNX Runtime's C interface that a custom operator needs, without its headers, which
// no package brings. Functions are named by their place in OrtApi, which only ever grows at its
// end; structures are those of version 17.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ive::ort {

constexpr uint32_t kVersion = 17;

enum Place {
  kCreateStatus = 0,
  kGetTensorMutableData = 51,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kKernelInfoGetAttributeFloat = 85,
  kKernelInfoGetAttributeInt64 = 86,
  kKernelContextGetInputCount = 88,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextParallelFor = 274,
};

enum ElementType { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10 };
enum Characteristic { kRequired = 0, kOptional = 1 };
enum ErrorCode { kFail = 1, kInvalidArgument = 2 };

struct Status;  // null: all is well
struct Value;
struct Info;
struct Context;
struct Shape;
struct Domain;
struct Options;

using Api = void* const*;

struct ApiBase {
  Api (*get)(uint32_t version);
  const char* (*version)();
};

template <typename Function>
Function at(Api api, Place place) {
  return reinterpret_cast<Function>(api[place]);
}

// OrtCustomOp.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, Api, const Info*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, size_t);
  size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, size_t);
  size_t (*output_count)(const CustomOp*);
  void (*compute)(void*, Context*);
  void (*destroy)(void*);
  int (*input_characteristic)(const CustomOp*, size_t);
  int (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory)(const CustomOp*, size_t);
  int (*variadic_input_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_checked)(const CustomOp*, Api, const Info*, void**);
  Status* (*compute_checked)(void*, Context*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int (*first_version)(const CustomOp*);
  int (*last_version)(const CustomOp*);
  size_t (*may_inplace)(int**, int**);
  void (*release_may_inplace)(int*, int*);
  size_t (*aliases)(int**, int**);
  void (*release_aliases)(int*, int*);
};

}  // namespace ive::ort
