"""A mixture of experts on a CPU: its linears one expert after the other, those that have tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from vllm_offq.kernels.interface import ExpertLinear
from vllm_offq.kernels.reference import silu_and_mul


def experts_by(
    linear: Callable[..., Tensor],
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: ExpertLinear,
    down: ExpertLinear,
) -> Tensor:
    """See reference.experts. linear: of a backend."""
    tokens, top_k = topk_ids.shape
    num_experts = gate_up.weight.codes.shape[0]
    slots = topk_ids.flatten()
    order = slots.argsort(stable=True)
    counts = torch.bincount(slots.clamp_min(-1) + 1, minlength=num_experts + 1).tolist()
    elsewhere, *counts = counts
    order = order[elsewhere:]
    token = order // top_k
    used = [(expert, count) for expert, count in enumerate(counts) if count]
    y = torch.zeros(tokens, down.out_features)
    if used:
        activated = silu_and_mul(_apply(linear, x[token], gate_up, used))
        parts = _apply(linear, activated, down, used).float()
        y.index_add_(0, token, parts * topk_weights.flatten()[order, None].float())
    return y.to(x.dtype)


def _apply(
    linear: Callable[..., Tensor], x: Tensor, layer: ExpertLinear, used: list[tuple[int, int]]
) -> Tensor:
    """x: rows in the order of their experts; used: expert and its number of rows."""
    rows = x.split([count for _, count in used])
    parts = [linear(part, *layer.of(e)) for part, (e, _) in zip(rows, used, strict=True)]
    return torch.cat(parts)
