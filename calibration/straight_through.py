"""Grids and products with codes, with gradients for `calibration.refine`."""

from typing import Any

import torch
from torch import Tensor

from vllm_offq.quantizer import dequantize, group_range, quantize


def fake_quantize(
    x: Tensor, group_size: int, clip_ratio: float = 1.0, symmetric: bool = False, bits: int = 4
) -> Tensor:
    """`vllm_offq.quantizer.fake_quantize`, differentiable. x: [..., n]. Returns: like x."""
    scale, offset = group_range(x, group_size, clip_ratio, symmetric, bits)
    return straight_through(x, scale, offset, bits)


def fake_quantize_kv(x: Tensor, group_size: int) -> Tensor:
    """The cache's grid: like activations, but scale and offset are stored in float16."""
    scale, offset = (part.half().float() for part in group_range(x, group_size))
    return straight_through(x, scale, offset)


def straight_through(x: Tensor, scale: Tensor, offset: Tensor, bits: int = 4) -> Tensor:
    """What the grid makes of x, differentiable. x: [..., n]; scale, offset: [..., G].

    Rounding has no useful derivative. What it adds to x is a number of steps that counts as
    constant, so the gradient passes through unchanged, and a step that grows is seen to make the
    error larger.
    """
    with torch.no_grad():
        y = dequantize(quantize(x, scale, offset, bits), scale, offset).to(x.dtype)
    if not x.requires_grad:
        return y
    steps = scale.detach().unsqueeze(-1)
    error = (y - x).detach().unflatten(-1, (scale.shape[-1], -1))
    error = torch.where(steps == 0, 0.0, error / steps)
    moved = x + (error * scale.unsqueeze(-1)).flatten(-2)
    return y + (moved - moved.detach())  # y itself, to the bit, with the gradient of `moved`


class CodedProduct(torch.autograd.Function):
    """``x W^T`` of the weight that codes and scales stand for.

    Its floats are there only while they are multiplied by: what autograd would keep of a model
    that is larger than its activations is mostly weights.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        """x: [..., K]; codes: [N, K] int8; scale: [N, G] float32. Returns: [..., N]."""
        ctx.save_for_backward(x, codes, scale)
        return x @ dequantize(codes, scale).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor]:
        """Of x and scale."""
        x, codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        of_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        groups = (of_weight * codes).unflatten(1, (scale.shape[1], -1))
        return gradient @ dequantize(codes, scale), None, groups.sum(-1)
