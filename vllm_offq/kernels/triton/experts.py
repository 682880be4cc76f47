"""A mixture of experts: all experts in one product, of tokens in the order of their experts."""

import torch
from torch import Tensor

from vllm_offq.kernels.interface import ExpertLinear
from vllm_offq.kernels.triton.expert_gemm import expert_gemm
from vllm_offq.kernels.triton.expert_rows import add_slots, sort_parameters
from vllm_offq.kernels.triton.gemm_config import GemmConfig, expert_gemm_config
from vllm_offq.kernels.triton.quantize_tile import Quantized
from vllm_offq.kernels.triton.rotate_quantize import rotate_quantize
from vllm_offq.kernels.triton.silu_and_mul_quantize import silu_and_mul_quantize
from vllm_offq.kernels.triton.sort_slots import SortedSlots, sort_slots
from vllm_offq.kernels.triton.target import gpu


def experts(
    x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: ExpertLinear, down: ExpertLinear
) -> Tensor:
    """See reference.experts. Nothing waits for the GPU."""
    if not x.numel():
        return x.new_empty(x.shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    num_experts, top_k = len(gate_up.weight.codes), topk_ids.shape[1]
    configs = [
        expert_gemm_config(
            gpu().tensor_core, topk_ids.numel(), num_experts, layer.group_size, layer.bits
        )
        for layer in (gate_up, down)
    ]
    assert configs[0].block_m == configs[1].block_m  # both products cut the slots alike
    slots = sort_slots(topk_ids, num_experts, configs[0].block_m)
    quantized = rotate_quantize(x, *_grid(gate_up, configs[0]))
    quantized = sort_parameters(quantized, slots, top_k)
    x_gate_up = _multiply(quantized, slots, gate_up, top_k, x.dtype, configs[0])
    quantized = silu_and_mul_quantize(x_gate_up, *_grid(down, configs[1]))
    parts = _multiply(quantized, slots, down, 0, x.dtype, configs[1])
    return add_slots(parts, topk_ids, topk_weights)


def _grid(layer: ExpertLinear, config: GemmConfig) -> tuple[int, int, float, bool, int, bool]:
    """What is to be known of a linear to quantize its input."""
    return *layer[2:], config.wide


def _multiply(
    quantized: Quantized,
    slots: SortedSlots,
    layer: ExpertLinear,
    top_k: int,
    dtype: torch.dtype,
    config: GemmConfig,
) -> Tensor:
    return expert_gemm(quantized, slots, layer.weight, layer.group_size, top_k, dtype, config)
