// One piece of attention: a few query tokens, the heads of one KV head, a part of the context.
//
// Queries and probabilities become integers of B bytes, each of them B rows of signed bytes, so
// that the products with 4-bit codes are exact integers from multiply_byte_tiles: 2 bytes where the
// model calculates in 16 bits, 3 in float32, which has 24 bits itself. A key's offset enters as
// offset * sum(query), a value's as sum(probability * offset). Softmax is online, over chunks of a
// page.
#pragma once

#include "kv_store.h"

namespace offq {
namespace {

constexpr int64_t kChunkTokens = 128;

// One piece of work: some query tokens, the heads of one KV head, a part of the context.
struct AttentionPiece {
  int64_t request, kv_head, first_token, tokens, context_start, context_end;
  int64_t partial;  // where its result goes if the context is split, else -1
};

// What a thread needs for one piece. R rows: query tokens times heads per KV head.
struct AttentionScratch {
  float *row, *rotated;
  int8_t* query;               // [B R, head_size]
  int32_t* query_start;        // [groups, B R]: -8 times the sum over a group
  float* query_sum;            // [groups, R]
  float* query_scale;          // [R]
  float* score;                // [R, kChunkTokens], then the probabilities
  float* weight;               // [R, kChunkTokens]: probability times value scale
  int8_t* probability;         // [B R, kChunkTokens]
  int32_t* probability_start;  // [B R]
  float* probability_scale;    // [R]
  float* rescale;              // [R]
  float* maximum;              // [R]
  float* total;                // [R]
  float* offset;               // [R, groups]: sum(probability * value offset)
  float* output;               // [R, head_size]

  static AttentionScratch take(Arena* arena, int64_t rows, int64_t bytes, const PageLayout& page) {
    AttentionScratch s{};
    s.row = arena->take<float>(page.head_size);
    s.rotated = arena->take<float>(page.head_size);
    s.query = arena->take<int8_t>(bytes * rows * page.head_size);
    s.query_start = arena->take<int32_t>(bytes * rows * page.groups());
    s.query_sum = arena->take<float>(rows * page.groups());
    s.query_scale = arena->take<float>(rows);
    s.score = arena->take<float>(rows * kChunkTokens);
    s.weight = arena->take<float>(rows * kChunkTokens);
    s.probability = arena->take<int8_t>(bytes * rows * kChunkTokens);
    s.probability_start = arena->take<int32_t>(bytes * rows);
    s.probability_scale = arena->take<float>(rows);
    s.rescale = arena->take<float>(rows);
    s.maximum = arena->take<float>(rows);
    s.total = arena->take<float>(rows);
    s.offset = arena->take<float>(rows * page.groups());
    s.output = arena->take<float>(rows * page.head_size);
    return s;
  }
};

template <class S, int B>
struct AttentionKernel {
  using F = typename S::F;
  using I = typename S::I;

  const Attention& a;
  const AttentionPiece& piece;
  const AttentionScratch& s;
  int64_t heads_per_kv = a.num_heads / a.page.num_kv_heads;
  int64_t rows = piece.tokens * heads_per_kv;
  int64_t head_size = a.page.head_size, groups = a.page.groups(), group_size = a.page.group_size;

  // Rotated queries as integers of B bytes; scores come out in units of log 2.
  void load_queries() const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t token = piece.first_token + r / heads_per_kv;
      const int64_t head = piece.kv_head * heads_per_kv + r % heads_per_kv;
      const float* q = s.row;
      read_row<S>(a.dtype, element(a.query, a.dtype, token * a.query_stride + head * head_size),
                  head_size, s.row);
      if (a.query_rotation) {
        rotate_head<S>(s.row, a.query_rotation + piece.kv_head * head_size * head_size, head_size,
                       s.rotated);
        q = s.rotated;
      }
      float low, high;
      min_max<S>(q, head_size, &low, &high);
      const float size = high != high || high > -low ? high : -low;
      const float log2e = 1.44269504088896341f;
      s.query_scale[r] = size / kLargestInteger<B> * a.scale * log2e;
      const float inverse = size == 0.0f ? 0.0f : kLargestInteger<B> / size;
      for (int64_t g = 0; g < groups; ++g) {
        const float* x = q + g * group_size;
        int8_t* bytes = s.query + B * r * head_size + g * group_size;
        split_bytes<S, B>(x, group_size, inverse, bytes, head_size,
                          s.query_start + g * B * rows + B * r);
        F sum = S::zero();
        for (int64_t i = 0; i < group_size; i += S::kLanes) sum = S::add(sum, S::load(x + i));
        s.query_sum[g * rows + r] = S::reduce_add(sum) * a.scale * log2e;
      }
      s.maximum[r] = -__builtin_inff();
      s.total[r] = 0.0f;
    }
    __builtin_memset(s.offset, 0, rows * groups * sizeof(float));
    __builtin_memset(s.output, 0, rows * head_size * sizeof(float));
  }

  // Scores of P rows (B P rows of bytes) from row r on and V vectors of tokens from t on.
  template <int P, int V>
  void score_tile(const uint8_t* keys, const uint16_t* parameters, int64_t r, int64_t t) const {
    const int64_t tile_bytes = head_size * kTile / 2;
    for (int64_t g = 0; g < groups; ++g) {
      I sum[B * P][V];
      multiply_byte_tiles<S, B * P, V>(
          s.query + B * r * head_size + g * group_size, head_size,
          s.query_start + g * B * rows + B * r,
          keys + t / kTile * tile_bytes + g * group_size / kBlock * kTileBlockBytes, tile_bytes,
          group_size / kBlock, sum);
      for (int v = 0; v < V; ++v) {
        const uint16_t* p = parameters + g * a.page.block_size + t + v * S::kLanes;
        const F scale = S::load_half(p), offset = S::load_half(p + groups * a.page.block_size);
        for (int m = 0; m < P; ++m) {
          float* out = s.score + (r + m) * kChunkTokens + t + v * S::kLanes;
          const F product = join_bytes<S, B>(sum, m, v);
          F score = S::mul(product, S::mul(scale, S::set(s.query_scale[r + m])));
          score = S::fma(offset, S::set(s.query_sum[g * rows + r + m]), score);
          if (g) score = S::add(score, S::load(out));
          S::store(out, score);
        }
      }
    }
  }

  // soft_cap * tanh(x / soft_cap) in units of log 2, by tanh(y) = 1 - 2 / (exp(2 y) + 1).
  void cap(float* x, int64_t count) const {
    const F step = S::set(2.0f / a.soft_cap), one = S::set(1.0f), two = S::set(2.0f);
    const F most = S::set(a.soft_cap * 1.44269504088896341f);
    for (int64_t i = 0; i < count; i += S::kLanes) {
      const F grown = S::add(exp2<S>(S::mul(S::load(x + i), step)), one);
      S::store(x + i, S::mul(most, S::sub(one, S::div(two, grown))));
    }
  }

  // Softmax of a chunk: probabilities relative to the running maximum, which may rise.
  void softmax(int64_t start, int64_t padded) const {
    const int64_t length = a.seq_lens[piece.request];
    const int64_t query_end = a.query_start_loc[piece.request + 1];
    for (int64_t r = 0; r < rows; ++r) {
      float* x = s.score + r * kChunkTokens;
      if (a.soft_cap != 0.0f) cap(x, padded);
      const int64_t position = length - (query_end - piece.first_token) + r / heads_per_kv;
      const int64_t end =
          max_of(0, min_of(min_of(position + 1, piece.context_end) - start, padded));
      int64_t begin = piece.context_start - start;
      if (a.sliding_window) begin = max_of(begin, position + 1 - a.sliding_window - start);
      begin = min_of(max_of(begin, 0), end);
      for (int64_t i = 0; i < begin; ++i) x[i] = -__builtin_inff();
      for (int64_t i = end; i < padded; ++i) x[i] = -__builtin_inff();
      const float before = s.maximum[r];
      if (begin == end) {
        s.rescale[r] = 1.0f;
        __builtin_memset(x, 0, padded * sizeof(float));
        continue;
      }
      const float maximum = max_float(before, largest<S>(x, padded));
      s.maximum[r] = maximum;
      for (int64_t i = 0; i < padded; i += S::kLanes) {
        S::store(x + i, exp2<S>(S::sub(S::load(x + i), S::set(maximum))));
      }
      for (int64_t i = 0; i < begin; ++i) x[i] = 0.0f;
      for (int64_t i = end; i < padded; ++i) x[i] = 0.0f;
      F sum = S::zero();
      for (int64_t i = 0; i < padded; i += S::kLanes) sum = S::add(sum, S::load(x + i));
      s.rescale[r] = exp2_of(before - maximum);
      s.total[r] = s.total[r] * s.rescale[r] + S::reduce_add(sum);
    }
  }

  static float max_float(float x, float y) { return x > y ? x : y; }
  static float exp2_of(float x) {
    if (x == -__builtin_inff()) return 0.0f;
    alignas(64) float out[S::kLanes];
    S::store(out, exp2<S>(S::set(x)));
    return out[0];
  }

  // Probabilities times value scales of one group as integers of B bytes.
  void weigh(const uint16_t* scales, const uint16_t* offsets, int64_t group, int64_t padded) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float* x = s.score + r * kChunkTokens;
      float* w = s.weight + r * kChunkTokens;
      F offset = S::zero(), most = S::zero();
      for (int64_t i = 0; i < padded; i += S::kLanes) {
        // Pages hold anything beyond the last token: what nobody sees must not turn into NaN.
        const F p = S::load(x + i);
        const F weight = S::zero_where_zero(p, S::mul(p, S::load_half(scales + i)));
        offset = S::add(offset, S::zero_where_zero(p, S::mul(p, S::load_half(offsets + i))));
        most = S::max(most, weight);
        S::store(w + i, weight);
      }
      float* sum = s.offset + r * groups + group;
      *sum = *sum * s.rescale[r] + S::reduce_add(offset);
      const float size = S::reduce_max(most);
      s.probability_scale[r] = size / kLargestInteger<B>;
      int8_t* bytes = s.probability + B * r * kChunkTokens;
      split_bytes<S, B>(w, padded, size == 0.0f ? 0.0f : kLargestInteger<B> / size, bytes,
                        kChunkTokens, s.probability_start + B * r);
    }
  }

  // output = output * rescale + probability times value codes, P rows, V vectors of channels.
  template <int P, int V>
  void value_tile(const uint8_t* values, int64_t r, int64_t channel, int64_t padded) const {
    const int64_t tile_bytes = a.page.block_size * kTile / 2;
    I sum[B * P][V];
    multiply_byte_tiles<S, B * P, V>(
        s.probability + B * r * kChunkTokens, kChunkTokens, s.probability_start + B * r,
        values + channel / kTile * tile_bytes, tile_bytes, padded / kBlock, sum);
    for (int m = 0; m < P; ++m) {
      const F scale = S::set(s.probability_scale[r + m]), rescale = S::set(s.rescale[r + m]);
      for (int v = 0; v < V; ++v) {
        float* out = s.output + (r + m) * head_size + channel + v * S::kLanes;
        const F product = join_bytes<S, B>(sum, m, v);
        S::store(out, S::fma(S::load(out), rescale, S::mul(product, scale)));
      }
    }
  }

  struct ScoreRows {
    const AttentionKernel& kernel;
    const uint8_t* keys;
    const uint16_t* parameters;
    int64_t r, padded;
    template <int P>
    void run() const {
      constexpr int kVectors = S::vectors(B * P), kStep = kVectors * S::kLanes;
      constexpr int kPerTile = kTile / S::kLanes;
      int64_t t = 0;
      for (; t + kStep <= padded; t += kStep) {
        kernel.template score_tile<P, kVectors>(keys, parameters, r, t);
      }
      for (; t < padded; t += kTile)
        kernel.template score_tile<P, kPerTile>(keys, parameters, r, t);
    }
  };

  struct ValueRows {
    const AttentionKernel& kernel;
    const uint8_t* values;
    int64_t r, first, last, padded;
    template <int P>
    void run() const {
      constexpr int kVectors = S::vectors(B * P), kStep = kVectors * S::kLanes;
      constexpr int kPerTile = kTile / S::kLanes;
      int64_t c = first;
      for (; c + kStep <= last; c += kStep) {
        kernel.template value_tile<P, kVectors>(values, r, c, padded);
      }
      for (; c < last; c += kTile) kernel.template value_tile<P, kPerTile>(values, r, c, padded);
    }
  };

  void run() const {
    load_queries();
    const PageLayout& page = a.page;
    constexpr int64_t kPieceRows = S::kRows / B;
    const int64_t tiles = ceil_div(rows, kPieceRows);
    const int32_t* blocks = a.block_table + piece.request * a.block_table_stride;
    int64_t start = piece.context_start / kTile * kTile;
    while (start < piece.context_end) {
      const int64_t t = start % page.block_size;
      const int64_t count =
          min_of(min_of(page.block_size - t, kChunkTokens), piece.context_end - start);
      const int64_t padded = round_up(count, kTile);
      const uint8_t* region = a.kv_cache + blocks[start / page.block_size] * page.block_stride +
                              piece.kv_head * page.head_stride;
      const uint8_t* keys = region + t / kTile * (head_size * kTile / 2);
      const uint8_t* values = region + page.value_start() + t / kBlock * kTileBlockBytes;
      const uint16_t* parameters =
          reinterpret_cast<const uint16_t*>(region + page.parameters_start()) + t;
      const int64_t kind = groups * page.block_size;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t r = rows * i / tiles, end = rows * (i + 1) / tiles;
        with_rows<kPieceRows>(end - r, ScoreRows{*this, keys, parameters, r, padded});
      }
      softmax(start, padded);
      for (int64_t g = 0; g < groups; ++g) {
        const uint16_t* scales = parameters + 2 * kind + g * page.block_size;
        weigh(scales, scales + kind, g, padded);
        for (int64_t i = 0; i < tiles; ++i) {
          const int64_t r = rows * i / tiles, end = rows * (i + 1) / tiles;
          with_rows<kPieceRows>(
              end - r, ValueRows{*this, values, r, g * group_size, (g + 1) * group_size, padded});
        }
      }
      start += count;
    }
  }

  // Row r's result: output, with the value offsets in it, not yet divided by the total.
  void add_offsets() const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t g = 0; g < groups; ++g) {
        const F offset = S::set(s.offset[r * groups + g]);
        float* x = s.output + r * head_size + g * group_size;
        for (int64_t i = 0; i < group_size; i += S::kLanes) {
          S::store(x + i, S::add(S::load(x + i), offset));
        }
      }
    }
  }
};

}  // namespace
}  // namespace offq
