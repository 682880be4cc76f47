"""Activations to codes: online Hadamard, group scale and offset, rounding, packing; one pass."""

import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.quantize_tile import (
    Quantized,
    has_tile,
    quantize_tile,
    tile_arguments,
)
from vllm_offq.rotation import apply_block_hadamard

TILE_BYTES = 8192
"""Of a program's input: enough loads in flight, and registers to spare for the product."""


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
    rotation_norm,
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
    channel = tl.arange(0, 2 * HALF)
    row = token.to(tl.int64)
    x = tl.load(
        x_ptr + row[:, None] * x_stride + group * GROUP_SIZE + channel[None, :],
        mask=is_token[:, None] & (channel < GROUP_SIZE)[None, :],
        other=0.0,
    )
    quantize_tile(
        x,
        is_token,
        group * token_stride + token,
        row * num_groups + group,
        matrix_ptr,
        codes_ptr,
        scale_ptr,
        offset_ptr,
        range_to_scale,
        rotation_norm,
        GROUP_SIZE,
        HADAMARD,
        SYMMETRIC,
        BITS,
        WIDE,
        ROWS,
        HALF,
    )


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
    if not has_tile(group_size, rotation_block_size):
        x, rotation_block_size = apply_block_hadamard(x.float(), rotation_block_size), 0
    tokens, channels = x.shape
    quantized = Quantized.empty(tokens, channels, group_size, wide, x.device)
    rows, half, num_warps = tile_shape(group_size, rotation_block_size, tokens, x.element_size())
    grid = group_size, rotation_block_size, clip_ratio, symmetric, bits, wide
    rotate_quantize_kernel[triton.cdiv(tokens, rows), len(quantized.scale)](
        x,
        x.stride(0),
        num_tokens=tokens,
        **tile_arguments(quantized, x.dtype, *grid),
        ROWS=rows,
        HALF=half,
        num_warps=num_warps,
    )
    return quantized
