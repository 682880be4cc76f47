"""What happens to the rows of experts beside products: parameters, and the sum of a token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.gemm_config import MAX_BLOCK_M
from vllm_offq.kernels.triton.quantize_tile import Quantized
from vllm_offq.kernels.triton.sort_slots import SortedSlots

BLOCK = 1024
"""Channels of a program."""


@triton.jit(do_not_specialize=["num_experts"])
def sort_parameters_kernel(
    scale_ptr,
    offset_ptr,
    token_stride,
    slot_ptr,
    start_ptr,
    sorted_scale_ptr,
    sorted_offset_ptr,
    place_stride,
    num_experts,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of one group: those of the tokens of sorted slots."""
    group = tl.program_id(1)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < tl.load(start_ptr + num_experts)
    token = tl.load(slot_ptr + place, mask=mask, other=0) // TOP_K
    here, there = group * token_stride + token, group * place_stride + place
    tl.store(sorted_scale_ptr + there, tl.load(scale_ptr + here), mask=mask)
    tl.store(sorted_offset_ptr + there, tl.load(offset_ptr + here), mask=mask)


@triton.jit
def add_slots_kernel(
    x_ptr, ids_ptr, weights_ptr, y_ptr, channels, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """One token: the sum of its slots, in their order, times their weights."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        slot = token * TOP_K + j
        is_here = tl.load(ids_ptr + slot) >= 0
        weight = tl.where(is_here, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
        present = channel < tl.where(is_here, channels, 0)
        x = tl.load(x_ptr + slot * channels + channel, mask=present, other=0.0)
        total += x.to(tl.float32) * weight
    tl.store(y_ptr + token * channels + channel, total.to(y_ptr.dtype.element_ty), mask=mask)


def sort_parameters(quantized: Quantized, slots: SortedSlots, top_k: int) -> Quantized:
    """Codes of tokens as they are, parameters of sorted slots: as neighbours, a tile reads them
    without a register for each one's place."""
    num_groups, num_slots = len(quantized.scale), len(slots.slot)
    place_stride = triton.cdiv(num_slots, MAX_BLOCK_M) * MAX_BLOCK_M
    shape, device = (2, num_groups, place_stride), quantized.scale.device
    scale, offset = torch.empty(shape, dtype=torch.float32, device=device).unbind()
    sort_parameters_kernel[triton.cdiv(num_slots, BLOCK), num_groups](
        *quantized[1:],
        quantized.scale.stride(0),
        slots.slot,
        slots.start,
        scale,
        offset,
        place_stride,
        len(slots.start) - 1,
        TOP_K=top_k,
        BLOCK=BLOCK,
    )
    return Quantized(quantized.codes, scale, offset)


def add_slots(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """``sum_j topk_weights[t,j] x[t k + j]`` over the slots that have an expert here.

    x: [T k, N]; topk_ids, topk_weights: [T, k]. Returns: [T, N] in x's dtype.
    """
    tokens, top_k = topk_ids.shape
    y = torch.empty(tokens, x.shape[1], dtype=x.dtype, device=x.device)
    add_slots_kernel[tokens, triton.cdiv(x.shape[1], BLOCK)](
        x,
        topk_ids.contiguous(),
        topk_weights.contiguous(),
        y,
        x.shape[1],
        TOP_K=top_k,
        BLOCK=BLOCK,
    )
    return y
