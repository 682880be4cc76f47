"""The uniform grid of quantizer.py for tiles: what activations, keys and values have in common.

A group of channels comes as two tiles [M, N], its even and odd channels or its two halves.
"""

import triton
import triton.language as tl


@triton.jit
def asymmetric_range(first, second, mask, range_to_scale):
    """Scale and offset [M], where no NaN is. mask: [1, N], of the channels that there are."""
    infinity = float("inf")
    high = tl.max(tl.where(mask, tl.maximum(first, second), -infinity), 1)
    low = tl.min(tl.where(mask, tl.minimum(first, second), infinity), 1)
    scale = (high - low) * range_to_scale
    return scale, high * 0.5 + low * 0.5 + scale * 0.5


@triton.jit
def has_nan(first, second):
    """[M]; reductions drop NaN, so it is looked for by itself."""
    return tl.max(((first != first) | (second != second)).to(tl.int32), 1) > 0


@triton.jit
def quantize(x, scale, offset, BITS: tl.constexpr):
    """Codes nearest to x [M, N], by float32 scale and offset [M]; int32. NaN: code 0."""
    is_constant = scale == 0.0
    inverse = tl.where(is_constant, 0.0, tl.div_rn(1.0, tl.where(is_constant, 1.0, scale)))
    steps = (x - offset[:, None]) * inverse[:, None]
    steps = tl.where(steps == steps, steps, 0.0)
    least: tl.constexpr = -(1 << (BITS - 1))
    steps = tl.minimum(tl.maximum(steps, least), -1 - least)
    # To the nearest integer, ties to even, by the float whose last bit is one.
    return (steps + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
