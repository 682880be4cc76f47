// A ragged batch: pages byte by byte as kernels.h describes them, attention in double precision.
#pragma once

#include "testing.h"

namespace offq {

struct Request {
  int length, new_tokens;
};

struct Batch {
  std::vector<Request> requests;
  int kv_heads, heads_per_kv, head_size, group_size, block_size;
  int sliding_window = 0;
  DType dtype = DType::kFloat32;
  bool rotated = false, heads_first = false;
  bool extreme = false;  // almost all codes at the top of the grid

  int heads() const { return kv_heads * heads_per_kv; }
  int new_tokens() const {
    int sum = 0;
    for (const Request& request : requests) sum += request.new_tokens;
    return sum;
  }
  std::string name() const {
    std::string result = "attention";
    for (const auto& [length, count] : requests) {
      result += " " + std::to_string(count) + " of " + std::to_string(length) + ",";
    }
    for (int number : {kv_heads, heads_per_kv, head_size, group_size, block_size, sliding_window,
                       int(dtype), int(rotated), int(heads_first), int(extreme)}) {
      result += " " + std::to_string(number);
    }
    return result;
  }
};

class AttentionProblem {
 public:
  explicit AttentionProblem(const Batch& batch)
      : batch_(batch),
        random_(batch.new_tokens() + batch.block_size),
        query_(batch.dtype, query_size()),
        key_(batch.dtype, 0),
        value_(batch.dtype, 0) {
    make_pages();
    make_rotation();
    make_context();
    for (int t = 0; t < batch_.new_tokens(); ++t) {
      for (int i = 0; i < batch_.heads() * batch_.head_size; ++i) {
        query_.set(t * query_stride() + i, batch_.extreme ? 1.0f : 2.0f * random_.normal());
      }
    }
  }

  int query_stride() const { return batch_.heads() * batch_.head_size + 16; }
  int query_size() const { return batch_.new_tokens() * query_stride() - 16; }
  Floats& query() { return query_; }

  std::vector<uint8_t> store(int isa) {
    std::vector<uint8_t> cache(expected_.size(), 0xFF);
    KVStore a{};
    a.key = key_.data();
    a.value = value_.data();
    a.tokens = slots_.size();
    a.key_stride = a.value_stride = batch_.kv_heads * batch_.head_size;
    a.dtype = static_cast<int32_t>(batch_.dtype);
    a.key_rotation = batch_.rotated ? rotation_.data() : nullptr;
    a.slot_mapping = slots_.data();
    a.kv_cache = cache.data();
    a.page = page_;
    check(offq_kv_store(isa, &a) == 0, "no memory");
    return cache;
  }
  const std::vector<uint8_t>& expected_pages() const { return expected_; }

  Floats attend(int isa) {
    Floats output(batch_.dtype, query_size());
    Attention a{};
    a.query = query_.data();
    a.output = output.data();
    a.query_stride = a.output_stride = query_stride();
    a.num_heads = batch_.heads();
    a.dtype = static_cast<int32_t>(batch_.dtype);
    a.scale = scale();
    a.query_rotation = batch_.rotated ? rotation_.data() : nullptr;
    a.requests = batch_.requests.size();
    a.query_start_loc = bounds_.data();
    a.seq_lens = lengths_.data();
    a.block_table = block_table_.data();
    a.block_table_stride = block_table_stride_;
    a.sliding_window = batch_.sliding_window;
    a.kv_cache = expected_.data();
    a.page = page_;
    check(offq_paged_attention(isa, &a) == 0, "no memory");
    return output;
  }

  void compare(const Floats& output) const {
    Comparison comparison;
    for (size_t r = 0; r < batch_.requests.size(); ++r) {
      const auto [length, new_tokens] = batch_.requests[r];
      for (int i = 0; i < new_tokens; ++i) {
        for (int head = 0; head < batch_.heads(); ++head) {
          const int row = (bounds_[r] + i) * query_stride() + head * batch_.head_size;
          const std::vector<double> expected =
              attend_one(r, row, head / batch_.heads_per_kv, length - new_tokens + i);
          for (int d = 0; d < batch_.head_size; ++d) {
            comparison.add({static_cast<int>(r), i, head, d}, output[row + d], expected[d],
                           1e-3 + output.rounding(expected[d]));
          }
        }
      }
    }
    comparison.finish();
  }

 private:
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(batch_.head_size)); }

  void make_pages() {
    const int groups = batch_.head_size / batch_.group_size;
    const int region = batch_.block_size * (batch_.head_size + 8 * groups);
    int used = 0, most = 0;
    for (const Request& request : batch_.requests) {
      const int count = (request.length + batch_.block_size - 1) / batch_.block_size;
      used += count;
      most = std::max(most, count);
    }
    const int blocks = used + 2;
    page_.num_kv_heads = batch_.kv_heads;
    page_.head_size = batch_.head_size;
    page_.block_size = batch_.block_size;
    page_.group_size = batch_.group_size;
    page_.block_stride = batch_.heads_first ? region : region * batch_.kv_heads + 32;
    page_.head_stride = batch_.heads_first ? region * blocks : region;
    const int64_t last_head = (batch_.kv_heads - 1) * page_.head_stride;
    expected_.assign((blocks - 1) * page_.block_stride + last_head + region, 0xFF);
    block_table_stride_ = most + 1;
    block_table_.assign(batch_.requests.size() * block_table_stride_, 1 << 30);
    const std::vector<int> order = random_.permutation(blocks);
    bounds_.push_back(0);
    int next = 0;
    for (size_t r = 0; r < batch_.requests.size(); ++r) {
      const auto [length, new_tokens] = batch_.requests[r];
      lengths_.push_back(length);
      bounds_.push_back(bounds_.back() + new_tokens);
      for (int b = 0; b * batch_.block_size < length; ++b) {
        block_table_[r * block_table_stride_ + b] = order[next++];
      }
    }
  }

  // Of each KV head a permutation with signs: every order of summation gives the same floats.
  void make_rotation() {
    const int n = batch_.head_size;
    rotation_.assign(batch_.kv_heads * n * n, 0.0f);
    for (int head = 0; head < batch_.kv_heads; ++head) {
      const std::vector<int> target = random_.permutation(n);
      for (int i = 0; i < n; ++i) {
        rotation_[(head * n + i) * n + target[i]] = random_.integer(0, 1) ? 1.0f : -1.0f;
      }
    }
  }

  std::vector<float> rotate(std::vector<float> x, int kv_head) const {
    if (!batch_.rotated) return x;
    const int n = batch_.head_size;
    std::vector<float> result(n, 0.0f);
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) result[j] += x[i] * rotation_[(kv_head * n + i) * n + j];
    }
    return result;
  }

  // Tokens in any order, and padding among them.
  void make_context() {
    for (size_t r = 0; r < batch_.requests.size(); ++r) {
      for (int i = 0; i < batch_.requests[r].length; ++i) slots_.push_back(slot(r, i));
    }
    for (int i = 0; i < 3; ++i) slots_.push_back(-1);
    std::vector<int64_t> shuffled;
    for (int i : random_.permutation(slots_.size())) shuffled.push_back(slots_[i]);
    slots_ = shuffled;
    const int n = batch_.head_size;
    keys_.resize(expected_.size());
    values_.resize(expected_.size());
    key_ = Floats(batch_.dtype, slots_.size() * batch_.kv_heads * n);
    value_ = key_;
    for (size_t i = 0; i < slots_.size() * batch_.kv_heads; ++i) {
      const int64_t slot = slots_[i / batch_.kv_heads];
      if (slot < 0) continue;
      const int head = i % batch_.kv_heads;
      std::vector<float> key(n), value(n);
      for (int d = 0; d < n; ++d) {
        const float extreme = d % batch_.group_size ? 1.0f : -1.0f;
        key_.set(i * n + d, batch_.extreme ? extreme : random_.normal() + 1.0f);
        value_.set(i * n + d, batch_.extreme ? extreme : random_.normal() - 0.5f);
        key[d] = key_[i * n + d];
        value[d] = value_[i * n + d];
      }
      keys_[slot * batch_.kv_heads + head] = put(slot, head, rotate(key, head), 0);
      values_[slot * batch_.kv_heads + head] = put(slot, head, value, 1);
    }
  }

  int64_t slot(int request, int position) const {
    const int64_t block = block_table_[request * block_table_stride_ + position / page_.block_size];
    return block * page_.block_size + position % page_.block_size;
  }

  // Writes one key (kind 0) or value (kind 1) into its page; returns what it has become.
  std::vector<double> put(int64_t slot, int head, const std::vector<float>& x, int kind) {
    uint8_t* region =
        &expected_.at(slot / page_.block_size * page_.block_stride + head * page_.head_stride);
    const int t = slot % page_.block_size;
    std::vector<double> result;
    for (int g = 0; g < page_.groups(); ++g) {
      const Group group(&x[g * page_.group_size], page_.group_size, static_cast<float>(1.0 / 15.0),
                        false, true);
      for (int i = 0; i < page_.group_size; ++i) {
        const int channel = g * page_.group_size + i, code = group.codes[i];
        if (kind == 0) {
          put_code(region, page_.head_size, t, channel, code);
        } else {
          put_code(region + page_.value_start(), page_.block_size, channel, t, code);
        }
        result.push_back(double{group.scale} * code + group.offset);
      }
      for (int parameter = 0; parameter < 2; ++parameter) {
        const uint16_t half = float_to_half(parameter ? group.offset : group.scale);
        const int64_t at = ((2 * kind + parameter) * page_.groups() + g) * page_.block_size + t;
        std::memcpy(region + page_.parameters_start() + 2 * at, &half, 2);
      }
    }
    return result;
  }

  // Code of channel n at input k, in tiles with `inputs` inputs.
  static void put_code(uint8_t* tiles, int inputs, int n, int k, int code) {
    uint8_t& byte = tiles[(n / kTile * (inputs / kBlock) + k / kBlock) * kTileBlockBytes +
                          n % kTile * 4 + k % 4];
    byte = k % kBlock < 4 ? (byte & 0xF0) | (code + 8) : (byte & 0x0F) | (code + 8) << 4;
  }

  std::vector<double> attend_one(int request, int row, int kv_head, int position) const {
    std::vector<float> query(batch_.head_size);
    for (int d = 0; d < batch_.head_size; ++d) query[d] = query_[row + d];
    query = rotate(query, kv_head);
    const int window = batch_.sliding_window;
    const int first = window ? std::max(0, position + 1 - window) : 0;
    std::vector<double> weights;
    double maximum = -INFINITY, total = 0.0;
    for (int i = first; i <= position; ++i) {
      const std::vector<double>& key = keys_[slot(request, i) * batch_.kv_heads + kv_head];
      double score = 0.0;
      for (int d = 0; d < batch_.head_size; ++d) score += query[d] * key[d];
      weights.push_back(score * scale());
      maximum = std::max(maximum, weights.back());
    }
    for (double& weight : weights) total += weight = std::exp(weight - maximum);
    std::vector<double> result(batch_.head_size);
    for (int i = first; i <= position; ++i) {
      const std::vector<double>& value = values_[slot(request, i) * batch_.kv_heads + kv_head];
      for (int d = 0; d < batch_.head_size; ++d) result[d] += weights[i - first] / total * value[d];
    }
    return result;
  }

  Batch batch_;
  Random random_;
  Floats query_, key_, value_;
  PageLayout page_{};
  std::vector<uint8_t> expected_;  // the pages; slots that are not used stay 0xFF
  std::vector<int32_t> block_table_, lengths_, bounds_;
  int64_t block_table_stride_ = 0;
  std::vector<float> rotation_;
  std::vector<int64_t> slots_;
  std::vector<std::vector<double>> keys_, values_;  // by slot and KV head, as the grid sees them
};

}  // namespace offq
