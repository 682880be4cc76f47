"""Kernels as torch operators: torch.compile sees one opaque call instead of their inside.

A plain Library, because torch.library.custom_op costs more per call than a small layer.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vllm_offq.kernels import backend
from vllm_offq.kernels.interface import ExpertLinear, Weight

_library = torch.library.Library("vllm_offq", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vllm_offq::{name}", fake, lib=_library)


_LINEAR = (
    "Tensor weight_codes, Tensor weight_scale, Tensor weight_sums, Tensor? bias, int out_features, "
    "int group_size, int rotation_block_size, float clip_ratio, bool symmetric, int bits"
)
"""All that a linear takes beside its input."""


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


def _rms_norm_linear(x: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any) -> Tensor:
    weight, rest = Weight(*linear_inputs[:3]), linear_inputs[3:]
    return backend().rms_norm_linear(x, norm_weight, epsilon, weight, *rest)


def _rms_norm_linear_fake(
    x: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any
) -> Tensor:
    return _linear_fake(x, *linear_inputs)


def _fused_add_rms_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any
) -> tuple[Tensor, Tensor]:
    weight, rest = Weight(*linear_inputs[:3]), linear_inputs[3:]
    return backend().fused_add_rms_norm_linear(x, residual, norm_weight, epsilon, weight, *rest)


def _fused_add_rms_norm_linear_fake(
    x: Tensor, residual: Tensor, norm_weight: Tensor, epsilon: float, *linear_inputs: Any
) -> tuple[Tensor, Tensor]:
    return _linear_fake(x, *linear_inputs), x.new_empty(x.shape)


def _silu_and_mul_linear(x: Tensor, *linear_inputs: Any) -> Tensor:
    return backend().silu_and_mul_linear(x, Weight(*linear_inputs[:3]), *linear_inputs[3:])


_EXPERT_LINEAR = (
    "Tensor[] {0}_weight, int {0}_features, int {0}_group_size, int {0}_rotation_block_size, "
    "float {0}_clip_ratio, bool {0}_symmetric, int {0}_bits"
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


_NORM = "Tensor norm_weight, float epsilon"

_define(f"linear(Tensor x, {_LINEAR}) -> Tensor", _linear, _linear_fake)
_define(
    f"rms_norm_linear(Tensor x, {_NORM}, {_LINEAR}) -> Tensor",
    _rms_norm_linear,
    _rms_norm_linear_fake,
)
_define(
    f"fused_add_rms_norm_linear(Tensor x, Tensor residual, {_NORM}, {_LINEAR}) -> (Tensor, Tensor)",
    _fused_add_rms_norm_linear,
    _fused_add_rms_norm_linear_fake,
)
_define(f"silu_and_mul_linear(Tensor x, {_LINEAR}) -> Tensor", _silu_and_mul_linear, _linear_fake)
_define(
    "experts(Tensor x, Tensor topk_ids, Tensor topk_weights, "
    f"{_EXPERT_LINEAR.format('gate_up')}, {_EXPERT_LINEAR.format('down')}) -> Tensor",
    _experts,
    _experts_fake,
)

linear = torch.ops.vllm_offq.linear.default
rms_norm_linear = torch.ops.vllm_offq.rms_norm_linear.default
fused_add_rms_norm_linear = torch.ops.vllm_offq.fused_add_rms_norm_linear.default
silu_and_mul_linear = torch.ops.vllm_offq.silu_and_mul_linear.default
experts = torch.ops.vllm_offq.experts.default
