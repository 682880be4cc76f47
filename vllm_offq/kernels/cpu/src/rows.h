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

// x * inverse to 16-bit integers, as high and low bytes; their sums times -8 go to start[0..1].
template <class S>
inline void split_bytes(const float* x, int64_t n, float inverse, int8_t* high, int8_t* low,
                        int32_t* start) {
  typename S::I high_sum = S::int_zero(), low_sum = S::int_zero();
  for (int64_t i = 0; i < n; i += S::kLanes) {
    const typename S::I whole = S::to_int(S::zero_nan(S::mul(S::load(x + i), S::set(inverse))));
    const typename S::I h = S::template shift_right<8>(S::add(whole, S::int_set(128)));
    const typename S::I l = S::sub(whole, S::template shift_left<8>(h));
    high_sum = S::add(high_sum, h);
    low_sum = S::add(low_sum, l);
    S::store_int8(high + i, h);
    S::store_int8(low + i, l);
  }
  start[0] = -8 * S::reduce_add(high_sum);
  start[1] = -8 * S::reduce_add(low_sum);
}

template <class S>
inline float largest(const float* x, int64_t n) {
  typename S::F a = S::load(x);
  for (int64_t i = S::kLanes; i < n; i += S::kLanes) a = S::max(a, S::load(x + i));
  return S::reduce_max(a);
}

}  // namespace
}  // namespace offq
