"""The linear layer: activations to codes, codes times the packed weight, offset term, bias."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

from vllm_offq.kernels.cpu import BLOCK, TILE, segment_size
from vllm_offq.kernels.interface import Weight
from vllm_offq.kernels.numba.compiling import (
    Bool,
    Float,
    Floats2,
    Int,
    Int8s3,
    Int16s3,
    Int32s2,
    UInt8s4,
    UInt16s2,
    kernel,
)
from vllm_offq.kernels.numba.rows import block_hadamard, group_range, quantize
from vllm_offq.kernels.numba.tile import multiply_segments
from vllm_offq.quantizer import range_to_scale
from vllm_offq.rotation import hadamard_core

TOKENS = 256
"""Of a block, whose codes stay in the second-level cache."""


@kernel
def quantize_rows(
    x: Floats2,
    core: Floats2,
    block: Int,
    norm: Float,
    group_size: Int,
    segment: Int,
    factor: Float,
    symmetric: Bool,
    bits: Int,
    codes: Int8s3,
    scale: Floats2,
    offset: Floats2,
    start: Int32s2,
    first: Int,
    last: Int,
) -> None:
    """Rows [first, last) of x [T, K] to codes [S, T, P]; the bytes beyond a segment stay zero."""
    row = np.empty(x.shape[1], np.float32)
    for token in range(first, last):
        row[:] = x[token]
        if block:
            block_hadamard(row, core, block, norm)
        for channel in range(0, len(row), group_size):
            of_group = group_range(row, channel, group_size, factor, symmetric)
            for s in range(channel // segment, (channel + group_size) // segment):
                scale[s, token], offset[s, token] = of_group
                part = codes[s, token, :segment]
                total = quantize(row, s * segment, *of_group, part, bits)
                start[s, token] = -8 * total


@kernel
def multiply_tiles(
    codes: Int8s3,
    scale: Floats2,
    offset: Floats2,
    start: Int32s2,
    weight_codes: UInt8s4,
    weight_sums: Int16s3,
    weight_scale: UInt16s2,
    scale_step: Int,
    y: Floats2,
    first: Int,
    last: Int,
) -> None:
    """Tiles [first, last) of the channels of y [T, 16 tiles]."""
    for tile in range(first, last):
        multiply_segments(
            codes,
            scale,
            offset,
            start,
            weight_codes[tile],
            weight_sums[tile],
            weight_scale[tile],
            scale_step,
            y,
            tile * TILE,
        )


@cache
def _rotation(block: int) -> tuple[np.ndarray, int, np.float32]:
    """Core, order and norm of the online Hadamard, as quantize_rows takes them."""
    return hadamard_core(block or 1).float().numpy(), block, np.float32((block or 1) ** -0.5)


def rotate_quantize(
    x: np.ndarray,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
) -> tuple[np.ndarray, ...]:
    """See reference.rotate_quantize; by segments, S for all channels.

    x: [T, K] float32. Returns: codes [S, T, P] int8, zeros after those of the segment; scale and
    offset [S, T] float32; -8 times the sum of the codes [S, T] int32, because weights are stored
    + 8.
    """
    segment = segment_size(group_size)
    shape = x.shape[1] // segment, x.shape[0]
    codes = np.zeros((*shape, -(-segment // BLOCK) * BLOCK), np.int8)
    scale, offset = np.empty(shape, np.float32), np.empty(shape, np.float32)
    quantized = codes, scale, offset, np.empty(shape, np.int32)
    factor = np.float32(range_to_scale(clip_ratio, symmetric, bits))
    grid = group_size, segment, factor, symmetric, bits
    quantize_rows(x, *_rotation(rotation_block_size), *grid, *quantized, count=len(x))
    return quantized


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
    grid = group_size, rotation_block_size, clip_ratio, symmetric, bits
    scale = weight.scale.view(torch.int16).numpy().view(np.uint16)
    scale_step = TILE if scale.ndim == 3 else 0
    tiles = len(scale)
    weights = weight.codes.numpy(), weight.sums.numpy(), scale.reshape(tiles, -1), scale_step
    rows = x.flatten(0, -2)
    y = torch.empty(len(rows), out_features, dtype=x.dtype)
    for begin in range(0, len(rows), TOKENS):
        block = slice(begin, begin + TOKENS)
        quantized = rotate_quantize(rows[block].float().contiguous().numpy(), *grid)
        padded = torch.empty(quantized[0].shape[1], tiles * TILE)
        multiply_tiles(*quantized, *weights, padded.numpy(), count=tiles)
        result = padded[:, :out_features]
        y[block] = result if bias is None else result + bias
    return y.view(*x.shape[:-1], out_features)
