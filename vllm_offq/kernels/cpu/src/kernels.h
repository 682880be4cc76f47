// What a kernel gets, and the table of kernels that each instruction set fills.
//
// Layouts. A tile is 16 output channels (or, of the keys, 16 tokens). It holds, for every block of
// 8 input channels, 64 bytes: byte 4 n + j has code + 8 of channel n at input 8 b + j in its low
// nibble and at input 8 b + 4 + j in its high one. Every instruction set reads the same tiles.
#pragma once

#include <cstddef>
#include <cstdint>

namespace offq {

constexpr int kTile = 16;
constexpr int kBlock = 8;
constexpr int kTileBlockBytes = kTile * kBlock / 2;
// The int16 lanes of AVX2 hold a sum over this many channels of 4-bit times 4-bit codes.
constexpr int kMaxSegment = 256;
// The largest order of a Hadamard matrix that is not doubled from a smaller one.
constexpr int kMaxCore = 256;

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// The grid of one linear layer's input, and its online Hadamard.
struct InputGrid {
  int32_t group_size;
  int32_t symmetric;
  int32_t bits;                  // of a code: 4 or 8
  float range_to_scale;          // clip_ratio / 15, or / 7 if symmetric; of 8 bits / 255 or / 127
  int32_t hadamard_block;        // 0: none
  int32_t hadamard_core;         // order of the core: block = core * 2^k
  float hadamard_norm;           // 1 / sqrt(block)
  const float* hadamard_matrix;  // [core, core], entries +1 and -1
};

// y = x W^T + bias; see reference.linear. A segment is a group, or an equal part of one that is
// longer than kMaxSegment.
struct Linear {
  const void* x;     // [tokens, in_features], rows x_stride apart
  void* y;           // [tokens, out_features]
  const void* bias;  // [out_features] or null
  int64_t tokens;
  int64_t in_features;
  int64_t out_features;
  int64_t x_stride;
  const uint8_t* weight_codes;   // [tiles, segments, segment blocks, 64]
  const int16_t* weight_sums;    // [tiles, segments, 16]
  const uint16_t* weight_scale;  // float16, [tiles, 16] or [tiles, segments, 16]
  int32_t segment_size;
  int32_t scale_per_group;
  int32_t dtype;  // of x, y and bias
  InputGrid grid;
};

// One page is [num_kv_heads] regions of block_size tokens each: key codes as tiles of 16 tokens
// [block_size / 16, head_size / 8, 64], value codes as tiles of 16 channels
// [head_size / 16, block_size / 8, 64], then float16 [4, groups, block_size]: key scales, key
// offsets, value scales, value offsets.
struct PageLayout {
  int64_t num_kv_heads;
  int64_t head_size;
  int64_t block_size;
  int64_t group_size;
  int64_t block_stride;  // bytes
  int64_t head_stride;   // bytes

  int64_t groups() const { return head_size / group_size; }
  int64_t value_start() const { return block_size * head_size / 2; }
  int64_t parameters_start() const { return block_size * head_size; }
};

struct KVStore {
  const void* key;    // [tokens, num_kv_heads, head_size], tokens key_stride apart
  const void* value;  // likewise
  int64_t tokens;
  int64_t key_stride;
  int64_t value_stride;
  int32_t dtype;
  const float* key_rotation;  // [num_kv_heads, head_size, head_size] or null
  const int64_t* slot_mapping;
  uint8_t* kv_cache;
  PageLayout page;
};

struct Attention {
  const void* query;  // [tokens, num_heads, head_size], tokens query_stride apart
  void* output;       // likewise, output_stride apart
  int64_t query_stride;
  int64_t output_stride;
  int64_t num_heads;
  int32_t dtype;
  float scale;
  const float* query_rotation;  // [num_kv_heads, head_size, head_size] or null
  int64_t requests;
  const int32_t* query_start_loc;  // [requests + 1]
  const int32_t* seq_lens;         // [requests]
  const int32_t* block_table;      // [requests, block_table_stride]
  int64_t block_table_stride;
  int64_t sliding_window;  // 0: none
  float soft_cap;          // 0: none
  const uint8_t* kv_cache;
  PageLayout page;
};

// Each returns 0, or 1 if there was no memory for its intermediate results.
struct Kernels {
  int (*linear)(const Linear&);
  int (*kv_store)(const KVStore&);
  int (*paged_attention)(const Attention&);
};

// Aligned scratch memory of the calling thread, kept for its next call. Null if there is none.
void* workspace(size_t bytes);

extern const Kernels kAvx2, kAvxVnni, kAvx512Vnni, kNeonDotprod;

}  // namespace offq
