"""Kernels as torch operators: torch.compile sees one opaque call instead of their inside.

A plain Library, because torch.library.custom_op costs more per call than a small layer.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_offq.kernels import backend
from vllm_offq.kernels.reference import ExpertLinear, Weight

_library = torch.library.Library("vllm_offq", "DEF")

_library.define(
    "linear(Tensor x, Tensor weight_codes, Tensor weight_scale, Tensor weight_sums, Tensor? bias, "
    "int out_features, int group_size, int rotation_block_size, float clip_ratio, bool symmetric, "
    "int bits) -> Tensor"
)


def _linear(
    x: Tensor, codes: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None, *settings: Any
) -> Tensor:
    return backend().linear(x, Weight(codes, scale, sums), bias, *settings)


def _linear_fake(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    out_features: int,
    *settings: object,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


_EXPERT_LINEAR = (
    "Tensor[] {0}_weight, int {0}_features, int {0}_group_size, int {0}_rotation_block_size, "
    "float {0}_clip_ratio, bool {0}_symmetric, int {0}_bits"
)
_library.define(
    "experts(Tensor x, Tensor topk_ids, Tensor topk_weights, "
    f"{_EXPERT_LINEAR.format('gate_up')}, {_EXPERT_LINEAR.format('down')}) -> Tensor"
)


def _experts(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *linears: Any) -> Tensor:
    half = len(linears) // 2
    gate_up, down = (
        ExpertLinear(Weight(*weight), *settings)
        for weight, *settings in (linears[:half], linears[half:])
    )
    return backend().experts(x, topk_ids, topk_weights, gate_up, down)


def _experts_fake(x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *linears: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_offq::linear", _linear_fake, lib=_library)

_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_offq::experts", _experts_fake, lib=_library)

linear = torch.ops.vllm_offq.linear.default
experts = torch.ops.vllm_offq.experts.default
