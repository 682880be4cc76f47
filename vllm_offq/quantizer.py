"""The uniform grid: what a code means, and how a value becomes one.

One grid serves activations, keys, values and weights: ``value = scale * code + offset`` with
integer codes in [-8, 7], or in [-128, 127] for activations of 8 bits. Asymmetric groups use
``offset = (max + min) / 2 + scale / 2`` (the half step that makes the levels integers, OffQ
section on offset quantization); symmetric groups use ``offset = 0``. Arithmetic is float32;
kernels must follow it operation by operation.
"""

import torch
from torch import Tensor

CODE_MIN, CODE_MAX = -8, 7
"""Of 4 bits."""


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def range_to_scale(clip_ratio: float, symmetric: bool, bits: int) -> float:
    """What the range of a group (the largest magnitude, if symmetric) is multiplied by."""
    least, largest = code_range(bits)
    return clip_ratio / (largest if symmetric else largest - least)


def group_range(
    x: Tensor, group_size: int, clip_ratio: float = 1.0, symmetric: bool = False, bits: int = 4
) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group of channels.

    x: [..., n], group_size divides n; clip_ratio shrinks the range about its centre.
    Returns: scale and offset, [..., n / group_size] float32. A constant group has scale 0 and
    its value as offset.
    """
    groups = x.float().unflatten(-1, (-1, group_size))
    low, high = groups.aminmax(dim=-1)
    factor = range_to_scale(clip_ratio, symmetric, bits)
    if symmetric:
        scale = torch.maximum(high, -low) * factor
        return scale, torch.zeros_like(scale)
    scale = (high - low) * factor
    # Halves are summed: high + low may overflow where each of them does not.
    return scale, high * 0.5 + low * 0.5 + scale * 0.5


def quantize(x: Tensor, scale: Tensor, offset: Tensor, bits: int = 4) -> Tensor:
    """Codes nearest to x, ties to even.

    x: [..., n]; scale, offset: [..., G] float32, G divides n. Returns: [..., n] int8.
    A NaN or infinite group has NaN as scale or offset; its codes are 0, so that the NaN reaches
    the output by the scale and no other row.
    """
    groups = x.float().unflatten(-1, (scale.shape[-1], -1))
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    codes = ((groups - offset.unsqueeze(-1)) * inverse.unsqueeze(-1)).round()
    return codes.nan_to_num(0.0).clamp(*code_range(bits)).to(torch.int8).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """``scale * code + offset`` in float32.

    codes: [..., n] int8; scale, offset: [..., G], G divides n. Returns: [..., n] float32.
    """
    groups = codes.float().unflatten(-1, (scale.shape[-1], -1)) * scale.float().unsqueeze(-1)
    if offset is not None:
        groups = groups + offset.float().unsqueeze(-1)
    return groups.flatten(-2)


def fake_quantize(
    x: Tensor, group_size: int, clip_ratio: float = 1.0, symmetric: bool = False, bits: int = 4
) -> Tensor:
    """Quantize and dequantize: what the grid makes of x. x: [..., n]. Returns: like x."""
    scale, offset = group_range(x, group_size, clip_ratio, symmetric, bits)
    return dequantize(quantize(x, scale, offset, bits), scale, offset).to(x.dtype)
