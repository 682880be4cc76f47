// The inner loop that the linear layer and both halves of attention share, and small helpers.
#pragma once

#include "kernels.h"

namespace offq {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Hands out aligned arrays from one piece of memory; with null it only measures.
struct Arena {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return p;
  }
};

// Bytes of a block whose codes have been given a byte each: 64 of its low nibbles, 64 of its high.
constexpr int kUnpackedBlockBytes = 2 * kTileBlockBytes;

// M rows of signed bytes times the channels of V vectors: acc[m][v] += row m . codes + 8.
// Vector v lies v * kLanes channels after `codes`, in tiles tile_stride bytes apart. The codes
// `ahead` bytes further on, if not 0, are fetched from memory in the meantime.
template <class S, int M, int V, bool kUnpacked = false>
__attribute__((always_inline)) inline void multiply_tiles(const int8_t* rows, int64_t row_stride,
                                                          const uint8_t* codes, int64_t tile_stride,
                                                          int64_t blocks,
                                                          typename S::Acc (&acc)[M][V],
                                                          int64_t ahead = 0) {
  constexpr int kVectorBytes = kTileBlockBytes * S::kLanes / kTile;
  constexpr int kPerTile = kTile / S::kLanes;
  constexpr int kBlockBytes = kUnpacked ? kUnpackedBlockBytes : kTileBlockBytes;
  for (int64_t b = 0; b < blocks; ++b) {
    const uint8_t* block = codes + b * kBlockBytes;
    const int8_t* x = rows + b * kBlock;
    typename S::U8 low[V], high[V];
    if (ahead) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v += kPerTile) {
        __builtin_prefetch(block + v / kPerTile * tile_stride + ahead);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const uint8_t* p = block + (v / kPerTile) * tile_stride + (v % kPerTile) * kVectorBytes;
      low[v] = kUnpacked ? S::load_codes(p) : S::low_nibbles(S::load_codes(p));
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto bytes = S::broadcast4(x + m * row_stride);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = S::multiply_add(acc[m][v], low[v], bytes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const uint8_t* p = block + (v / kPerTile) * tile_stride + (v % kPerTile) * kVectorBytes;
      high[v] = kUnpacked ? S::load_codes(p + kTileBlockBytes) : S::high_nibbles(S::load_codes(p));
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const auto bytes = S::broadcast4(x + m * row_stride + 4);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = S::multiply_add(acc[m][v], high[v], bytes);
    }
  }
}

template <class S>
inline void unpack_blocks(const uint8_t* codes, int64_t blocks, uint8_t* out) {
  constexpr int kVectorBytes = kTileBlockBytes * S::kLanes / kTile;
  for (int64_t b = 0; b < blocks; ++b) {
    for (int i = 0; i < kTileBlockBytes; i += kVectorBytes) {
      const typename S::U8 both = S::load_codes(codes + b * kTileBlockBytes + i);
      uint8_t* p = out + b * kUnpackedBlockBytes + i;
      S::store_codes(p, S::low_nibbles(both));
      S::store_codes(p + kTileBlockBytes, S::high_nibbles(both));
    }
  }
}

// The same sums as int32 lanes, from start[m] on, for rows of any signed bytes: the narrow lanes of
// AVX2 are emptied in time.
template <class S, int M, int V, bool kUnpacked = false>
__attribute__((always_inline)) inline void multiply_byte_tiles(
    const int8_t* rows, int64_t row_stride, const int32_t* start, const uint8_t* codes,
    int64_t tile_stride, int64_t blocks, typename S::I (&sum)[M][V], int64_t ahead = 0) {
  constexpr int kBlockBytes = kUnpacked ? kUnpackedBlockBytes : kTileBlockBytes;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[m][v] = S::int_set(start[m]);
  for (int64_t b = 0; b < blocks; b += S::kByteBlocks) {
    typename S::Acc acc[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[m][v] = S::start(0);
    multiply_tiles<S, M, V, kUnpacked>(rows + b * kBlock, row_stride, codes + b * kBlockBytes,
                                       tile_stride, min_of(blocks - b, S::kByteBlocks), acc, ahead);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[m][v] = S::add(sum[m][v], S::widen(acc[m][v]));
  }
}

// Calls f.template run<M>() with M = rows, 1 to kMax.
template <int kMax, class Function>
__attribute__((always_inline)) inline void with_rows(int64_t rows, const Function& f) {
  if constexpr (kMax > 1) {
    if (rows < kMax) return with_rows<kMax - 1>(rows, f);
  }
  f.template run<kMax>();
}

template <class S>
inline typename S::F load_as(int32_t dtype, const void* p, int64_t i) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16:
      return S::load_bfloat(static_cast<const uint16_t*>(p) + i);
    case DType::kFloat16:
      return S::load_half(static_cast<const uint16_t*>(p) + i);
    default:
      return S::load(static_cast<const float*>(p) + i);
  }
}

template <class S>
inline void store_as(int32_t dtype, void* p, int64_t i, typename S::F a) {
  switch (static_cast<DType>(dtype)) {
    case DType::kBFloat16:
      return S::store_bfloat(static_cast<uint16_t*>(p) + i, a);
    case DType::kFloat16:
      return S::store_half(static_cast<uint16_t*>(p) + i, a);
    default:
      return S::store(static_cast<float*>(p) + i, a);
  }
}

inline int64_t element_size(int32_t dtype) {
  return static_cast<DType>(dtype) == DType::kFloat32 ? 4 : 2;
}

inline const char* element(const void* p, int32_t dtype, int64_t i) {
  return static_cast<const char*>(p) + i * element_size(dtype);
}
inline char* element(void* p, int32_t dtype, int64_t i) {
  return static_cast<char*>(p) + i * element_size(dtype);
}

// The same for fewer elements than a vector has; the rest reads as zero.
template <class S>
inline typename S::F load_some(int32_t dtype, const void* p, int64_t i, int64_t count) {
  alignas(64) char buffer[4 * S::kLanes] = {};
  __builtin_memcpy(buffer, element(p, dtype, i), count * element_size(dtype));
  return load_as<S>(dtype, buffer, 0);
}

template <class S>
inline void store_some(int32_t dtype, void* p, int64_t i, typename S::F a, int64_t count) {
  alignas(64) char buffer[4 * S::kLanes];
  store_as<S>(dtype, buffer, 0, a);
  __builtin_memcpy(element(p, dtype, i), buffer, count * element_size(dtype));
}

}  // namespace
}  // namespace offq
