"""New keys and values into 4-bit pages, and the rotation that keys and queries share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.grid import asymmetric_range, has_nan, quantize
from vllm_offq.kernels.triton.kv_page import channels_contiguous, num_groups_of, pack_parameters
from vllm_offq.kernels.triton.target import gpu
from vllm_offq.quantizer import range_to_scale

MAX_COLUMNS = 64
"""Of a tile of rotated heads: rotations have few rows to share, so programs share columns."""
ROWS_PER_WARP = 8
"""Of such a tile; with more, registers spill."""


@triton.jit
def rotate_rows(
    row_ptrs, row_mask, rotation_ptr, column, HEAD_SIZE: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows of HEAD_SIZE channels times some columns of a rotation. Returns: float32.

    row_ptrs, row_mask: [M]; rotation_ptr: to [HEAD_SIZE, HEAD_SIZE] float32; column: [N].
    """
    BLOCK_K: tl.constexpr = 32 if HEAD_SIZE % 32 == 0 else 16
    channel = tl.arange(0, BLOCK_K)
    total = tl.zeros((row_ptrs.shape[0], column.shape[0]), tl.float32)
    for start in range(0, HEAD_SIZE, BLOCK_K):
        x_ptrs = row_ptrs[:, None] + (start + channel)[None, :]
        x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0).to(tl.float32)
        columns_ptr = rotation_ptr + (start + channel)[:, None] * HEAD_SIZE + column[None, :]
        columns = tl.load(columns_ptr, mask=(column < HEAD_SIZE)[None, :], other=0.0)
        total = tl.dot(x, columns, total, input_precision=PRECISION)
    return total


@triton.jit
def load_halves(row_ptrs, pair, mask, HALF: tl.constexpr):
    """Channels `pair` [N], and HALF further, of rows [M], in float32."""
    ptrs = row_ptrs[:, None] + pair[None, :]
    low = tl.load(ptrs, mask=mask, other=0.0)
    high = tl.load(ptrs + HALF, mask=mask, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def stored_range(low, high, mask, range_to_scale):
    """Float16 scale and offset [M] of groups in two parts. low, high: [M, N]; mask: [1, N]."""
    scale, offset = asymmetric_range(low, high, mask, range_to_scale)
    is_nan = has_nan(low, high)
    return (
        tl.where(is_nan, float("nan"), scale).to(tl.float16),
        tl.where(is_nan, float("nan"), offset).to(tl.float16),
    )


@triton.jit
def quantize_rows(x, scale, offset):
    """Codes + 8 of x [M, N], by float16 scale and offset [M]."""
    return quantize(x, scale.to(tl.float32), offset.to(tl.float32), 4) + 8


@triton.jit(do_not_specialize=["num_tokens"])
def kv_store_kernel(
    key_ptr,
    key_token_stride,
    key_head_stride,
    value_ptr,
    value_token_stride,
    value_head_stride,
    rotation_ptr,
    slot_ptr,
    cache_ptr,
    block_stride,
    head_stride,
    num_tokens,
    range_to_scale,
    ROTATED: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Keys, or values, of ROWS tokens and one head; COLUMNS: half a head, to a power of two."""
    HALF: tl.constexpr = HEAD_SIZE // 2
    head, is_value = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.load(slot_ptr + token, mask=token < num_tokens, other=-1)
    is_stored = slot >= 0
    token = token.to(tl.int64)
    pair = tl.arange(0, COLUMNS)
    pair_mask = (pair < HALF)[None, :]
    mask = is_stored[:, None] & pair_mask
    if is_value:
        rows = value_ptr + token * value_token_stride + head * value_head_stride
        low, high = load_halves(rows, pair, mask, HALF)
    else:
        rows = key_ptr + token * key_token_stride + head * key_head_stride
        if ROTATED:
            matrix = rotation_ptr + head * HEAD_SIZE * HEAD_SIZE
            low = rotate_rows(rows, is_stored, matrix, pair, HEAD_SIZE, PRECISION)
            high = rotate_rows(rows, is_stored, matrix, HALF + pair, HEAD_SIZE, PRECISION)
        else:
            low, high = load_halves(rows, pair, mask, HALF)

    place = slot % BLOCK_SIZE
    page_ptr = cache_ptr + slot // BLOCK_SIZE * block_stride + head.to(tl.int64) * head_stride
    words_ptr = (page_ptr + BLOCK_SIZE * HEAD_SIZE).to(tl.pointer_type(tl.uint32))
    words_ptr += is_value * NUM_GROUPS * BLOCK_SIZE + place
    if NUM_GROUPS == 1:
        scale, offset = stored_range(low, high, pair_mask, range_to_scale)
        high_scale, high_offset = scale, offset
    else:
        scale, offset = stored_range(low, low, pair_mask, range_to_scale)
        high_scale, high_offset = stored_range(high, high, pair_mask, range_to_scale)
        tl.store(words_ptr + BLOCK_SIZE, pack_parameters(high_scale, high_offset), mask=is_stored)
    tl.store(words_ptr, pack_parameters(scale, offset), mask=is_stored)
    codes = quantize_rows(low, scale, offset)
    codes |= quantize_rows(high, high_scale, high_offset) << 4
    codes_ptr = page_ptr + (is_value * BLOCK_SIZE + place) * HALF
    tl.store(codes_ptr[:, None] + pair[None, :], codes.to(tl.uint8), mask=mask)


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    group_size: int,
    rotation: Tensor | None = None,
) -> None:
    """See reference.kv_store; kv_page says how a page is arranged.

    Raises: UserError if a head has more than two groups.
    """
    tokens, num_heads, head_size = key.shape
    num_groups = num_groups_of(kv_cache, head_size, group_size)
    assert value.shape == key.shape
    assert slot_mapping.shape == (tokens,)
    assert rotation is None or rotation.shape == (num_heads, head_size, head_size)
    if not tokens:
        return
    key, value = channels_contiguous(key), channels_contiguous(value)
    # Many rows share a read of the rotation; few leave it to more programs.
    rows = 16 if tokens <= 256 or head_size > 128 else 64
    kv_store_kernel[triton.cdiv(tokens, rows), num_heads, 2](
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        key if rotation is None else rotation.contiguous(),
        slot_mapping,
        kv_cache,
        kv_cache.stride(0),
        kv_cache.stride(1),
        tokens,
        range_to_scale(clip_ratio=1.0, symmetric=False, bits=4),
        ROTATED=rotation is not None,
        HEAD_SIZE=head_size,
        NUM_GROUPS=num_groups,
        BLOCK_SIZE=kv_cache.shape[2],
        PRECISION=gpu().float32_precision,
        ROWS=rows,
        COLUMNS=triton.next_power_of_2(head_size // 2),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def rotate_heads_kernel(
    x_ptr,
    token_stride,
    head_stride,
    rotation_ptr,
    out_ptr,
    num_rows,
    RATIO: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """ROWS of one KV head, RATIO for each token, times COLUMNS of its rotation."""
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    token, head = (row // RATIO).to(tl.int64), kv_head * RATIO + row % RATIO
    x_ptrs = x_ptr + token * token_stride + head * head_stride
    matrix = rotation_ptr + kv_head * HEAD_SIZE * HEAD_SIZE
    rotated = rotate_rows(x_ptrs, row < num_rows, matrix, column, HEAD_SIZE, PRECISION)
    out_row = token * (tl.num_programs(1) * RATIO) + head
    mask = (row < num_rows)[:, None] & (column < HEAD_SIZE)[None, :]
    tl.store(out_ptr + out_row[:, None] * HEAD_SIZE + column[None, :], rotated, mask=mask)


def rotate_heads(x: Tensor, rotation: Tensor) -> Tensor:
    """See reference.rotate_heads; the result has x's dtype, to which attention, the only reader,
    would round a float32 one before its first product."""
    tokens, num_heads, head_size = x.shape
    kv_heads = rotation.shape[0]
    assert num_heads % kv_heads == 0
    assert rotation.shape[1:] == (head_size, head_size)
    x = channels_contiguous(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    ratio = num_heads // kv_heads
    rows = 16 if tokens * ratio <= 256 else 64
    columns = min(triton.next_power_of_2(head_size), MAX_COLUMNS)
    grid = triton.cdiv(tokens * ratio, rows), kv_heads, triton.cdiv(head_size, columns)
    rotate_heads_kernel[grid](
        x,
        x.stride(0),
        x.stride(1),
        rotation.contiguous(),
        out,
        tokens * ratio,
        RATIO=ratio,
        HEAD_SIZE=head_size,
        PRECISION=gpu().float32_precision,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(4, rows // ROWS_PER_WARP),
    )
    return out
