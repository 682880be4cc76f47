"""Pages of 4-bit keys and values: where their parts are, and how new tokens get in.

Pages are arranged as in cpu/src/kernels.h.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from vllm_offq.kernels import cpu
from vllm_offq.kernels.cpu import BLOCK, TILE
from vllm_offq.kernels.numba.compiling import Array, Floats3, Int, Int64s1, UInt8s1, helper, kernel
from vllm_offq.kernels.numba.rows import from_half, group_range, quantize, to_half
from vllm_offq.kernels.numba.tile import BLOCK_BYTES
from vllm_offq.kernels.reference import rotate_heads
from vllm_offq.quantizer import range_to_scale

BITS = 4
RANGE_TO_SCALE = np.float32(range_to_scale(1.0, symmetric=False, bits=BITS))


class Pages(NamedTuple):
    """A cache as kernels take it."""

    bytes: np.ndarray
    """All of them, [any] uint8."""
    block_size: int
    group_size: int
    block_stride: int
    head_stride: int

    @classmethod
    def of(cls, kv_cache: Tensor, group_size: int) -> "Pages":
        """kv_cache: [blocks, H_kv, block_size, C] uint8; blocks and heads may lie apart."""
        layout = cpu.page_layout(kv_cache, group_size)
        ends = [
            (n - 1) * stride for n, stride in zip(kv_cache.shape, kv_cache.stride(), strict=True)
        ]
        everything = kv_cache.as_strided((sum(ends) + 1,), (1,)).numpy()
        return cls(
            everything, layout.block_size, group_size, layout.block_stride, layout.head_stride
        )


@helper
def parts(page: Array, block_size: int, head_size: int) -> tuple[Array, Array, Array]:
    """Of one block and head, whose bytes begin with page: key codes, value codes, parameters."""
    size = block_size * head_size // 2
    return page[:size], page[size : 2 * size], page[2 * size :].view(np.uint16)


@helper
def quantize_head(x: Array, group_size: int, codes: Array, parameters: Array, step: int) -> None:
    """x: [D] float32; codes: [D] int8; parameters: scales, then offsets, step apart, as uint16."""
    groups = len(x) // group_size
    for group in range(groups):
        first = group * group_size
        scale, offset = group_range(x, first, group_size, RANGE_TO_SCALE, False)
        half_scale, half_offset = to_half(scale), to_half(offset)
        parameters[group * step], parameters[(groups + group) * step] = half_scale, half_offset
        target = codes[first : first + group_size]
        quantize(x, first, from_half(half_scale), from_half(half_offset), target, BITS)


@kernel
def store(
    key: Floats3,
    value: Floats3,
    slots: Int64s1,
    pages: UInt8s1,
    block_size: Int,
    group_size: Int,
    block_stride: Int,
    head_stride: Int,
    first: Int,
    last: Int,
) -> None:
    """Heads [first, last) of key and value [T, H_kv, D]; two tokens share bytes, two heads none."""
    head_size = key.shape[2]
    page_parameters = 2 * block_size * (head_size // group_size)
    codes = np.empty(head_size, np.int8)
    for head in range(first, last):
        for token in range(len(slots)):
            if slots[token] < 0:
                continue
            t = slots[token] % block_size
            page = pages[slots[token] // block_size * block_stride + head * head_stride :]
            keys, values, parameters = parts(page, block_size, head_size)

            quantize_head(key[token, head], group_size, codes, parameters[t:], block_size)
            at = t // TILE * (head_size * TILE // 2) + t % TILE * 4
            for block in range(0, head_size, BLOCK):
                for i in range(4):
                    low, high = codes[block + i] + 8, codes[block + i + 4] + 8
                    keys[at + i] = low | high << 4
                at += BLOCK_BYTES

            rest = parameters[page_parameters + t :]
            quantize_head(value[token, head], group_size, codes, rest, block_size)
            shift = 0 if t % BLOCK < 4 else 4
            at = t // BLOCK * BLOCK_BYTES + t % 4
            for tile in range(0, head_size, TILE):
                for n in range(TILE):
                    code = (codes[tile + n] + 8) << shift
                    values[at + 4 * n] = values[at + 4 * n] & (0xF0 >> shift) | code
                at += block_size * TILE // 2


def kv_store(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    group_size: int,
    rotation: Tensor | None = None,
) -> None:
    """See reference.kv_store; the bytes within a block and head are arranged as tiles."""
    if rotation is not None:
        key = rotate_heads(key, rotation)
    new = [x.float().contiguous().numpy() for x in (key, value)]
    pages = Pages.of(kv_cache, group_size)
    store(*new, slot_mapping.numpy(), *pages, count=key.shape[1])
