"""Folding norm gains and rotations into the weights of a Hugging Face model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from calibration.architectures import Architecture
from calibration.architectures.base import Role
from calibration.instrument import OffQLinear, attention_state
from calibration.rotations import Rotations
from calibration.statistics import invertible
from vllm_offq.rotation import apply_block_hadamard

ROWS_AT_ONCE = 4096
"""In float64 an embedding as a whole would be the largest thing in memory."""


class Part(NamedTuple):
    """The rows of a linear that have one role, as views."""

    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def fuse_embedding(embedding: nn.Module, rotations: Rotations) -> None:
    """Rotate or permute what the embedding writes to the residual stream, in place."""
    fuse_rows(embedding.weight, rotations)  # type: ignore[arg-type]


@torch.no_grad()
def fuse_rows(weight: Tensor, rotations: Rotations) -> None:
    """Rotate or permute rows that are added to the residual stream, [..., n], in place."""
    if rotations.residual is not None:
        _rotate_rows(weight, rotations.residual)
    if rotations.residual_order is not None:
        _order_rows(weight, rotations.residual_order)


@torch.no_grad()
def fuse_head(
    head: nn.Linear | None,
    final_norm: nn.Module,
    architecture: Architecture,
    rotations: Rotations,
) -> None:
    """Fold the final norm's gain and the rotation into a head of its own, in place.

    head: None where the embedding is the head, whose norm then keeps its gain.
    """
    if head is not None:
        _fold_gain([head], final_norm, architecture.gain_offset, rotations.final_gains)
        if rotations.residual is not None:
            _rotate_rows(head.weight, rotations.residual)
        if rotations.residual_order is not None:
            _order_rows(head.weight, rotations.residual_order)
    if rotations.residual_order is not None:
        _order(final_norm.weight, rotations.residual_order)  # type: ignore[arg-type]


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
        router = [] if site.router is None else [layer.get_submodule(site.router)]
        if site.norm is not None:
            norm = layer.get_submodule(site.norm)
            kept = None
            if rotations.residual_gains is not None:
                kept = rotations.residual_gains[index, architecture.reading.index(site)]
            _fold_gain([*linears, *router], norm, architecture.gain_offset, kept)
            if rotations.residual_order is not None:
                _order(norm.weight, rotations.residual_order)  # type: ignore[arg-type]
        for module in router:
            if rotations.residual is not None:
                _rotate_rows(module.weight, rotations.residual)  # type: ignore[arg-type]
        for linear in linears:
            if site.reads_residual:
                _fuse_input(linear, rotations)
            else:
                _fuse_output(linear, rotations)
    if rotations.residual_order is not None:
        for path in architecture.output_norms:
            _order(layer.get_submodule(path).weight, rotations.residual_order)  # type: ignore[arg-type]
    if rotations.values is not None:
        _fuse_values(layer, model_config, architecture, rotations.values[index])
    if architecture.num_experts:
        for number, (gate_up, down) in enumerate(architecture.mlps):
            gate, up = (Part(_linear(layer, path).weight, None) for path in gate_up)
            _fuse_down(gate, up, _linear(layer, down), rotations, (index, number))
    else:
        gate, up = (_part(layer, model_config, architecture, role) for role in ("gate", "up"))
        _fuse_down(gate, up, _linear(layer, architecture.down), rotations, (index,))
    if rotations.keys is not None:
        attention_state(layer, architecture).key_rotation = rotations.keys[index]


def _linear(layer: nn.Module, path: str) -> OffQLinear:
    return layer.get_submodule(path)  # type: ignore[return-value]


def _part(layer: nn.Module, model_config: Any, architecture: Architecture, role: Role) -> Part:
    linear = _linear(layer, getattr(architecture, role))
    rows = architecture.rows(role, model_config)
    return Part(linear.weight[rows], None if linear.bias is None else linear.bias[rows])


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.copy_(value)


def _fold_gain(
    linears: Sequence[nn.Module],
    norm: nn.Module,
    gain_offset: float,
    kept: Tensor | None = None,
) -> None:
    """kept: [n], the gains that the norm is left with; None: 1."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    rest = torch.ones_like(weight) if kept is None else kept.to(weight)
    # What the checkpoint stores, so that the linears make up for its rounding.
    stored = (rest - gain_offset).bfloat16().to(weight)
    for linear in linears:
        linear.weight.mul_((weight + gain_offset) / invertible(stored + gain_offset))  # type: ignore[operator]
    _set(weight, stored)


def _fuse_input(linear: OffQLinear, rotations: Rotations) -> None:
    if rotations.residual is not None:
        _rotate_rows(linear.weight, rotations.residual)
    if rotations.residual_order is not None:
        _order_rows(linear.weight, rotations.residual_order)
    if rotations.residual_block_size is not None:
        _rotate_online(linear, rotations.residual_block_size)


def _rotate_rows(weight: Tensor, rotation: Tensor) -> None:
    for rows in weight.split(ROWS_AT_ONCE):
        _set(rows, rows.double() @ rotation)


def _order_rows(weight: Tensor, order: Tensor) -> None:
    for rows in weight.split(ROWS_AT_ONCE):
        _set(rows, rows[:, order])


def _order(parameter: Tensor, order: Tensor) -> None:
    _set(parameter, parameter[order])


def _rotate_online(linear: OffQLinear, block_size: int) -> None:
    """The Hadamard of the input that happens at run time, and its inverse in the weight."""
    _set(linear.weight, apply_block_hadamard(linear.weight.double(), block_size))
    linear.online_hadamard = block_size


def _fuse_output(linear: OffQLinear, rotations: Rotations) -> None:
    if rotations.residual is not None:
        _set(linear.weight, rotations.residual.T @ linear.weight.double())
        if linear.bias is not None:
            _set(linear.bias, linear.bias.double() @ rotations.residual)
    if rotations.residual_order is not None:
        _order(linear.weight, rotations.residual_order)
        if linear.bias is not None:
            _order(linear.bias, rotations.residual_order)


def _fuse_values(
    layer: nn.Module, model_config: Any, architecture: Architecture, rotation: Tensor
) -> None:
    """v's output by each KV head's rotation, o's input by that of each query head's KV head."""
    value = _part(layer, model_config, architecture, "value")
    output, dim = _linear(layer, architecture.output), rotation.shape[-1]
    heads = value.weight.double().unflatten(0, (-1, dim))
    _set(value.weight, (rotation.transpose(1, 2) @ heads).flatten(0, 1))
    if value.bias is not None:
        bias = value.bias.double().view(-1, 1, dim)
        _set(value.bias, (bias @ rotation).flatten())
    columns = output.weight.double().unflatten(1, (-1, dim)).transpose(0, 1)
    per_query_head = rotation.repeat_interleave(columns.shape[0] // rotation.shape[0], 0)
    _set(output.weight, (columns @ per_query_head).transpose(0, 1).flatten(1))


def _fuse_down(
    gate: Part, up: Part, down: OffQLinear, rotations: Rotations, index: tuple[int, ...]
) -> None:
    """Order and signs of the gated activation's channels, and the inverse online Hadamard."""
    if rotations.down_order is not None:
        order = rotations.down_order[index]
        for part in (gate, up):
            _order(part.weight, order)
            if part.bias is not None:
                _order(part.bias, order)
        _order_rows(down.weight, order)
    if rotations.down_signs is not None:
        signs = rotations.down_signs[index]
        _set(up.weight, up.weight.double() * signs[:, None])
        if up.bias is not None:
            _set(up.bias, up.bias.double() * signs)
        _set(down.weight, down.weight.double() * signs)
    if rotations.down_block_size is not None:
        _rotate_online(down, rotations.down_block_size)
