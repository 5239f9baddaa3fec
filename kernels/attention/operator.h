// Attention as operators: over caches of the type given or of int8, and by type.
#pragma once

#include "../operators/operator.h"
#include "driver.h"

namespace ive::attention {

template <ort::ElementType kType>
class Operator {
 public:
  static constexpr const char* kName =
      kType == ort::kFloat ? "CachedAttention" : "CachedAttentionOfHalves";
  // Queries, keys and values apart, or all in the first; sequences, see `Field`; rotary angles of
  // each row, or none; scales of keys and values, where the caches are of int8.
  static constexpr ort::Input kInputs[] = {
      {kType, ort::kRequired},       {kType, ort::kOptional},      {kType, ort::kOptional},
      {ort::kInt64, ort::kRequired}, {kType, ort::kOptional},      {kType, ort::kOptional},
      {ort::kFloat, ort::kOptional}, {ort::kFloat, ort::kOptional}};
  static constexpr ort::ElementType kOutputs[] = {kType};

  ort::Status* start(const ort::Info* info) {
    const ort::Attribute attributes[] = {{"num_heads", &heads_},
                                         {"kv_num_heads", &kv_heads_},
                                         {"head_size", &head_},
                                         {"layer", &layer_}};
    if (ort::Status* status = ort::read_attributes(api, info, attributes)) return status;
    if (kv_heads_ < 1 || heads_ < 1 || heads_ % kv_heads_ != 0 || layer_ < 0) {
      return ort::refuse(api, "kv_num_heads must divide num_heads");
    }
    if (head_ % 8 != 0 || head_ < 8 || head_ > kMostHead) {
      return ort::refuse(api, "heads must be of 8 to 256 values, in eights");
    }
    return nullptr;
  }

  ort::Status* compute(const ort::Call& call) const {
    ort::Tensor given[std::size(kInputs)];
    if (ort::Status* status = call.read(given)) return status;
    Pass pass{};
    if (const char* wrong = read(given, pass)) return call.refuse(wrong);
    ort::Tensor out{nullptr, {1, pass.rows, pass.heads * pass.head}, 3};
    if (ort::Status* status = call.make(0, out, reinterpret_cast<char**>(&pass.out))) return status;
    Work work(pass, best_path());
    if (!work.allocate()) return call.refuse("no memory for attention");
    if (pass.rows * pass.kv_heads * pass.head < kSideBySide) {
      for (int64_t i = 0; i < work.appends(); ++i) work.append(i);
    } else if (ort::Status* status = call.each(append, work.appends(), &work)) {
      return status;
    }
    if (ort::Status* status = call.each(attend, work.tasks(), &work, work.tasks())) return status;
    for (int64_t i = 0; i < work.merges(); ++i) work.merge(i);
    return work.failed() ? call.refuse("no memory for attention") : nullptr;
  }

  ort::Api api = nullptr;

 private:
  enum { kQuery, kKey, kValue, kSequences, kCos, kSin, kKeyScales, kValueScales };
  // Values that one thread writes while others would only wake up.
  static constexpr int64_t kSideBySide = 1 << 16;

  static void append(void* work, size_t row) { static_cast<Work*>(work)->append(row); }
  static void attend(void* work, size_t task) { static_cast<Work*>(work)->attend(task); }

  // Reads the inputs; what is wrong with them, or null.
  const char* read(const ort::Tensor (&given)[std::size(kInputs)], Pass& p) const {
    const ort::Tensor &query = given[kQuery], &sequences = given[kSequences];
    const bool packed = !given[kKey].given();
    p.heads = heads_, p.kv_heads = kv_heads_, p.layer = layer_;
    const int64_t heads_in = packed ? heads_ + 2 * kv_heads_ : heads_;
    p.head = head_;
    if (query.last() != heads_in * head_) return "queries are not of these heads";
    p.rows = query.count() / query.last();
    p.query_apart = query.last();
    p.query = query.data, p.key = given[kKey].data, p.value = given[kValue].data;
    p.key_apart = p.value_apart = p.query_apart;
    if (packed) {
      p.key = value_at(query.data, kGiven, heads_ * p.head);
      p.value = value_at(query.data, kGiven, (heads_ + kv_heads_) * p.head);
    } else {
      p.key_apart = p.value_apart = kv_heads_ * p.head;
      const int64_t wanted = p.rows * p.key_apart;
      if (given[kKey].count() != wanted || given[kValue].count() != wanted) {
        return "keys and values are not those of the queries";
      }
    }
    p.sequences = static_cast<const int64_t*>(sequences.data);
    p.fields = sequences.last(), p.count = sequences.count() / (p.fields > 0 ? p.fields : 1);
    if (sequences.dimensions != 2 ||
        p.fields < static_cast<int>(Field::kAddresses) + 2 * layer_ + 2) {
      return "sequences have no addresses of this layer";
    }
    if (const char* wrong = read_angles(given[kCos], given[kSin], p)) return wrong;
    if (const char* wrong = read_scales(given[kKeyScales], given[kValueScales], p)) return wrong;
    return wrong_sequences(p);
  }

  static const char* read_angles(const ort::Tensor& cos, const ort::Tensor& sin, Pass& p) {
    if (cos.given() != sin.given()) return "there must be both rotary tables or none";
    if (!cos.given()) return nullptr;
    const int64_t wanted = p.rows * p.head / 2;
    if (cos.count() != wanted || sin.count() != wanted) return "rotary tables are not of the rows";
    p.cos = cos.data, p.sin = sin.data;
    return nullptr;
  }

  static const char* read_scales(const ort::Tensor& keys, const ort::Tensor& values, Pass& p) {
    p.given = p.cached = kGiven;
    if (keys.given() != values.given()) return "there must be scales of both or none";
    if (!keys.given()) return nullptr;
    const int64_t wanted = p.kv_heads * p.head;
    if (keys.count() != wanted || values.count() != wanted) return "scales are not of the heads";
    p.cached = kInt8;
    p.key_scales = static_cast<const float*>(keys.data);
    p.value_scales = static_cast<const float*>(values.data);
    return nullptr;
  }

  static constexpr Kind kGiven = kType == ort::kFloat ? kFloat : kHalf;

  int64_t heads_ = 0, kv_heads_ = 0, head_ = 0, layer_ = 0;
};

}  // namespace ive::attention
