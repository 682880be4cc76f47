"""Kernels as torch operators: torch.compile sees one opaque call instead of their inside.

A plain Library, because torch.library.custom_op costs more per call than a small layer.
"""

from typing import Any

import torch
from torch import Tensor

from vllm_offq.kernels import backend
from vllm_offq.kernels.reference import Weight

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


_library.impl("linear", _linear, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_offq::linear", _linear_fake, lib=_library)

linear = torch.ops.vllm_offq.linear.default
