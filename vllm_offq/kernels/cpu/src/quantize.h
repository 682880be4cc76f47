// Activations to codes: online Hadamard, then the grid of quantizer.py, operation by operation.
#pragma once

#include "rows.h"

namespace offq {
namespace {

struct Range {
  float scale, offset, inverse;
};

inline float inverse_of(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// quantizer.group_range of one group.
template <class S>
inline Range group_range(const float* x, int64_t n, float range_to_scale, bool symmetric) {
  float low, high;
  min_max<S>(x, n, &low, &high);
  Range range;
  if (symmetric) {
    range.scale = (high != high || high > -low ? high : -low) * range_to_scale;
    range.offset = 0.0f;
  } else {
    range.scale = (high - low) * range_to_scale;
    range.offset = high * 0.5f + low * 0.5f + range.scale * 0.5f;
  }
  range.inverse = inverse_of(range.scale);
  return range;
}

// quantizer.quantize of one group: n codes, then zeros up to `padded`. Returns their sum.
template <class S>
inline int32_t quantize_group(const float* x, int64_t n, int64_t padded, const Range& range,
                              int8_t* codes, int32_t bits = 4) {
  const typename S::F offset = S::set(range.offset), inverse = S::set(range.inverse);
  const float least = -static_cast<float>(1 << (bits - 1));
  const typename S::F low = S::set(least), high = S::set(-1.0f - least);
  typename S::I sum = S::int_zero();
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) {
    typename S::F v = S::mul(S::sub(S::load(x + i), offset), inverse);
    v = S::min(S::max(S::zero_nan(v), low), high);
    const typename S::I code = S::to_int(v);
    sum = S::add(sum, code);
    S::store_int8(codes + i, code);
  }
  int32_t total = S::reduce_add(sum);
  if (i < padded) {
    alignas(64) float rest[S::kLanes] = {};
    alignas(64) int8_t bytes[S::kLanes];
    for (int64_t k = i; k < n; ++k) rest[k - i] = (x[k] - range.offset) * range.inverse;
    const typename S::F v = S::min(S::max(S::zero_nan(S::load(rest)), low), high);
    const typename S::I code = S::to_int(v);
    total += S::reduce_add(code);
    S::store_int8(bytes, code);
    __builtin_memcpy(codes + i, bytes, padded - i);
  }
  return total;
}

template <class S, int H>
inline void butterflies_in_vectors(float* x, int64_t n) {
  if constexpr (H < S::kLanes) {
    for (int64_t i = 0; i < n; i += S::kLanes) {
      S::store(x + i, S::template butterfly<H>(S::load(x + i)));
    }
    butterflies_in_vectors<S, 2 * H>(x, n);
  }
}

// rotation.apply_block_hadamard of one row, in place: core, then butterflies by rising stride.
template <class S>
inline void block_hadamard(float* x, int64_t n, const InputGrid& grid) {
  const int64_t core = grid.hadamard_core, block = grid.hadamard_block;
  if (core > 1) {
    float sums[kMaxCore];
    for (int64_t start = 0; start < n; start += core) {
      for (int64_t j = 0; j < core; ++j) {
        float sum = x[start] * grid.hadamard_matrix[j];
        for (int64_t i = 1; i < core; ++i) {
          sum += x[start + i] * grid.hadamard_matrix[i * core + j];
        }
        sums[j] = sum;
      }
      __builtin_memcpy(x + start, sums, core * sizeof(float));
    }
  }
  int64_t stride = core;
  if (core == 1 && block >= S::kLanes) {
    butterflies_in_vectors<S, 1>(x, n);
    stride = S::kLanes;
  }
  for (; stride < block; stride *= 2) {
    for (int64_t start = 0; start < n; start += 2 * stride) {
      float* a = x + start;
      float* b = a + stride;
      int64_t i = 0;
      for (; i + S::kLanes <= stride; i += S::kLanes) {
        const typename S::F u = S::load(a + i), v = S::load(b + i);
        S::store(a + i, S::add(u, v));
        S::store(b + i, S::sub(u, v));
      }
      for (; i < stride; ++i) {
        const float u = a[i], v = b[i];
        a[i] = u + v;
        b[i] = u - v;
      }
    }
  }
  for (int64_t i = 0; i < n; ++i) x[i] *= grid.hadamard_norm;
}

}  // namespace
}  // namespace offq
