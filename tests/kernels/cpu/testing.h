// What the tests share: the library's C interface, checks, 16-bit floats, the 4-bit grid.
//
// Buffers are vectors of exactly their size, so that a sanitizer sees every access beyond them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

extern "C" {
int offq_isa_count();
const char* offq_isa_name(int isa);
int offq_isa_usable(int isa);
int offq_linear(int isa, const offq::Linear* arguments);
int offq_kv_store(int isa, const offq::KVStore* arguments);
int offq_paged_attention(int isa, const offq::Attention* arguments);
}

namespace offq {

inline std::atomic<long> checks = 0, failures = 0;

// What is being tested, printed before a failure.
inline std::string context;

inline void check(bool ok, const std::string& what) {
  ++checks;
  if (ok || failures++ >= 20) return;
  std::printf("FAILED %s: %s\n", context.c_str(), what.c_str());
}

// Whether each y is within `error` of what it should be; the first that is not, is reported.
class Comparison {
 public:
  void add(std::initializer_list<int> place, double y, double expected, double error) {
    if (std::abs(y - expected) <= error || !what_.empty()) return;
    what_ = "y[";
    for (int i : place) what_ += std::to_string(i) + ", ";
    what_ += "] is " + std::to_string(y) + ", not " + std::to_string(expected) + " +- " +
             std::to_string(error);
  }
  void finish() const { check(what_.empty(), what_); }

 private:
  std::string what_;
};

inline float half_to_float(uint16_t half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  float size = std::ldexp(1024.0f + mantissa, exponent - 25);
  if (exponent == 0) size = std::ldexp(static_cast<float>(mantissa), -24);
  if (exponent == 31) size = mantissa ? NAN : INFINITY;
  return half & 0x8000 ? -size : size;
}

inline uint16_t float_to_half(float x) {
  if (std::isnan(x)) return 0x7E00;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::abs(x);
  if (size >= 65520.0f) return sign | 0x7C00;
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  return sign | static_cast<uint16_t>(((exponent + 14) << 10) +
                                      std::nearbyint(std::ldexp(size, 10 - exponent)));
}

inline float bfloat_to_float(uint16_t bfloat) {
  const uint32_t bits = static_cast<uint32_t>(bfloat) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint16_t float_to_bfloat(float x) {
  if (std::isnan(x)) return 0x7FC0;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// An array of one of the three types.
class Floats {
 public:
  Floats(DType dtype, size_t size)
      : dtype_(dtype), bytes_(size * (dtype == DType::kFloat32 ? 4 : 2), 0xFF) {}  // NaN

  void* data() { return bytes_.data(); }
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  int32_t dtype() const { return static_cast<int32_t>(dtype_); }
  float rounded(float x) const {
    Floats one(dtype_, 1);
    one.set(0, x);
    return one[0];
  }
  // By how much rounding to this type can change x.
  double rounding(double x) const {
    const double unit = dtype_ == DType::kBFloat16  ? 0x1p-8
                        : dtype_ == DType::kFloat16 ? 0x1p-11
                                                    : 0x1p-24;
    return std::abs(x) * unit + (dtype_ == DType::kFloat16 ? 0x1p-25 : 0.0);
  }

  float operator[](size_t i) const {
    if (dtype_ == DType::kFloat32) return load<float>(i);
    const uint16_t bits = load<uint16_t>(i);
    return dtype_ == DType::kBFloat16 ? bfloat_to_float(bits) : half_to_float(bits);
  }
  void set(size_t i, float x) {
    if (dtype_ == DType::kFloat32) return store(i, x);
    store(i, dtype_ == DType::kBFloat16 ? float_to_bfloat(x) : float_to_half(x));
  }

 private:
  template <class T>
  T load(size_t i) const {
    T x;
    std::memcpy(&x, &bytes_.at(i * sizeof(T)), sizeof(T));
    return x;
  }
  template <class T>
  void store(size_t i, T x) {
    std::memcpy(&bytes_.at(i * sizeof(T)), &x, sizeof(T));
  }

  DType dtype_;
  std::vector<uint8_t> bytes_;
};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int integer(int low, int high) { return std::uniform_int_distribution<int>(low, high)(engine_); }
  float normal() { return std::normal_distribution<float>()(engine_); }
  std::vector<int> permutation(int n) {
    std::vector<int> result(n);
    for (int i = 0; i < n; ++i) result[i] = i;
    std::shuffle(result.begin(), result.end(), engine_);
    return result;
  }

 private:
  std::mt19937 engine_;
};

// Codes of one group on the grid of quantizer.py, in its float32 arithmetic.
struct Group {
  float scale, offset;
  std::vector<int> codes;

  Group(const float* x, int size, float range_to_scale, bool symmetric, bool half_parameters,
        int bits = 4) {
    float low = x[0], high = x[0];
    for (int i = 1; i < size; ++i) {
      low = std::fmin(low, x[i]);
      high = std::fmax(high, x[i]);
    }
    scale = (symmetric ? std::fmax(high, -low) : high - low) * range_to_scale;
    offset = symmetric ? 0.0f : high * 0.5f + low * 0.5f + scale * 0.5f;
    if (half_parameters) {
      scale = half_to_float(float_to_half(scale));
      offset = half_to_float(float_to_half(offset));
    }
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    for (int i = 0; i < size; ++i) {
      const float code = std::nearbyint((x[i] - offset) * inverse);
      const float most = (1 << (bits - 1)) - 1;
      codes.push_back(static_cast<int>(std::fmax(-most - 1, std::fmin(most, code))));
    }
  }
};

void test_linear(const std::vector<int>& isas);
void test_attention(const std::vector<int>& isas);

}  // namespace offq
