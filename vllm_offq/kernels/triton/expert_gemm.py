"""The product of gemm.py for each slot, a token and one of its experts, by that expert's weight.

From the rows of tokens to those of slots sorted by expert (gate and up), from these to those of
slots by token (down).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.interface import Weight
from vllm_offq.kernels.triton.gemm import gemm_constants
from vllm_offq.kernels.triton.gemm_config import GemmConfig
from vllm_offq.kernels.triton.quantize_tile import Quantized
from vllm_offq.kernels.triton.sort_slots import SortedSlots
from vllm_offq.kernels.triton.target import Gpu, gpu
from vllm_offq.kernels.triton.tile import along_outputs, along_tokens, multiply_tile


@triton.jit(do_not_specialize=["num_slots", "num_tiles", "num_experts", "num_groups"])
def expert_gemm_kernel(
    codes_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    y_ptr,
    slot_ptr,
    start_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_slots,
    num_tiles,
    num_experts,
    place_stride,
    out_features,
    half_channels,
    num_groups,
    TOP_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_PER_GROUP: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SWIZZLE: tl.constexpr,
    START: tl.constexpr,
):
    """One tile of y: slots of one expert. TOP_K: of a token, whose row they read; 0: their own."""
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(
        tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, num_tiles, tiles_n, SWIZZLE
    )
    expert = tl.load(tile_expert_ptr + tile_m)
    if expert == num_experts:
        return
    start = tl.load(tile_start_ptr + tile_m)
    # Rows of other experts are computed, too, and not stored: no masks in the loop, but tiles must
    # not reach beyond the parameters.
    place = tl.minimum(start, place_stride - BLOCK_M) + tl.arange(0, BLOCK_M)
    is_slot = (place >= start) & (place < tl.load(start_ptr + expert + 1))
    slot = tl.load(slot_ptr + place, mask=is_slot, other=0)
    if TOP_K:
        row, y_row = slot // TOP_K, place
    else:
        row, y_row = place % num_slots, slot
    output = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < out_features

    expert = expert.to(tl.int64)
    weight_scale_ptr += expert * out_features * (num_groups if SCALE_PER_GROUP else 1)
    total = multiply_tile(
        codes_ptr,
        scale_ptr,
        offset_ptr,
        weight_ptr + expert * out_features * half_channels,
        weight_scale_ptr,
        weight_sums_ptr + expert * out_features * num_groups,
        place,
        row.to(tl.int64),
        output,
        (output % out_features).to(tl.int64),
        is_output,
        place_stride,
        out_features,
        half_channels,
        num_groups,
        0,
        num_groups * ((GROUP_SIZE + BLOCK_K - 1) // BLOCK_K),
        GROUP_SIZE,
        WIDE,
        SCALE_PER_GROUP,
        1,
        PTX,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        BLOCK_G,
        START,
    )
    if not SCALE_PER_GROUP:
        weight_scale = tl.load(weight_scale_ptr + output, mask=is_output, other=0.0)
        total *= along_outputs(weight_scale.to(tl.float32), WIDE)
    y_row = y_row.to(tl.int64) * out_features
    tl.store(
        y_ptr + along_tokens(y_row, WIDE) + along_outputs(output, WIDE),
        total.to(y_ptr.dtype.element_ty),
        mask=along_tokens(is_slot, WIDE) & along_outputs(is_output, WIDE),
    )


def expert_gemm_constants(
    gpu: Gpu, config: GemmConfig, group_size: int, scale_per_group: bool, top_k: int
) -> dict[str, int | bool | str]:
    """What expert_gemm_kernel is compiled with."""
    constants = gemm_constants(gpu, config, group_size, scale_per_group, has_bias=False)
    del constants["HAS_BIAS"], constants["SPLIT_K"]
    return constants | {"TOP_K": top_k}


def expert_gemm(
    quantized: Quantized,
    slots: SortedSlots,
    weight: Weight,
    group_size: int,
    top_k: int,
    dtype: torch.dtype,
    config: GemmConfig,
) -> Tensor:
    """Rows of activations by the weight of each slot's expert.

    quantized: codes of T tokens, top_k slots of each, with parameters of S sorted slots; or, with
    top_k 0, both of S sorted slots. weight: [E, ...] of what prepare_weight makes; config: without
    split_k. Returns: [S, N], of sorted slots, or of slots by token; what has no expert here is left
    as it is found.
    """
    num_experts, out_features, half_channels = weight.codes.shape
    num_groups, scale_per_group = len(quantized.scale), weight.scale.shape[1] > 1
    num_tiles = len(slots.tile_expert)
    y = torch.empty(len(slots.slot), out_features, dtype=dtype, device=weight.codes.device)
    expert_gemm_kernel[(num_tiles * triton.cdiv(out_features, config.block_n),)](
        *quantized,
        weight.codes,
        weight.scale,
        weight.sums,
        y,
        *slots,
        len(slots.slot),
        num_tiles,
        num_experts,
        quantized.scale.stride(0),
        out_features,
        half_channels,
        num_groups,
        **expert_gemm_constants(gpu(), config, group_size, scale_per_group, top_k),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y
