"""Mixtures of experts as stored, for tests of any backend."""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from layers import Layer
from torch import Tensor

from vllm_offq.kernels import reference
from vllm_offq.kernels.interface import ExpertLinear, Weight
from vllm_offq.quantizer import range_to_scale
from vllm_offq.rotation import apply_block_hadamard

FLOAT32 = 2.0**-24
ROUTINGS = ["any", "one expert", "without some", "other ranks"]


def route(kind: str, tokens: int, top_k: int, num_experts: int) -> tuple[Tensor, Tensor]:
    """Different experts for each token. Returns: topk_ids [T, k] int32, topk_weights float32."""
    scores = torch.rand(tokens, num_experts)
    if kind == "one expert":
        scores[:, -1] += 2
    if kind == "without some":
        scores[:, : (num_experts - top_k) // 2 + 1] -= 2
    topk_ids = scores.topk(top_k).indices.int()
    if kind == "other ranks":
        topk_ids[torch.rand(tokens, top_k) < 0.5] = -1
    return topk_ids, torch.rand(tokens, top_k).softmax(1)


@dataclass
class Experts:
    """The linears of each expert."""

    gate_up: list[Layer]
    down: list[Layer]

    @classmethod
    def random(
        cls,
        num_experts: int,
        hidden_groups: int,
        groups: int,
        group_size: int = 64,
        rotation_block_size: int = 64,
        scale_per_group: bool = False,
        **rest: Any,
    ) -> "Experts":
        """Of so many groups of hidden and of intermediate channels."""
        hidden, intermediate = hidden_groups * group_size, groups * group_size
        rotation = {"rotation_block_size": rotation_block_size}
        linears = (2 * intermediate, hidden_groups, {}), (hidden, groups, rotation)
        layers = []
        for outputs, num_groups, rotated in linears:
            of_experts = []
            for _ in range(num_experts):
                layer = Layer.random(outputs, num_groups, group_size, **rotated, **rest)
                num_scales = num_groups if scale_per_group else 1
                # Such that outputs are about as large as inputs.
                inputs = num_groups * group_size
                layer.scale = torch.rand(outputs, num_scales).half() / (4 * inputs**0.5)
                of_experts.append(layer)
            layers.append(of_experts)
        return cls(*layers)

    def prepare(self, kernels: ModuleType) -> tuple[ExpertLinear, ExpertLinear]:
        gate_up, down = (
            ExpertLinear(
                Weight(*map(torch.stack, zip(*(e.prepare(kernels) for e in of_experts)))),  # noqa: B905
                len(of_experts[0].codes),
                *of_experts[0].grid,
            )
            for of_experts in (self.gate_up, self.down)
        )
        return gate_up, down

    def run(self, kernels: ModuleType, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        return kernels.experts(x, topk_ids, topk_weights, *self.prepare(kernels))

    def error(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, segment: int | None = None
    ) -> Tensor:
        """By how much two calculations can differ: [T, K]. segment: as in Layer.sum_error.

        Sums of gate and up differ by their sum_error, which may round them differently. What that
        makes of the input of down may move its grid, and a value that lies nearer to the boundary
        of two codes than that to the other one. Gate and up without a Hadamard.
        """
        error = torch.zeros(len(x), len(self.down[0].codes), dtype=torch.float64)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, slot = (topk_ids == expert).nonzero(as_tuple=True)
            if not len(token):
                continue
            rows = x[token]
            h = gate_up.run(reference, rows.float())
            of_h = rounding_error(h, gate_up.sum_error(rows, segment), x.dtype)
            h = h.to(x.dtype).float()
            of_gate, of_up = of_h.chunk(2, 1)
            gate, up = h.double().chunk(2, 1)
            silu = torch.nn.functional.silu(gate).abs()
            activated = reference.silu_and_mul(h)
            of_activated = 1.1 * of_gate * (up.abs() + of_up) + silu * of_up  # slope: at most 1.1
            of_activated += 16 * FLOAT32 * activated.double().abs()
            of_activated = rounding_error(activated, of_activated, x.dtype)
            activated = activated.to(x.dtype).float()
            of_seen = grid_error(down, activated, of_activated)
            of_part = of_seen @ down.weight.abs().T + down.sum_error(activated, segment)
            part = down.run(reference, activated)
            of_part = rounding_error(part, of_part, x.dtype)
            # Of the sum over experts.
            of_part += 2 * (topk_ids.shape[1] + 1) * FLOAT32 * part.double().abs()
            error.index_add_(0, token, of_part * topk_weights[token, slot, None].abs())
        return error


def rounding_error(x: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much x rounded to dtype can move if x moves by error. x: float32; error: float64."""
    rounded, x = x.to(dtype).double(), x.double()
    ends = ((x + sign * (1 + FLOAT32) * error).to(dtype).double() for sign in (1, -1))
    low, high = ((end - rounded).abs() for end in ends)
    return torch.maximum(low, high)


def grid_error(layer: Layer, x: Tensor, error: Tensor) -> Tensor:
    """By how much the grid's view of x can move if x moves by error. x, error: [T, K]."""
    rotated, block = x.double(), layer.rotation_block_size
    if block:
        rotated = apply_block_hadamard(rotated, block)
        blocks = (error + block * FLOAT32 * x.double().abs()).unflatten(1, (-1, block))
        error = blocks.sum(2, keepdim=True).expand_as(blocks).flatten(1) * block**-0.5
    _, scale, offset = reference.rotate_quantize(x, *layer.grid)
    scale, offset = scale.double()[..., None], offset.double()[..., None]
    groups = rotated.unflatten(1, (-1, layer.group_size))
    of_value = error.unflatten(1, (-1, layer.group_size)) + 4 * FLOAT32 * groups.abs()
    largest = of_value.amax(2, keepdim=True)
    of_scale = 2 * largest * range_to_scale(layer.clip_ratio, layer.symmetric, layer.bits)
    of_offset = largest + of_scale / 2
    magnitude = 1 << (layer.bits - 1)
    moves = (of_value + of_offset + magnitude * of_scale) / scale
    to_boundary = (((groups - offset) / scale) % 1 - 0.5).abs()
    codes = torch.where(to_boundary <= moves, moves.ceil(), 0.0)
    return (magnitude * of_scale + of_offset + codes * scale).flatten(1)
