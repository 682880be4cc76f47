"""Slots (a token and one of its experts) in the order of their experts, as tiles of a product.

All of it on the GPU: how many tokens an expert has is not known where kernels are launched.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 2048
"""Slots that a program looks at in one go."""
TILES_OF_PROGRAM = 32


class SortedSlots(NamedTuple):
    """Slot t * k + j: token t, its j-th expert."""

    slot: Tensor
    """[S] int32: the slots of expert 0, of expert 1, ..."""
    start: Tensor
    """[E + 1] int32: where those of an expert start, which is where those of the last one end."""
    tile_expert: Tensor
    """[tiles] int32; as many as there may be, those without slots have expert E."""
    tile_start: Tensor
    """[tiles] int32: where the slots of a tile start."""


@triton.jit(do_not_specialize=["num_slots"])
def sort_slots_kernel(ids_ptr, slot_ptr, start_ptr, num_slots, BLOCK: tl.constexpr):
    """The slots of one expert, in their order: those of smaller experts come first."""
    expert = tl.program_id(0)
    smaller = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
        smaller += ((chosen >= 0) & (chosen < expert)).to(tl.int32)
    position = tl.sum(smaller, 0)
    tl.store(start_ptr + expert, position)
    for first in range(0, num_slots, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        chosen = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
        is_mine = (chosen == expert).to(tl.int32)
        place = position + tl.cumsum(is_mine, 0) - is_mine
        tl.store(slot_ptr + place, slot, mask=is_mine != 0)
        position += tl.sum(is_mine, 0)


@triton.jit(do_not_specialize=["num_experts", "num_tiles"])
def cut_tiles_kernel(
    start_ptr,
    tile_expert_ptr,
    tile_start_ptr,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    EXPERTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """TILES tiles: the expert and where it starts. EXPERTS: no fewer than there are."""
    expert = tl.arange(0, EXPERTS)
    mask = expert < num_experts
    start = tl.load(start_ptr + expert, mask=mask, other=0)
    end = tl.load(start_ptr + expert + 1, mask=mask, other=0)
    of_expert = (end - start + BLOCK_M - 1) // BLOCK_M
    before = tl.cumsum(of_expert, 0) - of_expert
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    within = tile[:, None] - before[None, :]
    is_here = (within >= 0) & (within < of_expert[None, :])
    tile_expert = tl.min(tl.where(is_here, expert[None, :], num_experts), 1)
    tile_start = tl.sum(tl.where(is_here, start[None, :] + within * BLOCK_M, 0), 1)
    tl.store(tile_expert_ptr + tile, tile_expert, mask=tile < num_tiles)
    tl.store(tile_start_ptr + tile, tile_start, mask=tile < num_tiles)


def most_tiles(slots: int, num_experts: int, block_m: int) -> int:
    """How many tiles of block_m slots, all of one expert, there can be."""
    return min(slots, slots // block_m + num_experts)


def sort_slots(topk_ids: Tensor, num_experts: int, block_m: int) -> SortedSlots:
    """topk_ids: [T, k] integers, negative: no slot of this rank; block_m: slots of a tile."""
    slots, device = topk_ids.numel(), topk_ids.device
    num_tiles = most_tiles(slots, num_experts, block_m)
    shapes = slots, num_experts + 1, num_tiles, num_tiles
    result = SortedSlots(*(torch.empty(n, dtype=torch.int32, device=device) for n in shapes))
    block = min(triton.next_power_of_2(slots), MAX_BLOCK)
    sort_slots_kernel[(num_experts + 1,)](
        topk_ids.contiguous(), result.slot, result.start, slots, BLOCK=block, num_warps=4
    )
    cut_tiles_kernel[(triton.cdiv(num_tiles, TILES_OF_PROGRAM),)](
        *result[1:],
        num_experts,
        num_tiles,
        BLOCK_M=block_m,
        EXPERTS=triton.next_power_of_2(num_experts),
        TILES=TILES_OF_PROGRAM,
        num_warps=4,
    )
    return result
