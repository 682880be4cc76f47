// Causal attention of a ragged batch over packed pages: cut into pieces, pieces merged.
#pragma once

#include "attention_piece.h"

namespace offq {
namespace {

constexpr int64_t kQueryRows = 32;      // of a piece: query tokens times heads of one KV head
constexpr int64_t kSplitTokens = 1024;  // context of a piece, where a request has only one
constexpr int64_t kMaxSplits = 8;

template <class S>
inline void write_head(const Attention& a, int64_t token, int64_t head, const float* x,
                       float total) {
  const typename S::F inverse = S::set(1.0f / total);
  char* out = element(a.output, a.dtype, token * a.output_stride + head * a.page.head_size);
  for (int64_t i = 0; i < a.page.head_size; i += S::kLanes) {
    store_as<S>(a.dtype, out, i, S::mul(S::load(x + i), inverse));
  }
}

// How one request is cut. Depends on nothing but the request: not on threads, not on the batch.
struct Cut {
  int64_t tokens, heads_per_kv, tile_tokens, tiles, start, length, split_tokens, splits;

  static Cut of(const Attention& a, int64_t request) {
    Cut c{};
    c.tokens = a.query_start_loc[request + 1] - a.query_start_loc[request];
    c.length = a.seq_lens[request];
    c.heads_per_kv = a.num_heads / a.page.num_kv_heads;
    c.tile_tokens = max_of(1, kQueryRows / c.heads_per_kv);
    c.tiles = ceil_div(c.tokens, c.tile_tokens);
    if (a.sliding_window) c.start = max_of(0, c.length - c.tokens + 1 - a.sliding_window);
    c.start = c.start / kTile * kTile;
    const int64_t context = c.length - c.start;
    c.split_tokens = max_of(kSplitTokens, round_up(ceil_div(context, kMaxSplits), kChunkTokens));
    c.splits = c.tiles == 1 ? max_of(1, ceil_div(context, c.split_tokens)) : 1;
    if (c.splits == 1) c.split_tokens = context;
    return c;
  }
  int64_t rows() const { return min_of(tokens, tile_tokens) * heads_per_kv; }
};

template <class S, int B>
int paged_attention_in_bytes(const Attention& a) {
  const PageLayout& page = a.page;
  const int64_t heads_per_kv = a.num_heads / page.num_kv_heads, head_size = page.head_size;
  const int threads = omp_get_max_threads();
  int64_t count = 0, partial_rows = 0, most_rows = 0;
  for (int64_t request = 0; request < a.requests; ++request) {
    const Cut cut = Cut::of(a, request);
    count += cut.tiles * cut.splits * page.num_kv_heads;
    if (cut.splits > 1) partial_rows += cut.splits * cut.rows() * page.num_kv_heads;
    most_rows = max_of(most_rows, cut.rows());
  }
  AttentionPiece* pieces = nullptr;
  float *partial_output = nullptr, *partial_state = nullptr;
  AttentionScratch* scratch = nullptr;
  for (char* base = nullptr;;) {
    Arena arena{base};
    pieces = arena.take<AttentionPiece>(count);
    partial_output = arena.take<float>(partial_rows * head_size);
    partial_state = arena.take<float>(2 * partial_rows);  // maximum, total
    scratch = arena.take<AttentionScratch>(threads);
    for (int i = 0; i < threads; ++i) {
      const AttentionScratch one = AttentionScratch::take(&arena, most_rows, B, page);
      if (base) scratch[i] = one;
    }
    if (base) break;
    base = static_cast<char*>(workspace(arena.used));
    if (!base) return 1;
  }

  int64_t next = 0, next_partial = 0;
  for (int64_t request = 0; request < a.requests; ++request) {
    const Cut cut = Cut::of(a, request);
    const int64_t first = a.query_start_loc[request];
    // The last tile sees the longest context: begun first, it is not waited for at the end.
    for (int64_t tile = cut.tiles - 1; tile >= 0; --tile) {
      for (int64_t head = 0; head < page.num_kv_heads; ++head) {
        for (int64_t split = 0; split < cut.splits; ++split) {
          AttentionPiece& piece = pieces[next++];
          piece.request = request;
          piece.kv_head = head;
          piece.first_token = first + tile * cut.tile_tokens;
          piece.tokens = min_of(cut.tile_tokens, cut.tokens - tile * cut.tile_tokens);
          const int64_t position = cut.length - cut.tokens + tile * cut.tile_tokens;
          const int64_t seen = a.sliding_window ? max_of(0, position + 1 - a.sliding_window) : 0;
          piece.context_start = max_of(cut.start + split * cut.split_tokens, seen);
          piece.context_end =
              min_of(cut.start + (split + 1) * cut.split_tokens, position + piece.tokens);
          piece.partial = cut.splits > 1 ? next_partial : -1;
          if (cut.splits > 1) next_partial += cut.rows();
        }
      }
    }
  }

#pragma omp parallel num_threads(threads) if (count > 1)
  {
    const AttentionScratch& s = scratch[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const AttentionPiece& piece = pieces[i];
      const AttentionKernel<S, B> kernel{a, piece, s};
      kernel.run();
      kernel.add_offsets();
      for (int64_t r = 0; r < kernel.rows; ++r) {
        const float* x = s.output + r * head_size;
        if (piece.partial < 0) {
          write_head<S>(a, piece.first_token + r / heads_per_kv,
                        piece.kv_head * heads_per_kv + r % heads_per_kv, x, s.total[r]);
          continue;
        }
        const int64_t at = piece.partial + r;
        __builtin_memcpy(partial_output + at * head_size, x, head_size * sizeof(float));
        partial_state[2 * at] = s.maximum[r];
        partial_state[2 * at + 1] = s.total[r];
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; ++i) {
      const AttentionPiece& piece = pieces[i];
      const bool first = piece.partial >= 0 && (i == 0 || pieces[i - 1].request != piece.request ||
                                                pieces[i - 1].kv_head != piece.kv_head);
      if (!first) continue;
      const int64_t rows = piece.tokens * heads_per_kv, splits = Cut::of(a, piece.request).splits;
      for (int64_t r = 0; r < rows; ++r) {
        float maximum = -__builtin_inff(), total = 0.0f;
        for (int64_t k = 0; k < splits; ++k) {
          const float m = partial_state[2 * (piece.partial + k * rows + r)];
          maximum = m > maximum ? m : maximum;
        }
        __builtin_memset(s.output, 0, head_size * sizeof(float));
        for (int64_t k = 0; k < splits; ++k) {
          const int64_t at = piece.partial + k * rows + r;
          const float weight = AttentionKernel<S, B>::exp2_of(partial_state[2 * at] - maximum);
          total += partial_state[2 * at + 1] * weight;
          const float* x = partial_output + at * head_size;
          for (int64_t d = 0; d < head_size; d += S::kLanes) {
            S::store(s.output + d, S::fma(S::load(x + d), S::set(weight), S::load(s.output + d)));
          }
        }
        write_head<S>(a, piece.first_token + r / heads_per_kv,
                      piece.kv_head * heads_per_kv + r % heads_per_kv, s.output, total);
      }
    }
  }
  return 0;
}

template <class S>
int paged_attention(const Attention& a) {
  return static_cast<DType>(a.dtype) == DType::kFloat32 ? paged_attention_in_bytes<S, 3>(a)
                                                        : paged_attention_in_bytes<S, 2>(a);
}

}  // namespace
}  // namespace offq
