// New keys and values to 4-bit codes in their pages.
#pragma once

#include <omp.h>

#include "quantize.h"

namespace offq {
namespace {

// One head's codes of one token, and the float16 scale and offset of each group; the parameters of
// the groups lie block_size apart.
template <class S>
inline void quantize_head(const float* x, const PageLayout& page, int8_t* codes, uint16_t* scale,
                          uint16_t* offset) {
  constexpr float kRangeToScale = static_cast<float>(1.0 / 15.0);
  for (int64_t g = 0; g < page.groups(); ++g) {
    Range range = group_range<S>(x + g * page.group_size, page.group_size, kRangeToScale, false);
    scale[g * page.block_size] = S::half(range.scale);
    offset[g * page.block_size] = S::half(range.offset);
    range.scale = S::from_half(scale[g * page.block_size]);
    range.offset = S::from_half(offset[g * page.block_size]);
    range.inverse = inverse_of(range.scale);
    quantize_group<S>(x + g * page.group_size, page.group_size, page.group_size, range,
                      codes + g * page.group_size);
  }
}

inline void store_key(const int8_t* codes, const PageLayout& page, int64_t t, uint8_t* keys) {
  uint8_t* tile = keys + t / kTile * (page.head_size * kTile / 2) + t % kTile * 4;
  for (int64_t b = 0; b < page.head_size / kBlock; ++b) {
    for (int j = 0; j < 4; ++j) {
      tile[b * kTileBlockBytes + j] =
          static_cast<uint8_t>((codes[b * 8 + j] + 8) | (codes[b * 8 + 4 + j] + 8) << 4);
    }
  }
}

inline void store_value(const int8_t* codes, const PageLayout& page, int64_t t, uint8_t* values) {
  const int shift = t % 8 < 4 ? 0 : 4;
  for (int64_t c = 0; c < page.head_size; ++c) {
    uint8_t* p = values + c / kTile * (page.block_size * kTile / 2) + t / kBlock * kTileBlockBytes +
                 c % kTile * 4 + t % 4;
    *p = static_cast<uint8_t>((*p & (0xF0 >> shift)) | (codes[c] + 8) << shift);
  }
}

template <class S>
int kv_store(const KVStore& a) {
  const PageLayout& page = a.page;
  const int64_t n = page.head_size, heads = page.num_kv_heads;
  const int threads = omp_get_max_threads();
  float* rows = static_cast<float*>(workspace(threads * 3 * n * sizeof(float)));
  if (!rows) return 1;
  // By head: two tokens share the bytes of a value's codes, two heads share none. A few heads are
  // stored before a second thread has woken up.
#pragma omp parallel for schedule(static) num_threads(threads) if (a.tokens * heads > 32)
  for (int64_t head = 0; head < heads; ++head) {
    float* row = rows + omp_get_thread_num() * 3 * n;
    float* rotated = row + n;
    int8_t* codes = reinterpret_cast<int8_t*>(row + 2 * n);
    for (int64_t token = 0; token < a.tokens; ++token) {
      const int64_t slot = a.slot_mapping[token];
      if (slot < 0) continue;
      const int64_t t = slot % page.block_size;
      uint8_t* region =
          a.kv_cache + slot / page.block_size * page.block_stride + head * page.head_stride;
      uint16_t* parameters = reinterpret_cast<uint16_t*>(region + page.parameters_start()) + t;
      const int64_t kind = page.groups() * page.block_size;

      read_row<S>(a.dtype, element(a.key, a.dtype, token * a.key_stride + head * n), n, row);
      const float* key = row;
      if (a.key_rotation) {
        rotate_head<S>(row, a.key_rotation + head * n * n, n, rotated);
        key = rotated;
      }
      quantize_head<S>(key, page, codes, parameters, parameters + kind);
      store_key(codes, page, t, region);

      read_row<S>(a.dtype, element(a.value, a.dtype, token * a.value_stride + head * n), n, row);
      quantize_head<S>(row, page, codes, parameters + 2 * kind, parameters + 3 * kind);
      store_value(codes, page, t, region + page.value_start());
    }
  }
  return 0;
}

}  // namespace
}  // namespace offq
