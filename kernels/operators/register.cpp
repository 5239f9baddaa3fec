// The operators of the library, as ONNX Runtime takes them.
#include "../attention/operator.h"
#include "../blocks/operator.h"
#include "../vision/attention_operator.h"
#include "exported.h"

namespace ort = ive::ort;

// Called by ONNX Runtime for every session whose options name this library.
IVE_EXPORT ort::Status* RegisterCustomOps(ort::Options* options, const ort::ApiBase* base) {
  static const ort::CustomOp kOperators[] = {
      ort::describe<ive::blocks::Operator>(),
      ort::describe<ive::attention::Operator<ort::kFloat>>(),
      ort::describe<ive::attention::Operator<ort::kFloat16>>(),
      ort::describe<ive::vision::NormOperator<false, false>>(),
      ort::describe<ive::vision::NormOperator<false, true>>(),
      ort::describe<ive::vision::NormOperator<true, false>>(),
      ort::describe<ive::vision::NormOperator<true, true>>(),
      ort::describe<ive::vision::GeluOperator>(),
      ort::describe<ive::vision::GeluRoundedOperator>(),
      ort::describe<ive::vision::ProductOperator>(),
      ort::describe<ive::vision::AttentionOperator<false>>(),
      ort::describe<ive::vision::AttentionOperator<true>>(),
  };
  const ort::Api api = base->get(ort::kVersion);
  const auto create =
      ort::at<ort::Status* (*)(const char*, ort::Domain**)>(api, ort::kCreateCustomOpDomain);
  const auto add =
      ort::at<ort::Status* (*)(ort::Domain*, const ort::CustomOp*)>(api, ort::kCustomOpDomainAdd);
  const auto give =
      ort::at<ort::Status* (*)(ort::Options*, ort::Domain*)>(api, ort::kAddCustomOpDomain);
  ort::Domain* domain = nullptr;
  if (ort::Status* status = create("internvl_edge", &domain)) return status;
  for (const ort::CustomOp& op : kOperators) {
    if (ort::Status* status = add(domain, &op)) return status;
  }
  return give(options, domain);
}
