// The linear layer: activations to codes, codes times packed weight, offset term, bias.
#pragma once

#include <omp.h>

#include "quantize.h"

namespace offq {
namespace {

// Activation codes of one block of tokens, by segment: a register tile reads rows that are
// neighbours in memory.
struct Codes {
  int8_t* codes;   // [segments, tokens, padded]
  float* scale;    // [segments, tokens]
  float* offset;   // [segments, tokens]
  int32_t* start;  // [segments, tokens]: -8 times the sum of codes, for weights stored as code + 8
  int64_t tokens;
  int64_t padded;  // segment_size, rounded up to whole blocks
};

template <class S>
void quantize_row(const Linear& a, int64_t token, float* row, const Codes& out, int64_t slot) {
  const InputGrid& grid = a.grid;
  read_row<S>(a.dtype, element(a.x, a.dtype, token * a.x_stride), a.in_features, row);
  if (grid.hadamard_block) block_hadamard<S>(row, a.in_features, grid);
  const int64_t per_group = grid.group_size / a.segment_size;
  const int64_t groups = a.in_features / grid.group_size;
  for (int64_t group = 0; group < groups; ++group) {
    const float* x = row + group * grid.group_size;
    const Range range =
        group_range<S>(x, grid.group_size, grid.range_to_scale, grid.symmetric != 0);
    for (int64_t part = 0; part < per_group; ++part) {
      const int64_t i = (group * per_group + part) * out.tokens + slot;
      const int32_t sum = quantize_group<S>(x + part * a.segment_size, a.segment_size, out.padded,
                                            range, out.codes + i * out.padded, grid.bits);
      out.scale[i] = range.scale;
      out.offset[i] = range.offset;
      out.start[i] = -8 * sum;
    }
  }
}

constexpr int64_t kTokens = 128;       // of a block: its codes stay in the second-level cache
constexpr int64_t kChannels = 64;      // of a piece of the output
constexpr int64_t kBytesAhead = 8192;  // of codes, fetched before they are needed
constexpr int64_t kChunk = 256;  // input channels whose unpacked codes stay in the first level

// A piece of the output: tokens of the block that starts at `start`, up to kChannels channels, and
// of its sum the segments [first, last). The sums rest in `partial`, [tokens, kChannels].
struct Piece {
  int64_t start, channel, channels, first, last;
  const uint8_t* codes;                 // of the first tile and segment
  int64_t tile_stride, segment_stride;  // bytes
  bool unpacked;
  float* partial;
};

// Whether the registers have room for the sums of a tile beside its products: no segment then
// reads and writes them in memory.
template <class S, int M, int V>
constexpr bool kHeld = 2 * M * V + V + 3 <= S::kRegisters;

template <class S, int M, int V>
__attribute__((always_inline)) inline void load_partial(const float* partial, bool is_first,
                                                        typename S::F (&sum)[M][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      sum[m][v] = is_first ? S::zero() : S::load(partial + m * kChannels + v * S::kLanes);
}

template <class S, int M, int V>
__attribute__((always_inline)) inline void store_partial(float* partial,
                                                         const typename S::F (&sum)[M][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) S::store(partial + m * kChannels + v * S::kLanes, sum[m][v]);
}

// sum += scale * dot + offset * sums of one segment, times the weights' own scale if it has one.
// Sums that are not held rest in `partial`.
template <class S, int M, int V, bool kGroupScale>
__attribute__((always_inline)) inline void add_segment(const Linear& a, const Codes& x,
                                                       typename S::I (&dot)[M][V], int64_t row,
                                                       int64_t place, int64_t tile_stride,
                                                       bool is_first, float* partial,
                                                       typename S::F (&sum)[M][V]) {
  using F = typename S::F;
  constexpr int kPerTile = kTile / S::kLanes;
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    const int64_t at = place + (v / kPerTile) * tile_stride + (v % kPerTile) * S::kLanes;
    F sums = S::load_int16(a.weight_sums + at), scales;
    if constexpr (kGroupScale) {
      scales = S::load_half(a.weight_scale + at);
      sums = S::mul(sums, scales);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      float* p = partial + m * kChannels + v * S::kLanes;
      F product = S::to_float(dot[m][v]);
      if constexpr (kGroupScale) product = S::mul(product, scales);
      if constexpr (!kHeld<S, M, V>) sum[m][v] = is_first ? S::zero() : S::load(p);
      sum[m][v] = S::fma(S::set(x.offset[row + m]), sums, sum[m][v]);
      sum[m][v] = S::fma(S::set(x.scale[row + m]), product, sum[m][v]);
      if constexpr (!kHeld<S, M, V>) S::store(p, sum[m][v]);
    }
  }
}

// M tokens from m0 on times V vectors of channels from n0 on, both counted within the piece. Codes
// of 8 bits do not leave room for the sum of a segment in narrow lanes.
template <class S, int M, int V, bool kBytes, bool kUnpacked>
void linear_tile(const Linear& a, const Codes& x, const Piece& piece, int64_t m0, int64_t n0) {
  constexpr int kPerTile = kTile / S::kLanes, kTiles = V > kPerTile ? V / kPerTile : 1;
  const int64_t segments = a.in_features / a.segment_size, blocks = x.padded / kBlock;
  const int64_t channel = piece.channel + n0;
  const uint8_t* codes =
      piece.codes + n0 / kTile * piece.tile_stride + n0 % kTile * (kTileBlockBytes / kTile);
  float* partial = piece.partial + m0 * kChannels + n0;
  // Few rows wait for memory, and the processor's own prefetcher stumbles at the end of each tile.
  const int64_t segments_ahead =
      kUnpacked ? 0 : min_of(ceil_div(kBytesAhead / kTiles, piece.segment_stride), segments);
  typename S::F sum[M][V];
  if constexpr (kHeld<S, M, V>) load_partial<S, M, V>(partial, piece.first == 0, sum);
  for (int64_t s = piece.first; s < piece.last; ++s, codes += piece.segment_stride) {
    int64_t ahead = segments_ahead * piece.segment_stride;
    if (s + segments_ahead >= segments) ahead += (kTiles - 1) * piece.tile_stride;
    const int64_t row = s * x.tokens + m0;
    const int64_t place = (channel / kTile * segments + s) * kTile + channel % kTile;
    const int8_t* rows = x.codes + row * x.padded;
    typename S::I dot[M][V];
    if constexpr (kBytes) {
      multiply_byte_tiles<S, M, V, kUnpacked>(rows, x.padded, x.start + row, codes,
                                              piece.tile_stride, blocks, dot, ahead);
    } else {
      typename S::Acc acc[M][V];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) acc[m][v] = S::start(x.start[row + m]);
      multiply_tiles<S, M, V, kUnpacked>(rows, x.padded, codes, piece.tile_stride, blocks, acc,
                                         ahead);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) dot[m][v] = S::widen(acc[m][v]);
    }
    if (a.scale_per_group) {
      add_segment<S, M, V, true>(a, x, dot, row, place, segments * kTile, s == 0, partial, sum);
    } else {
      add_segment<S, M, V, false>(a, x, dot, row, place, segments * kTile, s == 0, partial, sum);
    }
  }
  if constexpr (kHeld<S, M, V>) store_partial<S, M, V>(partial, sum);
}

template <class S, bool kBytes>
struct LinearRows {
  const Linear& a;
  const Codes& x;
  const Piece& piece;
  int64_t m0;

  template <int M>
  void run() const {
    constexpr int kVectors = S::vectors(M), kStep = kVectors * S::kLanes;
    constexpr int kPerTile = kTile / S::kLanes;
    int64_t n = 0;
    // Blocks of other numbers of rows are never unpacked.
    if constexpr (2 * M >= S::kPanelRows && M <= S::kPanelRows) {
      if (piece.unpacked) {
        for (; n + kStep <= piece.channels; n += kStep)
          linear_tile<S, M, kVectors, kBytes, true>(a, x, piece, m0, n);
        if constexpr (kStep > kTile)
          for (; n < piece.channels; n += kTile)
            linear_tile<S, M, kPerTile, kBytes, true>(a, x, piece, m0, n);
      }
    }
    for (; n + kStep <= piece.channels; n += kStep)
      linear_tile<S, M, kVectors, kBytes, false>(a, x, piece, m0, n);
    if constexpr (kStep > kTile)
      for (; n < piece.channels; n += kTile)
        linear_tile<S, M, kPerTile, kBytes, false>(a, x, piece, m0, n);
  }
};

// Finished sums to output: the channels' scale, bias, the output's dtype.
template <class S>
void write_piece(const Linear& a, const Piece& piece, int64_t tokens) {
  using F = typename S::F;
  for (int64_t n0 = 0; n0 < piece.channels; n0 += S::kLanes) {
    const int64_t n = piece.channel + n0, valid = min_of(a.out_features - n, S::kLanes);
    if (valid <= 0) break;
    const F bias = a.bias ? load_some<S>(a.dtype, a.bias, n, valid) : S::zero();
    const F scale = a.scale_per_group ? S::set(1.0f) : S::load_half(a.weight_scale + n);
    for (int64_t m = 0; m < tokens; ++m) {
      F y = S::mul(S::load(piece.partial + m * kChannels + n0), scale);
      if (a.bias) y = S::add(y, bias);
      const int64_t at = (piece.start + m) * a.out_features + n;
      if (valid == S::kLanes) {
        store_as<S>(a.dtype, a.y, at, y);
      } else {
        store_some<S>(a.dtype, a.y, at, y, valid);
      }
    }
  }
}

template <class S>
int linear(const Linear& a) {
  const int64_t segments = a.in_features / a.segment_size;
  const int64_t tokens = min_of(a.tokens, kTokens), pieces = ceil_div(a.out_features, kChannels);
  const int threads = omp_get_max_threads();

  Codes x{};
  x.tokens = tokens;
  x.padded = round_up(a.segment_size, kBlock);
  const int64_t segment_bytes = x.padded / kBlock * kTileBlockBytes;
  const int64_t row_size = round_up(a.in_features, kTile), partial_size = tokens * kChannels;
  // One tile of rows walks over all segments at once. Several share the codes of a few segments,
  // unpacked for them.
  const bool unpack = tokens > S::kMaxRows;
  const int64_t chunk = unpack ? max_of(1, kChunk / x.padded) : segments;
  const int64_t panel_size = unpack ? kChannels / kTile * chunk * 2 * segment_bytes : 0;

  float *rows = nullptr, *partials = nullptr;
  uint8_t* panels = nullptr;
  for (char* base = nullptr;;) {
    Arena arena{base};
    x.codes = arena.take<int8_t>(segments * tokens * x.padded);
    x.scale = arena.take<float>(segments * tokens);
    x.offset = arena.take<float>(segments * tokens);
    x.start = arena.take<int32_t>(segments * tokens);
    rows = arena.take<float>(threads * row_size);
    partials = arena.take<float>(threads * partial_size);
    panels = arena.take<uint8_t>(threads * panel_size);
    if (base) break;
    base = static_cast<char*>(workspace(arena.used));
    if (!base) return 1;
  }

#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < a.tokens; start += tokens) {
    const int64_t count = min_of(a.tokens - start, tokens);
    const int64_t tiles = unpack ? ceil_div(count, S::kPanelRows) : 1;
    const int thread = omp_get_thread_num();
    uint8_t* panel = panels + thread * panel_size;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t)
      quantize_row<S>(a, start + t, rows + thread * row_size, x, t);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < pieces; ++p) {
      Piece piece{};
      piece.start = start;
      piece.channel = p * kChannels;
      piece.channels = min_of(round_up(a.out_features - piece.channel, kTile), kChannels);
      piece.partial = partials + thread * partial_size;
      const uint8_t* weight = a.weight_codes + piece.channel / kTile * segments * segment_bytes;
      for (int64_t first = 0; first < segments; first += chunk) {
        piece.first = first;
        piece.last = min_of(first + chunk, segments);
        piece.codes = weight + first * segment_bytes;
        piece.tile_stride = segments * segment_bytes;
        piece.segment_stride = segment_bytes;
        piece.unpacked = tiles > 1;
        if (piece.unpacked) {
          const int64_t packed_bytes = (piece.last - first) * segment_bytes;
          for (int64_t tile = 0; tile < piece.channels / kTile; ++tile)
            unpack_blocks<S>(piece.codes + tile * piece.tile_stride, packed_bytes / kTileBlockBytes,
                             panel + tile * 2 * packed_bytes);
          piece.codes = panel;
          piece.tile_stride = 2 * packed_bytes;
          piece.segment_stride = 2 * segment_bytes;
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          const int64_t m0 = count * tile / tiles, m1 = count * (tile + 1) / tiles;
          if (S::kNarrow && a.grid.bits == 8) {
            with_rows<S::kMaxRows>(m1 - m0, LinearRows<S, S::kNarrow>{a, x, piece, m0});
          } else {
            with_rows<S::kMaxRows>(m1 - m0, LinearRows<S, false>{a, x, piece, m0});
          }
        }
      }
      write_piece<S>(a, piece, count);
    }
  }
  return 0;
}

}  // namespace
}  // namespace offq
