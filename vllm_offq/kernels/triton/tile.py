"""One tile of a product of codes, which linear layers and experts share.

The order of the channels does not matter to a dot product, so nibbles are never put in order: one
product of the even channels and one of the odd. Unpacked nibbles are 16 times their code, which
costs no shift; the factors leave with the weights' scale.
"""

import triton
import triton.language as tl


@triton.jit
def multiply_tile(
    codes_ptr,
    scale_ptr,
    offset_ptr,
    weight_ptr,
    weight_scale_ptr,
    weight_sums_ptr,
    token,
    token_row,
    output,
    output_row,
    is_output,
    token_stride,
    out_features,
    half_channels,
    num_groups,
    split,
    steps_per_split,
    GROUP_SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    SCALE_PER_GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PTX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
    START: tl.constexpr,
):
    """Products of one split of the channels, plus its offset terms. float32.

    A tile is [tokens, outputs]; where activations are WIDE it is the transposed product, because
    the first operand is the one that tensor cores take from registers, where nibbles are unpacked.
    token [BLOCK_M], output [BLOCK_N]: places of parameters; token_row, output_row: int64, rows of
    codes. The weights' scale remains to be applied, unless it is one of groups.
    """
    HALF_K: tl.constexpr = BLOCK_K // 2
    HALF_GROUP: tl.constexpr = GROUP_SIZE // 2
    STEPS: tl.constexpr = (GROUP_SIZE + BLOCK_K - 1) // BLOCK_K  # of a group
    WHOLE: tl.constexpr = GROUP_SIZE % BLOCK_K == 0
    # Codes are multiplied as bytes: a step's sum fits the digits that START leaves of a float.
    # Steps are added in float32, so that no number of channels overflows.
    tl.static_assert(BLOCK_K * 128 * 128 < 1 << 22)
    pair = tl.arange(0, HALF_K)
    weight_ptrs = weight_ptr + output_row[:, None] * half_channels + pair[None, :]
    if WIDE:
        codes_ptrs = codes_ptr + token_row[:, None] * (2 * half_channels) + pair[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        codes_ptrs = codes_ptr + token_row[:, None] * half_channels + pair[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    first = split * steps_per_split
    last = tl.minimum(first + steps_per_split, num_groups * STEPS)
    for step in range(first, last):
        group = step // STEPS
        at = group * HALF_GROUP + step % STEPS * HALF_K
        inside = pair[None, :] < HALF_GROUP - step % STEPS * HALF_K
        dot = tl.full(total.shape, START, tl.int32)
        weight_even, weight_odd = unpack(load_pairs(weight_ptrs + at, inside, WHOLE), PTX)
        if WIDE:
            even_ptrs = codes_ptrs + group * HALF_GROUP + at
            even = load_pairs(even_ptrs, inside, WHOLE)
            odd = load_pairs(even_ptrs + HALF_GROUP, inside, WHOLE)
            dot = tl.dot(weight_even, tl.trans(even), dot, out_dtype=tl.int32)
            dot = tl.dot(weight_odd, tl.trans(odd), dot, out_dtype=tl.int32)
        else:
            even, odd = unpack(load_pairs(codes_ptrs + at, inside, WHOLE), PTX)
            dot = tl.dot(even, tl.trans(weight_even), dot, out_dtype=tl.int32)
            dot = tl.dot(odd, tl.trans(weight_odd), dot, out_dtype=tl.int32)
        scale = along_tokens(tl.load(scale_ptr + group * token_stride + token), WIDE)
        if SCALE_PER_GROUP:
            weight_scale = tl.load(
                weight_scale_ptr + group * out_features + output, mask=is_output, other=0.0
            )
            scale *= along_outputs(weight_scale.to(tl.float32), WIDE)
        if START == 0:
            product = dot.to(tl.float32)
        else:
            product = dot.to(tl.float32, bitcast=True) - 12582912.0
        total = tl.fma(product, scale, total)
    total *= 1.0 / 16 if WIDE else 1.0 / 256

    groups_per_split = tl.cdiv(num_groups, SPLIT_K)
    last_group = tl.minimum((split + 1) * groups_per_split, num_groups)
    for first_group in range(split * groups_per_split, last_group, BLOCK_G):
        group = first_group + tl.arange(0, BLOCK_G)
        mask = group < last_group
        offset = tl.load(
            offset_ptr + group[:, None] * token_stride + token[None, :],
            mask=mask[:, None],
            other=0.0,
        )
        parameter = group[:, None] * out_features + output[None, :]
        parameter_mask = mask[:, None] & is_output[None, :]
        sums = tl.load(weight_sums_ptr + parameter, mask=parameter_mask, other=0).to(tl.float32)
        # TF32 holds an offset in two parts, and so a sum that has a scale or may exceed 2048.
        high, low = split_for_tf32(offset)
        if SCALE_PER_GROUP:
            weight_scale = tl.load(weight_scale_ptr + parameter, mask=parameter_mask, other=0.0)
            sums *= weight_scale.to(tl.float32)
        if SCALE_PER_GROUP or GROUP_SIZE > 256:
            sums, rest = split_for_tf32(sums)
            total = add_product(low, rest, total, WIDE, PRECISION)
            total = add_product(high, rest, total, WIDE, PRECISION)
        total = add_product(low, sums, total, WIDE, PRECISION)
        total = add_product(high, sums, total, WIDE, PRECISION)
    return total


@triton.jit
def along_tokens(x, WIDE: tl.constexpr):
    """[BLOCK_M] as it is broadcast over a tile."""
    return x[None, :] if WIDE else x[:, None]


@triton.jit
def along_outputs(x, WIDE: tl.constexpr):
    """[BLOCK_N] as it is broadcast over a tile."""
    return x[:, None] if WIDE else x[None, :]


@triton.jit
def load_pairs(ptrs, inside, WHOLE: tl.constexpr):
    """Bytes of a step; codes of 0 beyond the end of the group."""
    if WHOLE:
        pairs = tl.load(ptrs)
    else:
        pairs = tl.load(ptrs, mask=inside, other=0)
    return pairs


@triton.jit
def add_product(offset, sums, total, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """total + offset^T sums, of [BLOCK_G, BLOCK_M] and [BLOCK_G, BLOCK_N]; or its transpose."""
    if WIDE:
        total = tl.dot(tl.trans(sums), offset, total, input_precision=PRECISION)
    else:
        total = tl.dot(tl.trans(offset), sums, total, input_precision=PRECISION)
    return total


@triton.jit
def split_for_tf32(x):
    """x as the sum of two numbers of 11 binary digits, up to 2^-21 of it.

    The first is cut off, so that NaN remains what it is; the second is rounded.
    """
    high = (x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    low = ((x - high).to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return high, low.to(tl.float32, bitcast=True)


@triton.jit
def unpack(packed, PTX: tl.constexpr):
    """Nibbles to int8: 16 * code of the even channels, and of the odd."""
    if PTX:
        # Four bytes at a time, which compilers do not.
        even, odd = tl.inline_asm_elementwise(
            """{
            shl.b32 $0, $2, 4;
            and.b32 $0, $0, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        even = (packed << 4).to(tl.int8, bitcast=True)
        odd = (packed & 0xF0).to(tl.int8, bitcast=True)
    return even, odd
