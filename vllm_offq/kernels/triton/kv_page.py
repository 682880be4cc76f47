"""The page of one block and one KV head: how this backend arranges what reference.kv_store keeps.

Three arrays, each of which attention reads in whole lines: bytes of key codes [block_size, D / 2]
(channel j in the low nibble, j + D / 2 in the high one, each code + 8); bytes of value codes alike;
words [2, G, block_size], of key groups, then value groups: float16 scale low, offset high.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_offq.errors import UserError
from vllm_offq.kernels.reference import kv_page_bytes

MAX_GROUPS = 2
"""Of a head: each half of it, low nibbles or high ones, is then of one group."""


def num_groups_of(kv_cache: Tensor, head_size: int, group_size: int) -> int:
    """Groups of a head. kv_cache: [blocks, H_kv, block_size, C] uint8, blocks and heads strided.

    Raises: UserError if a head has more groups than these kernels know.
    """
    num_groups, rest = divmod(head_size, group_size)
    if rest or num_groups > MAX_GROUPS:
        raise UserError(
            f"heads of {head_size} channels in groups of {group_size} are not supported by the "
            "Triton kernels; quantize the model again, with a whole head or half of one as group"
        )
    content_bytes = kv_page_bytes(head_size, group_size)
    assert kv_cache.dtype == torch.uint8
    assert kv_cache.shape[3] == content_bytes
    assert kv_cache.stride()[2:] == (content_bytes, 1)
    return num_groups


def channels_contiguous(x: Tensor) -> Tensor:
    """x [T, H, D], copied if the channels of a head are not neighbours in memory."""
    return x if x.stride(2) == 1 else x.contiguous()


@triton.jit
def pack_parameters(scale, offset):
    """Float16 to words."""
    low = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
    return low | (offset.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)


@triton.jit
def unpack_parameters(word):
    """Scale and offset, in float32."""
    scale = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    offset = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), offset.to(tl.float32)


NIBBLES_PTX = """{{
    .reg .b32 first, last;
    prmt.b32 first, $4, 0, 0x4140;
    prmt.b32 last, $4, 0, 0x4342;
    lop3.b32 $0, first, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $1, last, 0x000F000F, {magic}, 0xEA;
    shr.u32 first, first, 4;
    shr.u32 last, last, 4;
    lop3.b32 $2, first, 0x000F000F, {magic}, 0xEA;
    lop3.b32 $3, last, 0x000F000F, {magic}, 0xEA;
}}"""
"""Four bytes to their low and to their high nibbles, two in a register, each or-ed with magic."""

BFLOAT16_NIBBLES_PTX = tl.constexpr(NIBBLES_PTX.format(magic="0x43004300"))
FLOAT16_NIBBLES_PTX = tl.constexpr(NIBBLES_PTX.format(magic="0x64006400"))


@triton.jit
def unpack_codes(packed, dtype: tl.constexpr, PTX: tl.constexpr, IN_PLACE: tl.constexpr):
    """The codes in the low and in the high nibbles of bytes, exact in dtype.

    A nibble in the last bits of 128.0 (bfloat16), 1024.0 (float16) or 2^23 (float32) adds itself
    to that number: no conversion is needed, which would be slow.
    """
    if dtype == tl.float32:
        low = (packed & 15).to(tl.uint32) | 0x4B000000
        high = (packed >> 4).to(tl.uint32) | 0x4B000000
    elif PTX:
        # Not pure, it says, though it is: else the compiler moves it behind the exchange of the
        # tile between threads, where each warp unpacks for itself what all of them need. On
        # Blackwell it does not pipeline a loop then.
        low, high = tl.inline_asm_elementwise(
            BFLOAT16_NIBBLES_PTX if dtype == tl.bfloat16 else FLOAT16_NIBBLES_PTX,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.uint16, tl.uint16),
            is_pure=not IN_PLACE,
            pack=4,
        )
    else:
        magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
        low = (packed & 15).to(tl.uint16) | magic
        high = (packed >> 4).to(tl.uint16) | magic
    least: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
    bias: tl.constexpr = 8.0 + (8388608.0 if dtype == tl.float32 else least)
    return low.to(dtype, bitcast=True) - bias, high.to(dtype, bitcast=True) - bias
