"""Activations to codes: online Hadamard, group scale and offset, rounding, packing; one pass."""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.gemm_config import MAX_BLOCK_M
from vllm_offq.kernels.triton.grid import asymmetric_range, has_nan, quantize
from vllm_offq.quantizer import range_to_scale
from vllm_offq.rotation import apply_block_hadamard, hadamard

MAX_HADAMARD = 128
"""The largest block whose matrix fits beside a tile; torch applies larger ones, and those that are
not the group."""

TILE_BYTES = 8192
"""Of a program's input: enough loads in flight, and registers to spare for the product."""


class Quantized(NamedTuple):
    """Activations as gemm reads them. Parameters are group by group: a tile reads neighbours."""

    codes: Tensor
    """[T, K / 2] uint8, nibbles in two's complement, the even channel low; or wide: int8
    [T, G, 2, K / G / 2], of each group the even channels first."""
    scale: Tensor
    """[G, T or more] float32, so many that any tile can be read whole."""
    offset: Tensor
    """Likewise."""


@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def rotate_quantize_kernel(
    x_ptr,
    x_stride,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    num_tokens,
    token_stride,
    num_groups,
    range_to_scale,
    norm,
    GROUP_SIZE: tl.constexpr,
    HADAMARD: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """ROWS groups of neighbouring tokens; HALF: of a group, padded to a power of two."""
    group = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    pair = tl.arange(0, HALF)
    is_pair = pair < GROUP_SIZE // 2
    channel = tl.arange(0, 2 * HALF)
    is_channel = channel < GROUP_SIZE
    row = token.to(tl.int64)[:, None]
    x = tl.load(
        x_ptr + row * x_stride + group * GROUP_SIZE + channel[None, :],
        mask=is_token[:, None] & is_channel[None, :],
        other=0.0,
    )
    if HADAMARD:
        column_ptrs = matrix_ptr + channel[:, None] * (GROUP_SIZE // 2) + pair[None, :]
        column_mask = is_channel[:, None] & is_pair[None, :]
        even_columns = tl.load(column_ptrs, mask=column_mask, other=0.0)
        column_ptrs += GROUP_SIZE * (GROUP_SIZE // 2)
        odd_columns = tl.load(column_ptrs, mask=column_mask, other=0.0)
        even = multiply_signs(x, even_columns) * norm
        odd = multiply_signs(x, odd_columns) * norm
    else:
        even, odd = tl.split(x.to(tl.float32).reshape(ROWS, HALF, 2))

    if SYMMETRIC:
        scale = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1) * range_to_scale
        offset = tl.zeros_like(scale)
    else:
        scale, offset = asymmetric_range(even, odd, is_pair[None, :], range_to_scale)
    scale = tl.where(has_nan(even, odd), float("nan"), scale)
    parameter = group * token_stride + token
    tl.store(scale_ptr + parameter, scale, mask=is_token)
    tl.store(offset_ptr + parameter, offset, mask=is_token)

    even = quantize(even, scale, offset, BITS)
    odd = quantize(odd, scale, offset, BITS)
    group_number = row * num_groups + group
    mask = is_token[:, None] & is_pair[None, :]
    if WIDE:
        out_ptrs = codes_ptr + group_number * GROUP_SIZE + pair[None, :]
        tl.store(out_ptrs, even.to(tl.int8), mask=mask)
        tl.store(out_ptrs + GROUP_SIZE // 2, odd.to(tl.int8), mask=mask)
    else:
        out_ptrs = codes_ptr + group_number * (GROUP_SIZE // 2) + pair[None, :]
        packed = (even & 15) | (odd << 4)
        tl.store(out_ptrs, packed.to(tl.uint8), mask=mask)


@triton.jit
def multiply_signs(x, columns):
    """x times columns of entries 1 and -1, exact but for the sums, which are float32's."""
    if x.dtype == tl.float32:
        # Three bfloat16, cut off and not rounded, hold all digits of a float32.
        high = cut_to_bfloat16(x)
        middle = cut_to_bfloat16(x - high.to(tl.float32))
        low = (x - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, columns, tl.dot(middle, columns, tl.dot(high, columns)))
    else:
        product = tl.dot(x, columns)
    return product


@triton.jit
def cut_to_bfloat16(x):
    """The largest bfloat16 that is no larger in size."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@cache
def signs(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix times sqrt(block), entries 1 and -1. [2, block, block / 2]: the even
    columns, then the odd ones."""
    matrix = (hadamard(block) * block**0.5).round().unflatten(1, (-1, 2)).permute(2, 0, 1)
    return matrix.contiguous().to(device, torch.bfloat16 if dtype == torch.float32 else dtype)


def tile_shape(
    group_size: int, rotation_block_size: int, tokens: int, element_size: int
) -> tuple[int, int, int]:
    """Of one program: ROWS, HALF and warps. element_size: bytes of an activation."""
    least = 16 if rotation_block_size else 1  # of a product
    half = max(triton.next_power_of_2(group_size // 2), least)
    rows = max(TILE_BYTES // (2 * half * element_size), least)
    rows = min(rows, max(16, triton.next_power_of_2(tokens)))
    return rows, half, min(max(4, rows * half // 1024), 32)


def rotate_quantize(
    x: Tensor,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    wide: bool,
) -> Quantized:
    """See reference.rotate_quantize. x: [T, K] with contiguous channels.

    wide: a byte for each code, which 8 bits need.
    """
    tokens, channels = x.shape
    num_groups = channels // group_size
    has_tile = rotation_block_size == group_size <= MAX_HADAMARD
    if rotation_block_size and not has_tile:
        x = apply_block_hadamard(x.float(), rotation_block_size)
    shape = (tokens, num_groups, 2, group_size // 2) if wide else (tokens, channels // 2)
    codes = torch.empty(shape, dtype=torch.int8 if wide else torch.uint8, device=x.device)
    token_stride = triton.cdiv(tokens, MAX_BLOCK_M) * MAX_BLOCK_M
    parameters = torch.empty(2, num_groups, token_stride, dtype=torch.float32, device=x.device)
    scale, offset = parameters.unbind()
    rows, half, num_warps = tile_shape(
        group_size, rotation_block_size if has_tile else 0, tokens, x.element_size()
    )
    rotate_quantize_kernel[triton.cdiv(tokens, rows), num_groups](
        x,
        x.stride(0),
        signs(group_size, x.dtype, x.device) if has_tile else x,
        codes,
        scale,
        offset,
        tokens,
        token_stride,
        num_groups,
        range_to_scale(clip_ratio, symmetric, bits),
        rotation_block_size**-0.5 if has_tile else 1.0,
        GROUP_SIZE=group_size,
        HADAMARD=has_tile,
        SYMMETRIC=symmetric,
        BITS=bits,
        WIDE=wide,
        ROWS=rows,
        HALF=half,
        num_warps=num_warps,
    )
    return Quantized(codes, scale, offset)
