// The operators of the library, as ONNX Runtime takes them. Rooms are compiled by themselves.
#include "exported.h"
#include "operator.h"

namespace ort = ive::ort;

namespace ive::blocks {
ort::Operators operators();
}
namespace ive::attention {
ort::Operators operators();
}
namespace ive::vision {
ort::Operators operators();
}

// Called by ONNX Runtime for every session whose options name this library.
IVE_EXPORT ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  const ort::Api api = base->get(ort::kVersion);
  const auto create =
      ort::at<ort::Status* (*)(const char*, ort::Domain**)>(api, ort::kCreateCustomOpDomain);
  const auto add =
      ort::at<ort::Status* (*)(ort::Domain*, const ort::CustomOp*)>(api, ort::kCustomOpDomainAdd);
  const auto give =
      ort::at<ort::Status* (*)(ort::Options*, ort::Domain*)>(api, ort::kAddCustomOpDomain);
  ort::Domain* domain = nullptr;
  if (ort::Status* status = create("internvl_edge", &domain)) return status;
  for (const ort::Operators& room :
       {ive::blocks::operators(), ive::attention::operators(), ive::vision::operators()}) {
    for (size_t i = 0; i < room.count; ++i) {
      if (ort::Status* status = add(domain, room.all + i)) return status;
    }
  }
  return give(options, domain);
}
