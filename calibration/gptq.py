"""Weights to codes: GPTQ (arXiv 2210.17323), which minimises output errors, or the nearest ones."""

import logging

import torch
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.format import HEAD_CODE_MAX
from vllm_offq.quantizer import CODE_MAX, CODE_MIN

logger = logging.getLogger(__name__)

CLIP_RATIOS = tuple(1.0 - 0.025 * step for step in range(25))
"""Shrink factors of the absolute maximum that the scale search tries."""
BLOCK_SIZE = 128
ROWS_AT_ONCE = 4096
"""Of a head, whose temporary copies would otherwise be the largest tensors of a run."""
DAMPING = 0.01
"""Added to the Hessian's diagonal, as a fraction of its mean."""


def search_scale(weight: Tensor, importance: Tensor) -> Tensor:
    """The symmetric scale of each row with the least error weighted by each channel's importance.

    weight: [N, k] float32; importance: [k], the Hessian's diagonal.
    Returns: [N] float32, values that float16 holds exactly, positive.
    """
    largest = weight.abs().amax(1) / CODE_MAX
    best_scale, best_error = largest, torch.full_like(largest, torch.inf)
    for ratio in CLIP_RATIOS:
        scale = stored_scale(largest * ratio)
        error = ((_round(weight, scale[:, None]) * scale[:, None] - weight).square()) @ importance
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale


def stored_scale(scale: Tensor) -> Tensor:
    """What float16 makes of a scale; a row of zeros gets the smallest, its codes are zero.

    Raises: UserError if it is too large.
    """
    limits = torch.finfo(torch.float16)
    if (scale > limits.max).any():
        raise UserError("a weight is too large for a float16 scale; the model is damaged")
    return scale.clamp_min(limits.smallest_normal).half().float()


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(CODE_MIN, CODE_MAX)


def round_to_nearest(
    weight: Tensor, importance: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Codes [N, K] int8 and scales [N, G] float16 without error feedback; arguments as in gptq."""
    groups = weight.split(group_size or weight.shape[1], 1)
    weights = importance.split(group_size or weight.shape[1])
    scales = [search_scale(group, part) for group, part in zip(groups, weights, strict=True)]
    codes = [_round(group, scale[:, None]) for group, scale in zip(groups, scales, strict=True)]
    return torch.cat(codes, 1).to(torch.int8), torch.stack(scales, 1).half()


def round_head(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output head: 8-bit codes [N, K] int8 and scales [N, 1] float16. weight: [N, K]."""
    codes, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    parts = (part.split(ROWS_AT_ONCE) for part in (weight, codes, scales))
    for rows, row_codes, row_scales in zip(*parts, strict=True):
        row_scales.copy_(stored_scale(rows.abs().amax(1, keepdim=True).float() / HEAD_CODE_MAX))
        row_codes.copy_((rows / row_scales).round().clamp(-HEAD_CODE_MAX, HEAD_CODE_MAX))
    return codes, scales.half()


def gptq(weight: Tensor, hessian: Tensor, group_size: int | None) -> tuple[Tensor, Tensor]:
    """Round column after column, spreading each error over the columns still to come.

    weight: [N, K] float32; hessian: [K, K] float32, sum of x x^T over the inputs; group_size: of
    the scales, None for one per row.
    Returns: codes [N, K] int8, scales [N, 1] or [N, K / group_size] float16.
    """
    inverse = _inverse_factor(hessian)
    importance = hessian.diagonal()
    channels = (
        weight.T.contiguous()
    )  # [K, N]: input channels are rows, so that a step is contiguous
    num_channels = len(channels)
    codes = torch.empty(channels.shape, dtype=torch.int8)
    scales: list[Tensor] = []
    scale = torch.empty(0)
    for start in range(0, num_channels, BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, num_channels)
        errors = torch.empty(end - start, channels.shape[1])
        for channel in range(start, end):
            if channel % (group_size or num_channels) == 0:
                group = slice(channel, channel + (group_size or num_channels))
                scale = search_scale(channels[group].T, importance[group])
                scales.append(scale)
            value = channels[channel]
            code = _round(value, scale)
            codes[channel] = code.to(torch.int8)
            error = (value - code * scale) / inverse[channel, channel]
            channels[channel + 1 : end].addr_(inverse[channel, channel + 1 : end], error, alpha=-1)
            errors[channel - start] = error
        channels[end:].addmm_(inverse[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous(), torch.stack(scales, 1).half()


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse Hessian, float32.

    Damping is raised tenfold until the factorisation succeeds, which it must once the diagonal
    dominates.
    """
    matrix = hessian.double()
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damping = DAMPING
    while True:
        damped = matrix + torch.eye(len(matrix), dtype=matrix.dtype) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float()
        damping *= 10
        logger.warning("a Hessian did not factor; damping it by %g of its mean diagonal", damping)


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """Squared output error of the quantized weight, as a fraction of the output's energy."""
    quantized = (
        codes.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]
    ).flatten(1)
    residual = quantized - weight
    energy = ((weight @ hessian) * weight).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((residual @ hessian) * residual).sum() / energy)
