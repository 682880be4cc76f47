"""The activation between gate_up_proj and down_proj, quantized in the pass that computes it."""

import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels import reference
from vllm_offq.kernels.triton.quantize_tile import (
    Quantized,
    compute_once,
    has_tile,
    quantize_tile,
    tile_arguments,
)
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize, tile_shape
from vllm_offq.kernels.triton.target import gpu


@triton.jit(do_not_specialize=["num_tokens", "num_groups"])
def silu_and_mul_quantize_kernel(
    x_ptr,
    x_stride,
    channels,
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
    PTX: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """ROWS groups of neighbouring tokens; HALF: of a group, padded to a power of two."""
    group = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    channel = tl.arange(0, 2 * HALF)
    mask = is_token[:, None] & (channel < GROUP_SIZE)[None, :]
    row = token.to(tl.int64)
    gate_ptrs = x_ptr + row[:, None] * x_stride + group * GROUP_SIZE + channel[None, :]
    gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptrs + channels, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp(-gate)) * up
    y = y.to(x_ptr.dtype.element_ty)
    if HADAMARD:
        y = compute_once(y, PTX)
    quantize_tile(
        y,
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


def silu_and_mul_quantize(
    x: Tensor,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    wide: bool,
) -> Quantized:
    """rotate_quantize of reference.silu_and_mul(x). x: [T, 2 K] with contiguous channels."""
    grid = group_size, rotation_block_size, clip_ratio, symmetric, bits, wide
    if not has_tile(group_size, rotation_block_size):
        return rotate_quantize(reference.silu_and_mul(x), *grid)
    tokens, channels = x.shape[0], x.shape[1] // 2
    quantized = Quantized.empty(tokens, channels, group_size, wide, x.device)
    rows, half, num_warps = tile_shape(group_size, rotation_block_size, tokens, x.element_size())
    silu_and_mul_quantize_kernel[triton.cdiv(tokens, rows), len(quantized.scale)](
        x,
        x.stride(0),
        channels,
        num_tokens=tokens,
        **tile_arguments(quantized, x.dtype, *grid),
        PTX=gpu().has_ptx,
        ROWS=rows,
        HALF=half,
        num_warps=num_warps,
    )
    return quantized
