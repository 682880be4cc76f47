"""Codes times codes by the integer tensor cores, group scales, offset term, bias."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.interface import Weight
from vllm_offq.kernels.triton.add_splits import add_splits
from vllm_offq.kernels.triton.gemm_config import GemmConfig
from vllm_offq.kernels.triton.quantize_tile import Quantized
from vllm_offq.kernels.triton.target import Gpu, gpu
from vllm_offq.kernels.triton.tile import along_outputs, along_tokens, multiply_tile

FLOAT_INTEGERS = 0x4B400000
"""Integers from this one on are the last bits of the floats from 12582912 on: a sum that starts
here becomes a float by a subtraction, where conversions are slow."""


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "steps_per_split"])
def gemm_kernel(
    codes_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    bias_ptr,
    y_ptr,
    num_tokens,
    token_stride,
    out_features,
    half_channels,
    num_groups,
    steps_per_split,
    GROUP_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_PER_GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SWIZZLE: tl.constexpr,
    START: tl.constexpr,
):
    """One tile of y, or of the sum of one split of the channels: [SPLIT_K, T, N] float32."""
    tiles_m, tiles_n = tl.cdiv(num_tokens, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, SWIZZLE
    )
    token = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < out_features
    # Rows beyond the last are computed from the first ones and not stored: no masks in the loop.
    token_row = (token % num_tokens).to(tl.int64)
    output_row = (output % out_features).to(tl.int64)

    split = tl.program_id(1)
    total = multiply_tile(
        codes_ptr,
        scale_ptr,
        offset_ptr,
        weight_ptr,
        weight_scale_ptr,
        weight_sums_ptr,
        token,
        token_row,
        output,
        output_row,
        is_output,
        token_stride,
        out_features,
        half_channels,
        num_groups,
        split,
        steps_per_split,
        GROUP_SIZE,
        WIDE,
        SCALE_PER_GROUP,
        SPLIT_K,
        PTX,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        BLOCK_G,
        START,
    )

    valid = along_tokens(token < num_tokens, WIDE) & along_outputs(is_output, WIDE)
    place = along_tokens(token.to(tl.int64) * out_features, WIDE) + along_outputs(output, WIDE)
    if SPLIT_K == 1:
        if not SCALE_PER_GROUP:
            weight_scale = tl.load(weight_scale_ptr + output, mask=is_output, other=0.0)
            total *= along_outputs(weight_scale.to(tl.float32), WIDE)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + output, mask=is_output, other=0.0)
            total += along_outputs(bias.to(tl.float32), WIDE)
        tl.store(y_ptr + place, total.to(y_ptr.dtype.element_ty), mask=valid)
    else:
        plane = split.to(tl.int64) * num_tokens * out_features
        tl.store(y_ptr + plane + place, total, mask=valid)


def gemm_constants(
    gpu: Gpu, config: GemmConfig, group_size: int, scale_per_group: bool, has_bias: bool
) -> dict[str, int | bool | str]:
    """What gemm_kernel is compiled with."""
    return {
        "GROUP_SIZE": group_size,
        "WIDE": config.wide,
        "SCALE_PER_GROUP": scale_per_group,
        "HAS_BIAS": has_bias,
        "SPLIT_K": config.split_k,
        "PTX": gpu.has_ptx,
        "PRECISION": gpu.tf32_precision,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_G": 16,  # more groups at a time spill registers
        "SWIZZLE": config.swizzle,
        "START": FLOAT_INTEGERS if gpu.converts_slowly else 0,
    }


def gemm(
    quantized: Quantized,
    weight: Weight,
    bias: Tensor | None,
    group_size: int,
    dtype: torch.dtype,
    config: GemmConfig,
) -> Tensor:
    """See reference.gemm, with bias and rounding to dtype. Returns: [T, N].

    weight: as prepare_weight makes it; bias: [N].
    """
    num_groups, tokens = len(quantized.scale), len(quantized.codes)
    out_features, half_channels = weight.codes.shape
    scale_per_group = weight.scale.shape[0] > 1
    y = torch.empty(tokens, out_features, dtype=dtype, device=weight.codes.device)
    target = y
    if config.split_k > 1:
        shape = (config.split_k, tokens, out_features)
        target = torch.empty(shape, dtype=torch.float32, device=y.device)
    steps = num_groups * triton.cdiv(group_size, config.block_k)
    tiles = triton.cdiv(tokens, config.block_m) * triton.cdiv(out_features, config.block_n)
    gemm_kernel[tiles, config.split_k](
        *quantized,
        weight.codes,
        weight.scale,
        weight.sums,
        bias,
        target,
        tokens,
        quantized.scale.stride(0),
        out_features,
        half_channels,
        num_groups,
        triton.cdiv(steps, config.split_k),
        **gemm_constants(gpu(), config, group_size, scale_per_group, bias is not None),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if config.split_k > 1:
        add_splits(target, weight.scale, bias, y)
    return y
