"""A linear layer: two kernels, or three where few tokens share the channels between programs."""

import torch
from torch import Tensor

from vllm_offq.format import unpack_int4
from vllm_offq.kernels.reference import Weight
from vllm_offq.kernels.triton.gemm import gemm
from vllm_offq.kernels.triton.gemm_config import gemm_config
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize
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


def linear(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int = 4,
) -> Tensor:
    """See reference.linear."""
    y_shape = (*x.shape[:-1], out_features)
    if not x.numel():
        return x.new_empty(y_shape)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    config = gemm_config(
        gpu().tensor_core,
        num_cores(x.device),
        len(rows),
        out_features,
        rows.shape[1] // group_size,
        group_size,
        bits,
    )
    quantized = rotate_quantize(
        rows, group_size, rotation_block_size, clip_ratio, symmetric, bits, config.wide
    )
    y = gemm(quantized, weight, bias, group_size, x.dtype, config)
    return y.view(y_shape)
