"""Folding norm gains and rotations into the weights of a Hugging Face model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.architectures.base import head_size
from calibration.instrument import OffQLinear, attention_state
from calibration.rotations import Rotations
from vllm_offq.rotation import apply_block_hadamard

ROWS_AT_ONCE = 4096
"""In float64 an embedding as a whole would be the largest thing in memory."""


@torch.no_grad()
def fuse_embedding(embedding: nn.Module, rotations: Rotations) -> None:
    """Rotate what the embedding writes to the residual stream, in place."""
    if rotations.residual is not None:
        _rotate_rows(embedding.weight, rotations.residual)  # type: ignore[arg-type]


@torch.no_grad()
def fuse_head(head: nn.Linear, final_norm: nn.Module, rotations: Rotations) -> None:
    """Fold the final norm's gain and the rotation into a head of its own, in place."""
    _fold_gain([head], final_norm)
    if rotations.residual is not None:
        _rotate_input(head, rotations.residual)


@torch.no_grad()
def fuse_block(
    layer: nn.Module,
    index: int,
    model_config: Any,
    architecture: Architecture,
    rotations: Rotations,
) -> None:
    """Fold gains and rotations into an instrumented block, in place; what it computes stays.

    index: of the block; model_config: the Hugging Face config. Rotations multiply in float64.
    """
    for site in architecture.sites:
        linears = [_linear(layer, path) for path in site.modules]
        if site.norm is not None:
            _fold_gain(linears, layer.get_submodule(site.norm))
            if rotations.residual is not None:
                for linear in linears:
                    _rotate_input(linear, rotations.residual)
        elif rotations.residual is not None:
            for linear in linears:
                _rotate_output(linear, rotations.residual)
    if rotations.values is not None:
        _fuse_values(layer, architecture, rotations.values[index], head_size(model_config))
    _fuse_down(layer, architecture, rotations, index)
    if rotations.keys is not None:
        attention_state(layer, architecture).key_rotation = rotations.keys[index]


def _linear(layer: nn.Module, path: str) -> OffQLinear:
    return layer.get_submodule(path)  # type: ignore[return-value]


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _fold_gain(linears: Sequence[nn.Linear | OffQLinear], norm: nn.Module) -> None:
    gain: Tensor = norm.weight  # type: ignore[assignment]
    for linear in linears:
        linear.weight.mul_(gain)
    gain.fill_(1.0)


def _rotate_input(linear: nn.Linear | OffQLinear, rotation: Tensor) -> None:
    _rotate_rows(linear.weight, rotation)


def _rotate_rows(weight: Tensor, rotation: Tensor) -> None:
    for rows in weight.split(ROWS_AT_ONCE):
        _set(rows, rows.double() @ rotation)


def _rotate_output(linear: OffQLinear, rotation: Tensor) -> None:
    _set(linear.weight, rotation.T @ linear.weight.double())
    if linear.bias is not None:
        _set(linear.bias, linear.bias.double() @ rotation)


def _fuse_values(layer: nn.Module, architecture: Architecture, rotation: Tensor, dim: int) -> None:
    """v's output by each KV head's rotation, o's input by that of each query head's KV head."""
    value, output = _linear(layer, architecture.value), _linear(layer, architecture.output)
    heads = value.weight.double().unflatten(0, (-1, dim))
    _set(value.weight, (rotation.transpose(1, 2) @ heads).flatten(0, 1))
    if value.bias is not None:
        bias = value.bias.double().view(-1, 1, dim)
        _set(value.bias, (bias @ rotation).flatten())
    columns = output.weight.double().unflatten(1, (-1, dim)).transpose(0, 1)
    per_query_head = rotation.repeat_interleave(columns.shape[0] // rotation.shape[0], 0)
    _set(output.weight, (columns @ per_query_head).transpose(0, 1).flatten(1))


def _fuse_down(
    layer: nn.Module, architecture: Architecture, rotations: Rotations, index: int
) -> None:
    """Order and signs of the gated activation's channels, and the inverse online Hadamard."""
    gate, up, down = (
        _linear(layer, path) for path in (architecture.gate, architecture.up, architecture.down)
    )
    if rotations.down_order is not None:
        order = rotations.down_order[index]
        for linear in (gate, up):
            _set(linear.weight, linear.weight[order])
            if linear.bias is not None:
                _set(linear.bias, linear.bias[order])
        _set(down.weight, down.weight[:, order])
    if rotations.down_signs is not None:
        signs = rotations.down_signs[index]
        _set(up.weight, up.weight.double() * signs[:, None])
        if up.bias is not None:
            _set(up.bias, up.bias.double() * signs)
        _set(down.weight, down.weight.double() * signs)
    if rotations.down_block_size is not None:
        _set(down.weight, apply_block_hadamard(down.weight.double(), rotations.down_block_size))
        down.online_hadamard = rotations.down_block_size
