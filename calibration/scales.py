"""Scales of 4-bit weights: searched for before rounding, fitted to the codes after it."""

import torch
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.quantizer import CODE_MAX, CODE_MIN

CLIP_RATIOS = tuple(1.0 - 0.025 * step for step in range(25))
"""Shrink factors of the absolute maximum that the search tries."""
ELEMENTS_AT_ONCE, ELEMENTS_IN_CACHE = 2**26, 2**17
"""Of a weight. The search goes over them often: on a CPU they should stay in the cache, on a GPU a
small kernel takes as long as its launch."""
NORMAL_ELEMENTS = 2**24
"""Of normal equations at once: a row has as many as its groups squared."""
SMALLEST = 2.0**-24
"""Positive number of float16."""
RIDGE = 1e-6
"""Of the mean of a row's normal equations: for groups whose codes are all zero."""


def stored_scale(scale: Tensor) -> Tensor:
    """What float16 makes of a scale; a row of zeros gets the smallest, its codes are zero.

    Raises: UserError if it is too large.
    """
    if not (scale <= torch.finfo(torch.float16).max).all():  # NaN is not either
        raise UserError("a weight is too large for a float16 scale; the model is damaged")
    return scale.clamp_min(SMALLEST).half().float()


def search_scales(weight: Tensor, importance: Tensor, group_size: int) -> Tensor:
    """Of each row and group the symmetric scale of least error, weighted by importance.

    weight: [N, K] float32; importance: [K], the Hessian's diagonal; group_size divides K.
    Returns: [N, K / group_size] float32, positive values that float16 holds exactly.
    """
    elements = ELEMENTS_IN_CACHE if weight.device.type == "cpu" else ELEMENTS_AT_ONCE
    rows_at_once = max(1, elements // weight.shape[1])
    parts = importance.view(-1, group_size)
    scales = weight.new_empty(len(weight), len(parts))
    for rows, best_scale in zip(
        weight.split(rows_at_once), scales.split(rows_at_once), strict=True
    ):
        groups = rows.unflatten(1, (-1, group_size))
        largest = groups.abs().amax(2) / CODE_MAX
        best_error = torch.full_like(largest, torch.inf)
        error = torch.empty_like(groups)
        best_scale.copy_(stored_scale(largest))
        for ratio in CLIP_RATIOS:
            scale = stored_scale(largest * ratio)
            torch.div(groups, scale[..., None], out=error)
            error.round_().clamp_(CODE_MIN, CODE_MAX).mul_(scale[..., None]).sub_(groups).square_()
            total = torch.einsum("ngk,gk->ng", error, parts)
            better = total < best_error
            best_scale.copy_(torch.where(better, scale, best_scale))
            best_error = torch.where(better, total, best_error)
    return scales


def fit_scales(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The least-squares scales for given codes: per row G normal equations in H's metric.

    ``sum_h (q_g^T H_gh q_h) s_h = q_g^T H_g w`` where q_g are the codes of group g. A row keeps
    its old scales where rounding to float16, or a scale that is not positive, would make it worse.

    weight, codes: [N, K] float32; scales: [N, G]; hessian: [K, K] float32. Returns: [N, G] float32.
    """
    count = max(1, NORMAL_ELEMENTS // scales.shape[1] ** 2)
    parts = zip(weight.split(count), codes.split(count), scales.split(count), strict=True)
    return torch.cat([_fit_rows(*rows, hessian) for rows in parts])


def _fit_rows(weight: Tensor, codes: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    num_groups = scales.shape[1]
    size = weight.shape[1] // num_groups
    target = (weight @ hessian).mul_(codes).unflatten(1, (num_groups, size)).sum(2).double()
    normal = target.new_empty(len(weight), num_groups, num_groups)
    for group in range(num_groups):
        part = slice(group * size, (group + 1) * size)
        product = (codes[:, part] @ hessian[part]).mul_(codes)
        normal[:, group] = product.unflatten(1, (num_groups, size)).sum(2)
    ridge = RIDGE * normal.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-30)[:, None]
    eye = torch.eye(num_groups).to(normal)
    # The ridge pulls to the old scales, which decide for a group whose codes are all zero.
    solved = torch.linalg.solve(
        normal + ridge[..., None] * eye, target + ridge * scales.double()
    ).float()
    possible = (solved > 0).all(1) & (solved < torch.finfo(torch.float16).max).all(1)
    fitted = stored_scale(torch.where(possible[:, None], solved, scales))

    def error(scale: Tensor) -> Tensor:
        s = scale.double()
        return ((normal @ s[..., None])[..., 0] * s - 2 * target * s).sum(1)

    return torch.where((error(fitted) < error(scales))[:, None], fitted, scales)
