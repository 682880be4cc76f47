"""A linear layer: two kernels, or three where few tokens share the channels between programs.

The first one quantizes the input, and computes it before, if it is a norm or an activation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vllm_offq.format import unpack_int4
from vllm_offq.kernels.interface import Weight
from vllm_offq.kernels.triton.gemm import gemm
from vllm_offq.kernels.triton.gemm_config import gemm_config
from vllm_offq.kernels.triton.quantize_tile import Quantized
from vllm_offq.kernels.triton.rms_norm_quantize import rms_norm_quantize
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize
from vllm_offq.kernels.triton.silu_and_mul_quantize import silu_and_mul_quantize
from vllm_offq.kernels.triton.target import gpu, num_cores

MAX_INT16_GROUP = 4095
"""Channels whose codes, at most 8 in size, have a sum of 16 bits."""


def prepare_weight(weight_packed: Tensor, weight_scale: Tensor, group_size: int) -> Weight:
    """Codes stay packed, now in two's complement, which is unpacked with fewer instructions.

    weight_packed: [N, K / 2] uint8; weight_scale: [N, 1 or G] float16. Returns: codes
    [N, K / 2] uint8; scale [1 or G, N]; sums [G, N] int16 (int32 for very long groups).
    """
    codes = unpack_int4(weight_packed).unflatten(-1, (-1, group_size))
    sums = codes.sum(-1, dtype=torch.int16 if group_size <= MAX_INT16_GROUP else torch.int32)
    return Weight(
        (weight_packed ^ 0x88).contiguous(), weight_scale.T.contiguous(), sums.T.contiguous()
    )


def linear(x: Tensor, *linear_inputs: Any) -> Tensor:
    """See reference.linear."""
    return _multiply(x, rotate_quantize, *linear_inputs)


def rms_norm_linear(x: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any) -> Tensor:
    """See reference.rms_norm_linear."""
    quantize = partial(rms_norm_quantize, weight=norm_weight, epsilon=epsilon)
    return _multiply(x, quantize, *linear_inputs)


def fused_add_rms_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any
) -> tuple[Tensor, Tensor]:
    """See reference.fused_add_rms_norm_linear."""
    total = x.new_empty(x.shape)
    quantize = partial(
        rms_norm_quantize,
        weight=norm_weight,
        epsilon=epsilon,
        residual=_rows(residual),
        total=_rows(total),
    )
    return _multiply(x, quantize, *linear_inputs), total


def silu_and_mul_linear(x: Tensor, *linear_inputs: Any) -> Tensor:
    """See reference.silu_and_mul_linear."""
    return _multiply(x, silu_and_mul_quantize, *linear_inputs)


def _multiply(
    x: Tensor,
    quantize: Callable[..., Quantized],
    weight: Weight,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int = 4,
) -> Tensor:
    """Weights times what quantize makes of the rows of x."""
    y_shape = (*x.shape[:-1], out_features)
    if not x.numel():
        return x.new_empty(y_shape)
    rows = _rows(x)
    config = gemm_config(
        gpu().tensor_core,
        num_cores(x.device),
        len(rows),
        out_features,
        len(weight.sums),
        group_size,
        bits,
    )
    quantized = quantize(
        rows, group_size, rotation_block_size, clip_ratio, symmetric, bits, config.wide
    )
    return gemm(quantized, weight, bias, group_size, x.dtype, config).view(y_shape)


def _rows(x: Tensor) -> Tensor:
    """[T, any] with contiguous channels."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()
