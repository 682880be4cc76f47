// Operations on a row of floats.
#pragma once

#include "tile.h"

namespace offq {
namespace {

// A row of n elements as floats.
template <class S>
inline void read_row(int32_t dtype, const void* p, int64_t n, float* out) {
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) S::store(out + i, load_as<S>(dtype, p, i));
  if (i < n) {
    alignas(64) float rest[S::kLanes];
    S::store(rest, load_some<S>(dtype, p, i, n - i));
    __builtin_memcpy(out + i, rest, (n - i) * sizeof(float));
  }
}

// Smallest and largest of n values; both NaN if one is.
template <class S>
inline void min_max(const float* x, int64_t n, float* low, float* high) {
  int64_t i = 0;
  float lo = x[0], hi = x[0];
  bool nan = false;
  if (n >= S::kLanes) {
    typename S::F a = S::load(x), b = a, sum = S::sub(a, a);
    for (i = S::kLanes; i + S::kLanes <= n; i += S::kLanes) {
      const typename S::F v = S::load(x + i);
      a = S::min(a, v);
      b = S::max(b, v);
      sum = S::add(sum, S::sub(v, v));
    }
    nan = S::any_nan(sum);  // v - v: NaN of NaN and of infinities, checked again below
    lo = S::reduce_min(a);
    hi = S::reduce_max(b);
    if (nan) {
      nan = false;
      for (int64_t k = 0; k < i; ++k) nan |= x[k] != x[k];
    }
  }
  for (; i < n; ++i) {
    nan |= x[i] != x[i];
    lo = x[i] < lo ? x[i] : lo;
    hi = x[i] > hi ? x[i] : hi;
  }
  *low = nan ? __builtin_nanf("") : lo;
  *high = nan ? __builtin_nanf("") : hi;
}

// x [n] times matrix [n, n].
template <class S>
inline void rotate_head(const float* x, const float* matrix, int64_t n, float* out) {
  int64_t j = 0;
  for (; j + 4 * S::kLanes <= n; j += 4 * S::kLanes) {
    typename S::F sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for (int64_t i = 0; i < n; ++i) {
      const typename S::F scale = S::set(x[i]);
      for (int v = 0; v < 4; ++v) {
        sum[v] = S::fma(scale, S::load(matrix + i * n + j + v * S::kLanes), sum[v]);
      }
    }
    for (int v = 0; v < 4; ++v) S::store(out + j + v * S::kLanes, sum[v]);
  }
  for (; j < n; ++j) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; ++i) sum += x[i] * matrix[i * n + j];
    out[j] = sum;
  }
}

// 2^x to one unit in the last place or so; NaN stays NaN.
template <class S>
inline typename S::F exp2(typename S::F x) {
  // The constant first: min and max return their second operand where one is NaN.
  x = S::min(S::set(126.0f), S::max(S::set(-126.0f), x));
  const typename S::I whole = S::to_int(x);
  const typename S::F f = S::sub(x, S::to_float(whole));
  typename S::F p = S::set(1.535336188319500e-4f);
  p = S::fma(p, f, S::set(1.339887440266574e-3f));
  p = S::fma(p, f, S::set(9.618437357674640e-3f));
  p = S::fma(p, f, S::set(5.550332471162809e-2f));
  p = S::fma(p, f, S::set(2.402264791363012e-1f));
  p = S::fma(p, f, S::set(6.931472028550421e-1f));
  p = S::fma(p, f, S::set(1.0f));
  return S::scale_by_power(p, whole);
}

// The largest integer of B bytes, each of them signed: 127 * 256^(B - 1).
template <int B>
constexpr float kLargestInteger = 127 << 8 * (B - 1);

// x * inverse to integers of B bytes, the highest first, rows of bytes `stride` apart; the sum of
// byte b times -8 goes to start[b].
template <class S, int B>
inline void split_bytes(const float* x, int64_t n, float inverse, int8_t* bytes, int64_t stride,
                        int32_t* start) {
  typename S::I sums[B];
  for (int b = 0; b < B; ++b) sums[b] = S::int_zero();
  for (int64_t i = 0; i < n; i += S::kLanes) {
    typename S::I rest = S::to_int(S::zero_nan(S::mul(S::load(x + i), S::set(inverse))));
    for (int b = B - 1; b >= 0; --b) {
      typename S::I byte = rest;
      if (b) {
        rest = S::template shift_right<8>(S::add(rest, S::int_set(128)));
        byte = S::sub(byte, S::template shift_left<8>(rest));
      }
      sums[b] = S::add(sums[b], byte);
      S::store_int8(bytes + b * stride + i, byte);
    }
  }
  for (int b = 0; b < B; ++b) start[b] = -8 * S::reduce_add(sums[b]);
}

// The integers again, from the sums of their bytes.
template <class S, int B, int M, int V>
inline typename S::F join_bytes(const typename S::I (&sum)[M][V], int row, int v) {
  typename S::F total = S::to_float(sum[B * row][v]);
  for (int b = 1; b < B; ++b) {
    total = S::fma(total, S::set(256.0f), S::to_float(sum[B * row + b][v]));
  }
  return total;
}

template <class S>
inline float largest(const float* x, int64_t n) {
  typename S::F a = S::load(x);
  for (int64_t i = S::kLanes; i < n; i += S::kLanes) a = S::max(a, S::load(x + i));
  return S::reduce_max(a);
}

}  // namespace
}  // namespace offq
