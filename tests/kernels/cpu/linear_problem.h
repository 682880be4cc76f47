// A linear layer: its tensors as the kernels take them, and sums in double precision over the codes
// that the grid defines.
#pragma once

#include "testing.h"

namespace offq {

// kIntegers: every scale is 1 and every offset 0, so that results are exact.
enum class Codes { kRandom, kLowest, kHighest, kIntegers };

struct Layer {
  int tokens, groups, group_size, out_features;
  bool scale_per_group = false, bias = false, symmetric = false;
  DType dtype = DType::kFloat32;
  int hadamard_block = 0, hadamard_core = 1;
  Codes codes = Codes::kRandom;
  int bits = 4;

  int in_features() const { return groups * group_size; }
  int segment_size() const {
    int parts = 1;
    while (group_size > parts * kMaxSegment || group_size % parts) ++parts;
    return group_size / parts;
  }
  int segments() const { return in_features() / segment_size(); }
  int tiles() const { return (out_features + kTile - 1) / kTile; }
  std::string name() const {
    std::string result = "linear";
    for (int number :
         {tokens, groups, group_size, out_features, int(scale_per_group), int(bias), int(symmetric),
          int(dtype), hadamard_block, hadamard_core, int(codes), bits}) {
      result += " " + std::to_string(number);
    }
    return result;
  }
};

class LinearProblem {
 public:
  explicit LinearProblem(const Layer& layer)
      : layer_(layer),
        x_(layer.dtype, layer.tokens ? (layer.tokens - 1) * stride() + layer.in_features() : 0),
        bias_(layer.dtype, layer.out_features),
        codes_(layer.out_features * layer.in_features()),
        matrix_(layer.hadamard_core * layer.hadamard_core) {
    Random random(layer.tokens + layer.group_size);
    for (int t = 0; t < layer.tokens; ++t) {
      for (int k = 0; k < layer.in_features(); ++k) {
        x_.set(t * stride() + k, input(k % layer.group_size, &random));
      }
    }
    for (int8_t& code : codes_) {
      code = layer.codes == Codes::kLowest    ? -8
             : layer.codes == Codes::kHighest ? 7
                                              : random.integer(-8, 7);
    }
    for (float& sign : matrix_) sign = random.integer(0, 1) ? 1.0f : -1.0f;
    for (int n = 0; n < layer.out_features; ++n) bias_.set(n, random.normal());
    const int scales = layer.scale_per_group ? layer.segments() : 1;
    scale_.resize(layer.tiles() * scales * kTile);
    for (uint16_t& scale : scale_) {
      const float random_scale = 0.01f + std::abs(random.normal());
      scale = float_to_half(layer.codes == Codes::kIntegers ? 1.0f : random_scale);
    }
    if (layer.group_size > layer.segment_size()) share_scales();
    pack();
  }

  Floats& x() { return x_; }
  int64_t stride() const { return layer_.in_features() + 3; }

  Floats run(int isa) {
    Floats y(layer_.dtype, layer_.tokens * layer_.out_features);
    const Linear arguments = describe(&y);
    check(offq_linear(isa, &arguments) == 0, "no memory");
    return y;
  }

  Linear describe(Floats* y) {
    Linear a{};
    a.x = x_.data();
    a.y = y->data();
    a.bias = layer_.bias ? bias_.data() : nullptr;
    a.tokens = layer_.tokens;
    a.in_features = layer_.in_features();
    a.out_features = layer_.out_features;
    a.x_stride = stride();
    a.weight_codes = packed_.data();
    a.weight_sums = sums_.data();
    a.weight_scale = scale_.data();
    a.segment_size = layer_.segment_size();
    a.scale_per_group = layer_.scale_per_group;
    a.dtype = static_cast<int32_t>(layer_.dtype);
    a.grid.group_size = layer_.group_size;
    a.grid.symmetric = layer_.symmetric;
    a.grid.bits = layer_.bits;
    const float levels = (1 << layer_.bits) - 1;
    a.grid.range_to_scale = layer_.symmetric ? 0.9f / (levels / 2 - 0.5f) : 1.0f / levels;
    a.grid.hadamard_block = layer_.hadamard_block;
    a.grid.hadamard_core = layer_.hadamard_core;
    if (layer_.hadamard_block) a.grid.hadamard_norm = 1.0f / std::sqrt(layer_.hadamard_block);
    a.grid.hadamard_matrix = matrix_.data();
    return a;
  }

  void compare(const Floats& y) {
    Floats unused(layer_.dtype, 0);
    const InputGrid grid = describe(&unused).grid;
    Comparison comparison;
    for (int t = 0; t < layer_.tokens; ++t) {
      std::vector<float> row(layer_.in_features());
      for (size_t k = 0; k < row.size(); ++k) row[k] = x_[t * stride() + k];
      if (grid.hadamard_block) rotate(&row, grid);
      std::vector<Group> groups;
      for (int g = 0; g < layer_.groups; ++g) {
        groups.emplace_back(&row[g * layer_.group_size], layer_.group_size, grid.range_to_scale,
                            layer_.symmetric, false, layer_.bits);
      }
      for (int n = 0; n < layer_.out_features; ++n) {
        double sum = layer_.bias ? bias_[n] : 0.0, size = std::abs(sum);
        for (int g = 0; g < layer_.groups; ++g) {
          const int8_t* w = &codes_[n * layer_.in_features() + g * layer_.group_size];
          int product = 0, total = 0;
          for (int k = 0; k < layer_.group_size; ++k) {
            product += w[k] * groups[g].codes[k];
            total += w[k];
          }
          const double scale = half_to_float(scale_[scale_index(n, g)]);
          const double term = scale * groups[g].scale * product;
          const double offset = scale * groups[g].offset * total;
          sum += term + offset;
          size += std::abs(term) + std::abs(offset);
        }
        double error = 1e-5 * size + y.rounding(sum);
        if (layer_.codes == Codes::kIntegers) {
          sum = y.rounded(sum);
          error = 0.0;
        }
        comparison.add({t, n}, y[t * layer_.out_features + n], sum, error);
      }
    }
    comparison.finish();
  }

 private:
  float input(int place, Random* random) const {
    switch (layer_.codes) {
      case Codes::kRandom:
        return random->normal() + 1.5f;
      // Of a group, all codes but the first are at one end of the grid.
      case Codes::kLowest:
        return place ? -1.0f : 1.0f;
      case Codes::kHighest:
        return place ? 1.0f : -1.0f;
      default:
        return place == 0 ? -8.0f : place == 1 ? 7.0f : random->integer(-8, 7);
    }
  }

  int scale_index(int n, int group) const {
    if (!layer_.scale_per_group) return n;
    const int segment = group * (layer_.group_size / layer_.segment_size());
    return (n / kTile * layer_.segments() + segment) * kTile + n % kTile;
  }

  // Segments of one group have one scale.
  void share_scales() {
    if (!layer_.scale_per_group) return;
    const int parts = layer_.group_size / layer_.segment_size();
    for (size_t i = 0; i < scale_.size(); ++i) {
      const int segment = i / kTile % layer_.segments();
      scale_[i] = scale_[i - segment % parts * kTile];
    }
  }

  void pack() {
    const int size = layer_.segment_size(), blocks = (size + kBlock - 1) / kBlock;
    packed_.assign(layer_.tiles() * layer_.segments() * blocks * kTileBlockBytes, 0x88);
    sums_.assign(layer_.tiles() * layer_.segments() * kTile, 0);
    for (int n = 0; n < layer_.out_features; ++n) {
      for (int k = 0; k < layer_.in_features(); ++k) {
        const int tile_segment = n / kTile * layer_.segments() + k / size, i = k % size;
        const int8_t code = codes_[n * layer_.in_features() + k];
        uint8_t& byte =
            packed_[(tile_segment * blocks + i / kBlock) * kTileBlockBytes + n % kTile * 4 + i % 4];
        byte = i % kBlock < 4 ? (byte & 0xF0) | (code + 8) : (byte & 0x0F) | (code + 8) << 4;
        sums_[tile_segment * kTile + n % kTile] += code;
      }
    }
  }

  // The steps of rotation.apply_block_hadamard, in its order and in float32.
  static void rotate(std::vector<float>* row, const InputGrid& grid) {
    std::vector<float>& x = *row;
    const int core = grid.hadamard_core, size = x.size();
    for (int start = 0; core > 1 && start < size; start += core) {
      std::vector<float> sums(core);
      for (int j = 0; j < core; ++j) {
        sums[j] = x[start] * grid.hadamard_matrix[j];
        for (int i = 1; i < core; ++i) sums[j] += x[start + i] * grid.hadamard_matrix[i * core + j];
      }
      std::copy(sums.begin(), sums.end(), x.begin() + start);
    }
    for (int stride = core; stride < grid.hadamard_block; stride *= 2) {
      for (int i = 0; i < size; ++i) {
        if (i / stride % 2) continue;
        const float u = x[i], v = x[i + stride];
        x[i] = u + v;
        x[i + stride] = u - v;
      }
    }
    for (float& value : x) value *= grid.hadamard_norm;
  }

  Layer layer_;
  Floats x_, bias_;
  std::vector<int8_t> codes_;  // [out_features, in_features]
  std::vector<float> matrix_;
  std::vector<uint8_t> packed_;
  std::vector<int16_t> sums_;
  std::vector<uint16_t> scale_;
};

}  // namespace offq
