"""Causal attention of a ragged batch over 4-bit pages.

Codes go to the products as they are. What turns them into keys and values is done to scores and
probabilities: ``q . k = scale (q . codes) + offset sum(q)`` for each token of the context, and
``sum p v = sum (p scale) codes + sum p offset``. Exponentials are powers of two.
"""

from math import e, log2, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.kv_page import (
    channels_contiguous,
    num_groups_of,
    unpack_codes,
    unpack_parameters,
)
from vllm_offq.kernels.triton.kv_store import rotate_heads
from vllm_offq.kernels.triton.merge_splits import merge_splits
from vllm_offq.kernels.triton.paged_attention_config import (
    MIN_TILES,
    attention_config,
    find_request,
    tiles_for,
)
from vllm_offq.kernels.triton.target import gpu, num_cores


@triton.jit
def add_up(total, decay, terms, LATE_SUMS: tl.constexpr):
    """total * decay + terms [ROWS, TILE], or their sums."""
    if LATE_SUMS:
        decay = decay[:, None]
    else:
        terms = tl.sum(terms, 1)
    return total * decay + terms


# Of a step's batch a part may be given, which begins anywhere: no kernel for each alignment.
@triton.jit(
    do_not_specialize=["num_requests", "num_splits"],
    do_not_specialize_on_alignment=["block_table_ptr", "seq_lens_ptr", "query_start_loc_ptr"],
)
def paged_attention_kernel(
    query_ptr,
    query_token_stride,
    query_head_stride,
    output_ptr,
    output_token_stride,
    output_head_stride,
    lse_ptr,
    cache_ptr,
    block_stride,
    head_stride,
    block_table_ptr,
    block_table_stride,
    seq_lens_ptr,
    query_start_loc_ptr,
    num_requests,
    num_splits,
    score_scale,
    soft_cap,
    RATIO: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLIT: tl.constexpr,
    MIN_TILES: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PTX: tl.constexpr,
    PTX_IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some new tokens of one request, with the RATIO heads of one KV head for each, and their
    context, or if SPLIT one of S parts of it, in tiles of TILE tokens.

    If SPLIT, output is [T, H, S, D] float32 and lse [T, H, S], log2 of the sum of exponentials.
    ONE_TILE: no request has more rows. COLUMNS: half a head, to a power of two.
    """
    HALF: tl.constexpr = HEAD_SIZE // 2
    TOKENS: tl.constexpr = ROWS // RATIO
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    # Few rows leave registers to keep terms, and add them up at the end: warps share the context
    # of such a tile, and a sum across warps in every step would make them wait.
    LATE_SUMS: tl.constexpr = ROWS <= 16
    IN_PLACE: tl.constexpr = PTX_IN_PLACE or ROWS <= 32  # Blackwell takes Ampere's products then
    kv_head, split = tl.program_id(1), tl.program_id(2)
    # The last rows of a request see most: they start first.
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if ONE_TILE:
        request, first_token = row_tile, 0
    else:
        request, first_token = find_request(row_tile, query_start_loc_ptr, num_requests, TOKENS)
    start = tl.load(query_start_loc_ptr + request)
    num_new = tl.load(query_start_loc_ptr + request + 1) - start
    if first_token >= num_new:
        return

    row = tl.arange(0, ROWS)
    token = first_token + row // RATIO
    row_mask = (token < num_new) & (row < TOKENS * RATIO)
    num_old = tl.load(seq_lens_ptr + request) - num_new
    position = num_old + token
    token = (start + token).to(tl.int64)
    head = kv_head * RATIO + row % RATIO
    pair = tl.arange(0, COLUMNS)
    mask = row_mask[:, None] & (pair < HALF)[None, :]
    query_ptrs = query_ptr + token * query_token_stride + head * query_head_stride
    query_ptrs = query_ptrs[:, None] + pair[None, :]
    query_low = tl.load(query_ptrs, mask=mask, other=0.0)
    query_high = tl.load(query_ptrs + HALF, mask=mask, other=0.0)
    sum_low = tl.sum(query_low.to(tl.float32), 1) * score_scale
    sum_high = tl.sum(query_high.to(tl.float32), 1) * score_scale
    if NUM_GROUPS == 1:
        sum_low += sum_high

    end = num_old + tl.minimum(first_token + TOKENS, num_new)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(num_old + first_token - WINDOW + 1, 0)
    first, last = begin // TILE, tl.cdiv(end, TILE)
    if SPLIT:
        tiles = tl.maximum(tl.cdiv(last - first, num_splits), MIN_TILES)
        first += split * tiles
        last = tl.minimum(first + tiles, last)

    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    if LATE_SUMS:
        total = tl.zeros((ROWS, TILE), tl.float32)
    else:
        total = tl.zeros((ROWS,), tl.float32)
    shift_low, shift_high = total, total
    low, high = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    table_ptr = block_table_ptr + tl.cast(request, tl.int64) * block_table_stride
    pages_ptr = cache_ptr + kv_head.to(tl.int64) * head_stride
    for tile in range(first, last):
        # Codes are read without masks: any bytes are numbers, and those beyond a row or beyond
        # the context are still bytes of some page. Parameters may be NaN there.
        context = tile * TILE + tl.arange(0, TILE)
        is_seen = (context >= begin) & (context < end)
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table_ptr + tile * TILE // BLOCK_SIZE)
            place = tile * TILE % BLOCK_SIZE + tl.arange(0, TILE)
        else:
            block = tl.load(table_ptr + context // BLOCK_SIZE, mask=is_seen, other=0)
            place = context % BLOCK_SIZE
        page_ptr = pages_ptr + block.to(tl.int64) * block_stride
        key_ptrs = (page_ptr + place * HALF)[None, :] + pair[:, None]
        value_ptrs = (page_ptr + (BLOCK_SIZE + place) * HALF)[:, None] + pair[None, :]
        words_ptr = (page_ptr + BLOCK_SIZE * HEAD_SIZE).to(tl.pointer_type(tl.uint32)) + place

        key_low, key_high = unpack_codes(tl.load(key_ptrs), DTYPE, PTX, IN_PLACE)
        scale, offset = unpack_parameters(tl.load(words_ptr))
        scores = tl.dot(query_low, key_low, input_precision="ieee")
        if NUM_GROUPS == 1:
            scores = tl.dot(query_high, key_high, scores, input_precision="ieee")
        scores = scores * (scale * score_scale)[None, :] + sum_low[:, None] * offset[None, :]
        if NUM_GROUPS == 2:
            scale, offset = unpack_parameters(tl.load(words_ptr + BLOCK_SIZE))
            high_scores = tl.dot(query_high, key_high, input_precision="ieee")
            scores += high_scores * (scale * score_scale)[None, :]
            scores += sum_high[:, None] * offset[None, :]
        if SOFT_CAP:
            scores = soft_cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
        visible = context[None, :] <= position[:, None]
        if WINDOW > 0:
            visible &= context[None, :] > (position - WINDOW)[:, None]
        scores = tl.where(visible, scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)  # a row may see nothing of a tile
        p = tl.exp2(scores - base[:, None])
        decay = tl.exp2(largest - base)
        largest = larger

        value_low, value_high = unpack_codes(tl.load(value_ptrs), DTYPE, PTX, IN_PLACE)
        words_ptr += NUM_GROUPS * BLOCK_SIZE
        scale, offset = unpack_parameters(tl.load(words_ptr, mask=is_seen, other=0))
        total = add_up(total, decay, p, LATE_SUMS)
        shift_low = add_up(shift_low, decay, p * offset[None, :], LATE_SUMS)
        scaled = (p * scale[None, :]).to(DTYPE)
        low = tl.dot(scaled, value_low, low * decay[:, None], input_precision="ieee")
        if NUM_GROUPS == 2:
            word = tl.load(words_ptr + BLOCK_SIZE, mask=is_seen, other=0)
            scale, offset = unpack_parameters(word)
            shift_high = add_up(shift_high, decay, p * offset[None, :], LATE_SUMS)
            scaled = (p * scale[None, :]).to(DTYPE)
        high = tl.dot(scaled, value_high, high * decay[:, None], input_precision="ieee")

    if NUM_GROUPS == 1:
        shift_high = shift_low
    if LATE_SUMS:
        total, shift_low, shift_high = tl.sum(total, 1), tl.sum(shift_low, 1), tl.sum(shift_high, 1)
    low = (low + shift_low[:, None]) / total[:, None]
    high = (high + shift_high[:, None]) / total[:, None]
    output_ptrs = output_ptr + token * output_token_stride + head * output_head_stride
    if SPLIT:
        output_ptrs += split * HEAD_SIZE
        lse_index = (token * (tl.num_programs(1) * RATIO) + head) * num_splits + split
        tl.store(lse_ptr + lse_index, largest + tl.log2(total), mask=row_mask)
        mask &= (total != 0.0)[:, None]
    output_ptrs = output_ptrs[:, None] + pair[None, :]
    tl.store(output_ptrs, low, mask=mask)
    tl.store(output_ptrs + HALF, high, mask=mask)


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
    """See reference.paged_attention. All indices stay on the device, for CUDA graphs.

    max_query_len: no request has more new tokens; None: it may be all of them.
    Raises: UserError if a head has more than two groups.
    """
    tokens, num_heads, head_size = query.shape
    num_requests, kv_heads = len(seq_lens), kv_cache.shape[1]
    num_groups = num_groups_of(kv_cache, head_size, group_size)
    assert (output.shape, output.dtype) == (query.shape, query.dtype)
    assert output.stride(2) == block_table.stride(1) == 1
    assert num_heads % kv_heads == 0
    assert len(block_table) == num_requests == len(query_start_loc) - 1
    if not tokens:
        return
    query = channels_contiguous(query) if rotation is None else rotate_heads(query, rotation)
    ratio = num_heads // kv_heads
    max_context = block_table.shape[1] * kv_cache.shape[2]
    config = attention_config(
        tiles_for(query.dtype, head_size, num_groups, gpu().tensor_core),
        tokens,
        num_requests,
        tokens if max_query_len is None else max_query_len,
        ratio,
        kv_heads,
        min(max_context, sliding_window or max_context),
        num_cores(query.device),
    )
    parts, lse = output, output
    if config.splits > 1:
        shape = (tokens, num_heads, config.splits)
        sizes = prod(shape) * head_size, prod(shape)
        if workspace is None:
            workspace = torch.empty(sum(sizes), dtype=torch.float32, device=query.device)
        parts, lse = workspace[: sum(sizes)].split(sizes)
        parts, lse = parts.view(*shape, head_size), lse.view(shape)
    score_scale = scale * log2(e)
    if logits_soft_cap:
        score_scale *= 2 / logits_soft_cap
    paged_attention_kernel[config.row_tiles, kv_heads, config.splits](
        query,
        query.stride(0),
        query.stride(1),
        parts,
        parts.stride(0),
        parts.stride(1),
        lse,
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        block_table,
        block_table.stride(0),
        seq_lens,
        query_start_loc,
        num_requests,
        config.splits,
        score_scale,
        (logits_soft_cap or 0.0) * log2(e),
        RATIO=ratio,
        HEAD_SIZE=head_size,
        NUM_GROUPS=num_groups,
        BLOCK_SIZE=kv_cache.shape[2],
        WINDOW=sliding_window or 0,
        SOFT_CAP=bool(logits_soft_cap),
        SPLIT=config.splits > 1,
        MIN_TILES=MIN_TILES,
        ONE_TILE=config.one_tile,
        PTX=gpu().has_ptx,
        PTX_IN_PLACE=gpu().keeps_ptx_in_place,
        ROWS=config.rows,
        COLUMNS=max(triton.next_power_of_2(head_size // 2), 16),
        TILE=config.tile,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.splits > 1:
        merge_splits(parts, lse, output, query_start_loc)
