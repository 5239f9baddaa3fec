// Attention as an operator for ONNX Runtime.
#pragma once

#include "operators.h"

namespace ive::vision {

// MultiHeadAttention of (tiles, tokens, width), of queries and keys that are normed before where
// there are weights for it; rounded or not.
template <bool kRounds>
class AttentionOperator {
 public:
  static constexpr const char* kName = kRounds ? "IntegerAttentionRounded" : "IntegerAttention";
  // Query, key, value; weights of the norms; scale, zero point, factors.
  static constexpr ort::Input kAll[] = {kNeeded,  kNeeded, kNeeded,    kPerhaps,
                                        kPerhaps, kNeeded, kZeroPoint, kPerhaps};
  static constexpr size_t kCount = kRounds ? 8 : 5;
  static constexpr auto kInputs = [] {
    std::array<ort::Input, kCount> inputs{};
    for (size_t i = 0; i < kCount; ++i) inputs[i] = kAll[i];
    return inputs;
  }();
  static constexpr ort::ElementType kOutputs[] = {kRounds ? ort::kUint8 : ort::kFloat};

  ort::Status* start(const ort::Info* info) {
    const ort::Attribute attributes[] = {{"num_heads", &heads_}};
    if (ort::Status* status = ort::read_attributes(api, info, attributes)) return status;
    if (heads_ < 1) return ort::refuse(api, "there must be a head");
    return ort::read_attribute(api, info, "epsilon", &epsilon_);
  }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[8], read[kCount];
    if (ort::Status* status = call.read(read)) return status;
    std::copy(read, read + kCount, given);
    if (const char* wrong = check(given)) return call.refuse(wrong);
    Work work{};
    Attention& a = work.attention;
    const ort::Tensor& query = given[kQuery];
    a.tiles = query.shape[0], a.tokens = query.shape[1];
    a.heads = heads_, a.size = query.last() / heads_, a.epsilon = epsilon_;
    a.query = floats(query), a.key = floats(given[kKey]), a.value = floats(given[kValue]);
    a.query_weight = floats(given[kQueryWeight]), a.key_weight = floats(given[kKeyWeight]);
    if (kRounds) {
      const char* wrong =
          read_rounding(given[kScale], given[kZero], given[kFactors], query.last(), a.out.rounding);
      if (wrong != nullptr) return call.refuse(wrong);
    }
    if (ort::Status* status = make_output<kRounds>(call, query, a.out)) return status;
    if (query.count() == 0) return nullptr;
    if (!work.packed.allocate(a)) return call.refuse("no memory for the rounded tokens");
    for (; work.tile < a.tiles; ++work.tile) {
      if (ort::Status* status = call.each(pack, packings(work.packed), &work)) return status;
      if (ort::Status* status = call.each(attend, attendings(a), &work)) return status;
    }
    return nullptr;
  }

  ort::Api api = nullptr;

 private:
  enum { kQuery, kKey, kValue, kQueryWeight, kKeyWeight, kScale, kZero, kFactors };

  // One tile after the other: what is packed of one stays in cache.
  struct Work {
    Attention attention;
    Packed packed;
    int64_t tile;
  };

  static void pack(void* given, size_t run) {
    const auto& work = *static_cast<const Work*>(given);
    best_path().pack_run(work.attention, work.packed, work.tile, static_cast<int64_t>(run));
  }
  static void attend(void* given, size_t task) {
    const auto& work = *static_cast<const Work*>(given);
    best_path().attend(work.attention, work.packed, work.tile, static_cast<int64_t>(task));
  }

  // What is wrong with the inputs, or null.
  const char* check(const ort::Tensor (&given)[8]) const {
    const ort::Tensor& query = given[kQuery];
    const int64_t width = query.last();
    if (query.dimensions != 3) return "queries must have 3 dimensions";
    if (width % heads_ != 0 || width / heads_ > kMostSize) return "heads must be of 512 at most";
    for (const auto& other : {given[kKey], given[kValue]}) {
      if (other.count() != query.count()) return "keys and values must be as many as queries";
    }
    for (const auto& weight : {given[kQueryWeight], given[kKeyWeight]}) {
      if (weight.given() && weight.count() != width) return "a norm is not of every column";
    }
    return nullptr;
  }

  int64_t heads_ = 0;
  float epsilon_ = 0;
};

}  // namespace ive::vision
