// Entry points of the product: by itself, and as a custom operator of ONNX Runtime.
#include "operator.h"

#define IVE_EXPORT extern "C" __attribute__((visibility("default")))

using ive::int4::Multiplication;
using ive::int4::Path;
using ive::int4::Product;

// Names of the paths that run on this CPU, the fastest first; null past the last.
IVE_EXPORT const char* ive_int4_path(int32_t index) {
  for (const Path& path : ive::int4::kPaths) {
    if (path.runs_here() && index-- == 0) return path.name;
  }
  return nullptr;
}

// One product on this thread by the path of that index; 0, or 1 where there is no memory.
IVE_EXPORT int32_t ive_int4_multiply(const Product* product, int32_t index) {
  for (const Path& path : ive::int4::kPaths) {
    if (!path.runs_here() || index-- != 0) continue;
    Multiplication work(*product, path);
    if (!work.allocate()) return 1;
    for (int64_t i = 0; i < work.roundings(); ++i) work.round(i);
    for (int64_t i = 0; i < work.products(); ++i) work.multiply(i);
    return 0;
  }
  return 2;
}

// Called by ONNX Runtime for every session whose options name this library.
IVE_EXPORT ive::ort::Status* RegisterCustomOps(ive::ort::Options* options,
                                               const ive::ort::ApiBase* base) {
  namespace ort = ive::ort;
  static const ort::CustomOp kOp = ive::int4::description();
  const ort::Api api = base->get(ort::kVersion);
  const auto create =
      ort::at<ort::Status* (*)(const char*, ort::Domain**)>(api, ort::kCreateCustomOpDomain);
  const auto add =
      ort::at<ort::Status* (*)(ort::Domain*, const ort::CustomOp*)>(api, ort::kCustomOpDomainAdd);
  const auto give =
      ort::at<ort::Status* (*)(ort::Options*, ort::Domain*)>(api, ort::kAddCustomOpDomain);
  ort::Domain* domain = nullptr;
  if (ort::Status* status = create("internvl_edge", &domain)) return status;
  if (ort::Status* status = add(domain, &kOp)) return status;
  return give(options, domain);
}
