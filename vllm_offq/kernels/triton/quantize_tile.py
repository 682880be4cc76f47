"""One tile of groups to codes, which all that quantizes activations shares.

Online Hadamard, group scale and offset, rounding, packing.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.kernels.triton.gemm_config import MAX_BLOCK_M
from vllm_offq.kernels.triton.grid import asymmetric_range, has_nan, quantize
from vllm_offq.quantizer import range_to_scale
from vllm_offq.rotation import hadamard

MAX_HADAMARD = 128
"""The largest block whose matrix fits beside a tile; torch applies larger ones, and those that are
not the group."""


class Quantized(NamedTuple):
    """Activations as gemm reads them. Parameters are group by group: a tile reads neighbours."""

    codes: Tensor
    """[T, K / 2] uint8, nibbles in two's complement, the even channel low; or wide: int8
    [T, G, 2, K / G / 2], of each group the even channels first."""
    scale: Tensor
    """[G, T or more] float32, so many that any tile can be read whole."""
    offset: Tensor
    """Likewise."""

    @classmethod
    def empty(
        cls, tokens: int, channels: int, group_size: int, wide: bool, device: torch.device
    ) -> "Quantized":
        num_groups = channels // group_size
        shape = (tokens, num_groups, 2, group_size // 2) if wide else (tokens, channels // 2)
        codes = torch.empty(shape, dtype=torch.int8 if wide else torch.uint8, device=device)
        token_stride = triton.cdiv(tokens, MAX_BLOCK_M) * MAX_BLOCK_M
        parameters = torch.empty(2, num_groups, token_stride, dtype=torch.float32, device=device)
        return cls(codes, *parameters.unbind())


@triton.jit
def quantize_tile(
    x,
    is_row,
    parameter,
    group_number,
    matrix_ptr,
    codes_ptr,
    scale_ptr,
    offset_ptr,
    range_to_scale,
    rotation_norm,
    GROUP_SIZE: tl.constexpr,
    HADAMARD: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BITS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Rotate, quantize and store. x: [ROWS, 2 HALF], a group in each row, then zeros.

    is_row [ROWS]: which rows there are; parameter [ROWS]: where their scales and offsets go;
    group_number [ROWS] int64: of all groups, token by token.
    """
    pair = tl.arange(0, HALF)
    is_pair = pair < GROUP_SIZE // 2
    if HADAMARD:
        channel = tl.arange(0, 2 * HALF)
        column_ptrs = matrix_ptr + channel[:, None] * (GROUP_SIZE // 2) + pair[None, :]
        column_mask = (channel < GROUP_SIZE)[:, None] & is_pair[None, :]
        even_columns = tl.load(column_ptrs, mask=column_mask, other=0.0)
        column_ptrs += GROUP_SIZE * (GROUP_SIZE // 2)
        odd_columns = tl.load(column_ptrs, mask=column_mask, other=0.0)
        even = multiply_signs(x, even_columns) * rotation_norm
        odd = multiply_signs(x, odd_columns) * rotation_norm
    else:
        even, odd = tl.split(x.to(tl.float32).reshape(ROWS, HALF, 2))

    if SYMMETRIC:
        scale = tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1) * range_to_scale
        offset = tl.zeros_like(scale)
    else:
        scale, offset = asymmetric_range(even, odd, is_pair[None, :], range_to_scale)
    scale = tl.where(has_nan(even, odd), float("nan"), scale)
    tl.store(scale_ptr + parameter, scale, mask=is_row)
    tl.store(offset_ptr + parameter, offset, mask=is_row)

    even = quantize(even, scale, offset, BITS)
    odd = quantize(odd, scale, offset, BITS)
    mask = is_row[:, None] & is_pair[None, :]
    if WIDE:
        out_ptrs = codes_ptr + group_number[:, None] * GROUP_SIZE + pair[None, :]
        tl.store(out_ptrs, even.to(tl.int8), mask=mask)
        tl.store(out_ptrs + GROUP_SIZE // 2, odd.to(tl.int8), mask=mask)
    else:
        out_ptrs = codes_ptr + group_number[:, None] * (GROUP_SIZE // 2) + pair[None, :]
        packed = (even & 15) | (odd << 4)
        tl.store(out_ptrs, packed.to(tl.uint8), mask=mask)


@triton.jit
def compute_once(x, PTX: tl.constexpr):
    """x, to be computed before the threads exchange it for the product that it is in."""
    if PTX:
        # Not pure, it says, though it is: else the compiler moves all of it behind the exchange,
        # where each warp computes for itself what all of them need.
        x = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;",
            "=r,r",
            [x],
            dtype=x.dtype,
            is_pure=False,
            pack=1 if x.dtype == tl.float32 else 2,
        )
    return x


@triton.jit
def multiply_signs(x, columns):
    """x times columns of entries 1 and -1, exact but for the sums, which are float32's."""
    if x.dtype == tl.float32:
        # Three bfloat16, cut off and not rounded, hold all digits of a float32.
        high = cut_to_bfloat16(x)
        middle = cut_to_bfloat16(x - high.to(tl.float32))
        low = (x - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
        product = tl.dot(low, columns, tl.dot(middle, columns, tl.dot(high, columns)))
    else:
        product = tl.dot(x, columns)
    return product


@triton.jit
def cut_to_bfloat16(x):
    """The largest bfloat16 that is no larger in size."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@cache
def signs(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Hadamard matrix times sqrt(block), entries 1 and -1. [2, block, block / 2]: the even
    columns, then the odd ones."""
    matrix = (hadamard(block) * block**0.5).round().unflatten(1, (-1, 2)).permute(2, 0, 1)
    return matrix.contiguous().to(device, torch.bfloat16 if dtype == torch.float32 else dtype)


def has_tile(group_size: int, rotation_block_size: int) -> bool:
    """Whether quantize_tile applies the Hadamard, if there is one."""
    return not rotation_block_size or rotation_block_size == group_size <= MAX_HADAMARD


def tile_arguments(
    quantized: Quantized,
    dtype: torch.dtype,
    group_size: int,
    rotation_block_size: int,
    clip_ratio: float,
    symmetric: bool,
    bits: int,
    wide: bool,
) -> dict[str, Any]:
    """What kernels pass on to quantize_tile, but for its shape. dtype: of what is quantized."""
    codes, scale, offset = quantized
    is_rotated = rotation_block_size > 0
    return {
        "matrix_ptr": signs(group_size, dtype, codes.device) if is_rotated else codes,
        "codes_ptr": codes,
        "scale_ptr": scale,
        "offset_ptr": offset,
        "token_stride": scale.stride(0),
        "num_groups": len(scale),
        "range_to_scale": range_to_scale(clip_ratio, symmetric, bits),
        "rotation_norm": rotation_block_size**-0.5 if is_rotated else 1.0,
        "GROUP_SIZE": group_size,
        "HADAMARD": is_rotated,
        "SYMMETRIC": symmetric,
        "BITS": bits,
        "WIDE": wide,
    }
