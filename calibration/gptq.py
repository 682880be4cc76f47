"""Weights to codes: GPTQ (arXiv 2210.17323), which minimises output errors, or the nearest ones.

A linear computes ``y = X W^T`` with W [N, K]; ``H = X^T X`` over the calibration tokens. The error
of a rounded W' is ``tr((W' - W) H (W' - W)^T)``.
"""

import logging

import torch
from torch import Tensor

from calibration.correction import Correction
from calibration.scales import fit_scales, search_scales, stored_scale
from vllm_offq.errors import UserError
from vllm_offq.quantizer import CODE_MAX, CODE_MIN

logger = logging.getLogger(__name__)

BLOCK_SIZE = 128
ROWS_AT_ONCE = 4096
"""Of a weight: copies of a whole head would be the largest tensors of a run."""
DAMPING = 0.01
"""Added to the Hessian's diagonal, as a fraction of its mean."""
MOST_DAMPING = 100.0
"""Likewise; the diagonal dominates long before."""


def round_to_nearest(
    weight: Tensor, importance: Tensor, group_size: int | None
) -> tuple[Tensor, Tensor]:
    """Codes and scales as gptq returns them, without error feedback.

    weight: [N, K] float32; importance: [K], the Hessian's diagonal.
    """
    scales = search_scales(weight, importance, group_size or weight.shape[1])
    groups = weight.unflatten(1, (scales.shape[1], -1))
    return _round(groups, scales[..., None]).flatten(1).to(torch.int8), scales.half()


def round_rows(weight: Tensor, code_max: int) -> tuple[Tensor, Tensor]:
    """8-bit codes [N, K] int8, at most code_max, and scales [N, 1] float16. weight: [N, K]."""
    codes, scales = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), 1)
    parts = (part.split(ROWS_AT_ONCE) for part in (weight, codes, scales))
    for rows, row_codes, row_scales in zip(*parts, strict=True):
        row_scales.copy_(stored_scale(rows.abs().amax(1, keepdim=True).float() / code_max))
        row_codes.copy_((rows / row_scales).round().clamp(-code_max, code_max))
    return codes, scales.half()


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int | None,
    *,
    order: Tensor | None = None,
    correction: Correction | None = None,
    refits: int = 0,
    what: str = "a weight",
) -> tuple[Tensor, Tensor]:
    """Codes and scales of least output error, approximately.

    weight: [N, K] float32; hessian: [K, K] float32, of the inputs that the linear will see;
    group_size: of the scales, None for one per row; order: [K], in which channels are rounded,
    None: as they are; correction: for inputs that are not the original's; refits: rounds of
    fit_scales and descend after rounding; what: the weight's name, for warnings.
    Returns: codes [N, K] int8, scales [N, 1] or [N, K / group_size] float16.
    """
    metric, inverse_factor = factor(hessian, order, what)
    if correction is not None:
        weight = correction.apply(weight, inverse_factor, order)
    inverse_factor = inverse_factor.float()
    parts = []
    for rows in weight.split(ROWS_AT_ONCE):
        codes, scales = _round_in_order(
            rows, metric.diagonal(), inverse_factor, group_size or weight.shape[1], order
        )
        for _ in range(refits):
            scales = fit_scales(rows, codes, scales, metric)
            codes = descend(rows, codes, scales, metric)
        parts.append((codes.to(torch.int8), scales.half()))
    codes, scales = map(torch.cat, zip(*parts, strict=True))
    return codes, scales


def factor(
    hessian: Tensor, order: Tensor | None = None, what: str = "a weight"
) -> tuple[Tensor, Tensor]:
    """The damped Hessian H, float32, and the upper triangular R with ``R^T R = H^-1``, float64.

    order: [K], that of R's rows and columns; None: H's.
    Damping is raised tenfold until the factorisation succeeds, which it must once the diagonal
    dominates. These matrices are the largest of a run, so each is dropped as soon as it can be.
    Raises: UserError if it never does, as with NaN.
    """
    mean = hessian.diagonal().double().mean().clamp_min(torch.finfo(torch.float32).tiny)
    damping = DAMPING
    ordered = hessian if order is None else hessian[order][:, order]
    while True:
        # H = U U^T with U upper triangular is the Cholesky factor of H read backwards.
        backwards = ordered.flip(0, 1).double()
        backwards.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        del backwards
        if not failed:
            break
        damping *= 10
        if damping > MOST_DAMPING:
            raise UserError("its input has no usable second moments; check the model's weights")
        logger.warning("%s: damping the Hessian by %g of its mean, to factor it", what, damping)
    del ordered
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse_factor = torch.linalg.solve_triangular(upper, identity, upper=True)
    del upper, identity
    damped = hessian.clone()
    damped.diagonal().copy_(hessian.diagonal().double() + damping * mean)
    return damped, inverse_factor


def _round_in_order(
    weight: Tensor,
    importance: Tensor,
    inverse_factor: Tensor,
    group_size: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Channel after channel, spreading each error over those still to come.

    A group's scale is searched for when its turn comes, for what the errors before it have made of
    its weights; in another order groups have no turn, and scales are those of the weight as it was.

    Returns: codes [N, K] and scales [N, K / group_size], float32.
    """
    num_channels = weight.shape[1]
    scales: list[Tensor] = []
    groups = torch.arange(num_channels) // group_size
    # [K, N], so that a step is contiguous
    channels = weight.T.clone(memory_format=torch.contiguous_format)
    if order is not None:
        scales = list(search_scales(weight, importance, group_size).T)
        channels, groups = channels[order], groups[order.cpu()]
    codes = torch.empty_like(channels)
    group_of = groups.tolist()
    for start in range(0, num_channels, BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, num_channels)
        errors = torch.empty_like(channels[start:end])
        for channel in range(start, end):
            if group_of[channel] == len(scales):
                group = slice(channel, channel + group_size)
                scales.append(search_scales(channels[group].T, importance[group], group_size)[:, 0])
            scale = scales[group_of[channel]]
            value = channels[channel]
            code = _round(value, scale)
            codes[channel] = code
            error = (value - code * scale) / inverse_factor[channel, channel]
            rest = inverse_factor[channel, channel + 1 : end]
            channels[channel + 1 : end].addr_(rest, error, alpha=-1)
            errors[channel - start] = error
        channels[end:].addmm_(inverse_factor[start:end, end:].T, errors, alpha=-1)
    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return codes.T.contiguous(), torch.stack(scales, 1)


def descend(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """One pass of coordinate descent: each code becomes the best given all others.

    With the residual ``E = W' - W`` the best value of channel k is ``w'_k - (E H)_k / H_kk``; the
    error never grows.

    weight, codes: [N, K] float32; scales: [N, G]; hessian: [K, K] float32, damped.
    Returns: [N, K] float32.
    """
    size = weight.shape[1] // scales.shape[1]
    codes = codes.T.contiguous()  # [K, N], so that a step is contiguous
    steps = scales.T.contiguous()
    gradient = hessian @ (codes * steps.repeat_interleave(size, 0) - weight.T)
    num_channels = len(codes)
    for start in range(0, num_channels, BLOCK_SIZE):
        end = min(start + BLOCK_SIZE, num_channels)
        local, changes = gradient[start:end].clone(), torch.empty_like(gradient[start:end])
        for channel in range(start, end):
            scale, old = steps[channel // size], codes[channel]
            best = old - local[channel - start] / (hessian[channel, channel] * scale)
            best = best.round_().clamp_(CODE_MIN, CODE_MAX)
            change = (best - old).mul_(scale)
            codes[channel] = best
            local.addr_(hessian[start:end, channel], change)
            changes[channel - start] = change
        gradient.addmm_(hessian[:, start:end], changes)
    return codes.T.contiguous()


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round_().clamp_(CODE_MIN, CODE_MAX)


def output_error(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    """Squared output error of the quantized weight, as a fraction of the output's energy."""
    quantized = (
        codes.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[..., None]
    ).flatten(1)
    residual = quantized - weight
    energy = ((weight @ hessian) * weight).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return float(((residual @ hessian) * residual).sum() / energy)
