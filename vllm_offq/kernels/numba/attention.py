"""Causal attention of a ragged batch over packed pages.

Queries and probabilities become integers of B bytes, each of them B rows of signed bytes, so that
their products with 4-bit codes are exact, as in cpu/src/attention_piece.h. A key's offset enters as
offset * sum(query), a value's as sum(probability * offset). Softmax is online, over chunks of a
page.
"""

from math import e, log2

import numpy as np
import torch
from torch import Tensor

from vllm_offq.kernels.cpu import TILE
from vllm_offq.kernels.numba.compiling import (
    Array,
    Float,
    Floats3,
    Int,
    Int32s1,
    Int32s2,
    Int64s2,
    UInt8s1,
    helper,
    kernel,
)
from vllm_offq.kernels.numba.kv_store import Pages, parts
from vllm_offq.kernels.numba.rows import (
    ONE,
    ZERO,
    exp2,
    from_half,
    highest,
    join_bytes,
    largest,
    maximum,
    split_bytes,
    sum_of,
)
from vllm_offq.kernels.numba.tile import multiply
from vllm_offq.kernels.reference import rotate_heads

MINUS_2_LOG2E = np.float32(-2 * log2(e))
CHUNK = 128
"""Tokens of the context at a time."""
QUERY_ROWS = 32
"""Query tokens times heads of one KV head at a time."""


@helper
def to_floats(halves: Array, out: Array) -> None:
    for i in range(len(out)):
        out[i] = from_half(halves[i])


@helper
def add_scores(
    score: Array, product: Array, step: float, scale: Array, total: float, offset: Array
) -> None:
    """product: of integers and codes; step: of the integers; total: of what they stand for."""
    for i in range(len(score)):
        score[i] += product[i] * (scale[i] * step) + offset[i] * total


@helper
def add_values(result: Array, rescale: float, product: Array, step: float) -> None:
    for i in range(len(result)):
        result[i] = result[i] * rescale + product[i] * step


@helper
def softmax(
    score: Array, begin: int, end: int, before: np.float32
) -> tuple[np.float32, np.float32]:
    """Scores in units of log 2 to probabilities relative to the largest; 0 beyond [begin, end).

    Returns: the largest, where none before was larger, and the probability of the one before.
    """
    score[:begin] = ZERO
    score[end:] = ZERO
    seen = score[begin:end]
    top = maximum(before, highest(seen))
    for i in range(len(seen)):
        seen[i] = exp2(seen[i] - top)
    return top, ONE if begin == end else exp2(before - top)


@helper
def cap(score: Array, soft_cap: np.float32) -> None:
    """Scores in units of log 2 to ``c * tanh(score / c)``, c being soft_cap in those units."""
    step = MINUS_2_LOG2E / soft_cap
    for i in range(len(score)):
        x = score[i]
        shrunk = exp2(abs(x) * step)
        most = soft_cap * ((ONE - shrunk) / (ONE + shrunk))
        score[i] = most if x > ZERO else -most


@helper
def weigh(probability: Array, parameter: Array, out: Array) -> None:
    """Pages hold anything beyond the last token: what nobody sees must not turn into NaN."""
    for i in range(len(out)):
        weighted = probability[i] * parameter[i]
        out[i] = ZERO if probability[i] == ZERO else weighted


@kernel
def attend(
    query: Floats3,
    output: Floats3,
    pages: UInt8s1,
    block_size: Int,
    group_size: Int,
    block_stride: Int,
    head_stride: Int,
    kv_heads: Int,
    block_table: Int32s2,
    seq_lens: Int32s1,
    ends: Int32s1,
    pieces: Int64s2,
    piece_tokens: Int,
    num_bytes: Int,
    scale: Float,
    window: Int,
    soft_cap: Float,
    first: Int,
    last: Int,
) -> None:
    """Of H_kv heads times pieces [P, 2], request and first token, those in [first, last).

    query, output: [T, H, D]; ends: [R] int32, of each request's tokens; scale: to scores in units
    of log 2; window: 0 for none; soft_cap: in units of log 2, 0 for none.
    """
    _, heads, head_size = query.shape
    ratio, groups, width = heads // kv_heads, head_size // group_size, max(CHUNK, head_size)
    most = piece_tokens * ratio
    query_bytes = np.empty((groups, most, num_bytes, group_size), np.int8)
    query_start = np.empty((groups, most, num_bytes), np.int32)
    query_sum = np.empty((groups, most), np.float32)
    query_step = np.empty(most, np.float32)
    score = np.empty((most, CHUNK), np.float32)  # then the probabilities
    weight_bytes = np.empty((most, num_bytes, CHUNK), np.int8)  # probabilities * value scales
    weight_start = np.empty((most, num_bytes), np.int32)
    weight_step = np.empty(most, np.float32)
    offset = np.empty((groups, most), np.float32)  # sum of probability * value offset
    result = np.empty((most, head_size), np.float32)
    rescale, top, total = np.empty((3, most), np.float32)
    sums = np.empty((most, num_bytes, width), np.int32)
    row, integers = np.empty(width, np.float32), np.empty(width, np.int32)
    scale_row, offset_row = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)

    for item in range(first, last):
        head, (request, token) = item % kv_heads, pieces[item // kv_heads]
        rows = min(piece_tokens, ends[request] - token) * ratio
        for r in range(rows):
            q = query[token + r // ratio, head * ratio + r % ratio]
            size = largest(q)
            for g in range(groups):
                part = q[g * group_size : (g + 1) * group_size]
                step = split_bytes(part, size, query_bytes[g, r], query_start[g, r], integers)
                query_step[r], query_sum[g, r] = step * scale, sum_of(part) * scale
        top[:], total[:], offset[:], result[:] = -np.inf, ZERO, ZERO, ZERO

        position = seq_lens[request] - (ends[request] - token)
        end = position + rows // ratio
        at = max(0, position + 1 - window) // TILE * TILE if window else 0
        while at < end:
            t = at % block_size
            tokens = min(CHUNK, block_size - t, end - at)
            padded = -(-tokens // TILE) * TILE
            block = block_table[request, at // block_size]
            page = pages[block * block_stride + head * head_stride :]
            keys, values, parameters = parts(page, block_size, head_size)
            in_chunk, in_group = row[:padded], row[:group_size]
            scales, offsets = scale_row[:padded], offset_row[:padded]

            score[:rows, :padded] = ZERO
            for g in range(groups):
                for i in range(0, padded, TILE):
                    code = ((t + i) // TILE * head_size + g * group_size) * TILE // 2
                    tile = keys[code : code + group_size * TILE // 2]
                    multiply(query_bytes[g, :rows], tile, sums, i)
                to_floats(parameters[g * block_size + t :], scales)
                to_floats(parameters[(groups + g) * block_size + t :], offsets)
                for r in range(rows):
                    join_bytes(sums[r], query_start[g, r], in_chunk)
                    step, added = query_step[r], query_sum[g, r]
                    add_scores(score[r, :padded], in_chunk, step, scales, added, offsets)

            for r in range(rows):
                seen = position + r // ratio + 1 - at  # tokens of the chunk, were it longer
                begin = max(0, seen - window) if window else 0
                seen = max(0, min(seen, padded))
                chances = score[r, :padded]
                if soft_cap != ZERO:
                    cap(chances, soft_cap)
                top[r], rescale[r] = softmax(chances, min(begin, seen), seen, top[r])
                total[r] = total[r] * rescale[r] + sum_of(chances)

            for g in range(groups):
                to_floats(parameters[(2 * groups + g) * block_size + t :], scales)
                to_floats(parameters[(3 * groups + g) * block_size + t :], offsets)
                for r in range(rows):
                    weigh(score[r], offsets, in_chunk)
                    offset[g, r] = offset[g, r] * rescale[r] + sum_of(in_chunk)
                    weigh(score[r], scales, in_chunk)
                    weight_step[r] = split_bytes(
                        in_chunk, largest(in_chunk), weight_bytes[r], weight_start[r], integers
                    )
                channel = g * group_size
                for i in range(0, group_size, TILE):
                    code = ((channel + i) // TILE * block_size + t) * TILE // 2
                    tile = values[code : code + padded * TILE // 2]
                    multiply(weight_bytes[:rows], tile, sums, i)
                for r in range(rows):
                    join_bytes(sums[r], weight_start[r], in_group)
                    done = result[r, channel : channel + group_size]
                    add_values(done, rescale[r], in_group, weight_step[r])
            at += tokens

        for r in range(rows):
            y = output[token + r // ratio, head * ratio + r % ratio]
            for g in range(groups):
                part = slice(g * group_size, (g + 1) * group_size)
                y[part] = (result[r, part] + offset[g, r]) / total[r]


def cut(starts: np.ndarray, most: int) -> np.ndarray:
    """Requests into pieces of at most so many tokens. starts: [R + 1]. Returns: [P, 2] int64."""
    counts = -(-np.diff(starts) // most)
    request = np.repeat(np.arange(len(counts)), counts)
    index = np.arange(len(request)) - np.repeat(counts.cumsum() - counts, counts)
    return np.stack([request, starts[request] + index * most], 1)


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    output: Tensor,
    scale: float,
    group_size: int,
    sliding_window: int | None = None,
    rotation: Tensor | None = None,
    max_query_len: int | None = None,
    logits_soft_cap: float | None = None,
    workspace: Tensor | None = None,
) -> None:
    """See reference.paged_attention."""
    num_bytes = 3 if query.dtype == torch.float32 else 2  # float32 has 24 bits itself
    query = query.float() if rotation is None else rotate_heads(query, rotation)
    starts, kv_heads = query_start_loc.numpy(), kv_cache.shape[1]
    piece_tokens = max(1, QUERY_ROWS * kv_heads // query.shape[1])
    pieces = cut(starts, piece_tokens)
    result = np.empty((starts[-1], *query.shape[1:]), np.float32)
    attend(
        query.contiguous().numpy(),
        result,
        *Pages.of(kv_cache, group_size),
        kv_heads,
        block_table.contiguous().numpy(),
        seq_lens.numpy(),
        starts[1:],
        pieces,
        piece_tokens,
        num_bytes,
        np.float32(scale * log2(e)),
        sliding_window or 0,
        np.float32((logits_soft_cap or 0.0) * log2(e)),
        count=len(pieces) * kv_heads,
        parts_per_thread=4,
    )
    output[: len(result)] = torch.from_numpy(result)
