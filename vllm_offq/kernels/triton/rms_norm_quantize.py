"""RMSNorm, of a sum with the residual stream or not, quantized in the pass that computes it.

A program has a whole token, in registers: its mean square is needed before the first scale, and
so it is read once. Few tokens are few programs, as they are in any kernel of a norm.
"""

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
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize
from vllm_offq.kernels.triton.target import gpu

WARP_CHANNELS = 512
"""Of a warp: 16 in each thread leave registers for all that is made of them."""
MAX_PRODUCT_WARPS = 8
"""With more, those of a product would compute the same."""
MAX_CHANNELS = 8192
"""Of a token, with padding, that registers hold, and an AMD GPU's 16 waves; torch normalizes wider
ones."""


@triton.jit(do_not_specialize=["num_groups"])
def rms_norm_quantize_kernel(
    x_ptr,
    x_stride,
    residual_ptr,
    residual_stride,
    total_ptr,
    weight_ptr,
    epsilon,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
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
    """All groups of one token, ROWS with padding; HALF: of a group, padded likewise."""
    token = tl.program_id(0)
    row = token.to(tl.int64)
    group = tl.arange(0, ROWS)
    is_group = group < num_groups
    channel = tl.arange(0, 2 * HALF)
    mask = is_group[:, None] & (channel < GROUP_SIZE)[None, :]
    place = group[:, None] * GROUP_SIZE + channel[None, :]
    channels = num_groups * GROUP_SIZE
    x = tl.load(x_ptr + row * x_stride + place, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row * residual_stride + place
        x += tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * channels + place, x.to(total_ptr.dtype.element_ty), mask=mask)
    mean_square = tl.sum(tl.sum(x * x, 1), 0) / channels
    weight = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(mean_square + epsilon) * weight
    y = y.to(x_ptr.dtype.element_ty)
    if HADAMARD:
        y = compute_once(y, PTX)
    quantize_tile(
        y,
        is_group,
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


def token_shape(num_groups: int, group_size: int, rotation_block_size: int) -> tuple[int, int, int]:
    """Of one program: ROWS, HALF and warps."""
    least = 16 if rotation_block_size else 1  # of a product
    rows = max(triton.next_power_of_2(num_groups), least)
    half = max(triton.next_power_of_2(group_size // 2), least)
    num_warps = max(4, 2 * rows * half // WARP_CHANNELS)
    return rows, half, min(num_warps, MAX_PRODUCT_WARPS) if rotation_block_size else num_warps


def rms_norm_quantize(
    x: Tensor,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    wide: bool,
    *,
    weight: Tensor,
    epsilon: float,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Quantized:
    """rotate_quantize of reference.rms_norm, of x or of x + residual, which is written to total.

    x, residual, total: [T, K] with contiguous channels; weight: [K].
    """
    grid = group_size, rotation_block_size, clip_ratio, symmetric, bits, wide
    tokens, channels = x.shape
    rows, half, num_warps = token_shape(channels // group_size, group_size, rotation_block_size)
    if 2 * rows * half > MAX_CHANNELS or not has_tile(group_size, rotation_block_size):
        if residual is None or total is None:
            y = reference.rms_norm(x, weight, epsilon)
        else:
            y, total[:] = reference.fused_add_rms_norm(x, residual, weight, epsilon)
        return rotate_quantize(y, *grid)
    quantized = Quantized.empty(tokens, channels, group_size, wide, x.device)
    rms_norm_quantize_kernel[tokens,](
        x,
        x.stride(0),
        residual,
        0 if residual is None else residual.stride(0),
        total,
        weight.contiguous(),
        epsilon,
        **tile_arguments(quantized, x.dtype, *grid),
        PTX=gpu().has_ptx,
        ROWS=rows,
        HALF=half,
        num_warps=num_warps,
    )
    return quantized
