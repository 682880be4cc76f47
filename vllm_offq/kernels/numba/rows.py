"""Operations on a row of floats, in float32 as quantizer.py and rotation.py have them."""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from vllm_offq.kernels.numba.compiling import Array, helper
from vllm_offq.kernels.numba.llvm import FLOAT16, FLOAT32, I16, call

ZERO, HALF, ONE, BYTE = (np.float32(value) for value in (0, 0.5, 1, 256))
INFINITY = np.float32(np.inf)

ROUNDER = np.float32(1.5 * 2**23)
"""Added to a float32 below 2^22, it leaves the nearest integer in the low bits."""
LEAST_EXPONENT = np.float32(-126)
# Of 2^x - 1 for x within half a step of 0, from x on.
C1, C2, C3 = np.array([0.6931472028550421, 0.2402264791363012, 5.550332471162809e-2], np.float32)
C4, C5, C6 = np.array([9.61843735767464e-3, 1.339887440266574e-3, 1.5353361883195e-4], np.float32)


@intrinsic
def from_half(typing: Any, bits: Any) -> Any:
    """The float32 of a float16 given as uint16."""

    def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
        return b.fpext(b.bitcast(values[0], FLOAT16), FLOAT32)

    return types.float32(types.uint16), emit


@intrinsic
def to_half(typing: Any, x: Any) -> Any:
    """The float16 nearest to a float32, as uint16."""

    def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
        return b.bitcast(b.fptrunc(values[0], FLOAT16), I16)

    return types.uint16(types.float32), emit


def _extreme(name: str) -> Any:
    @intrinsic
    def extreme(typing: Any, x: Any, y: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
            return call(b, name, FLOAT32, *values)

        return types.float32(types.float32, types.float32), emit

    return extreme


# NaN if either is. LLVM vectorizes loops of these, but not of comparisons.
minimum, maximum = _extreme("llvm.minimum.f32"), _extreme("llvm.maximum.f32")


@helper
def group_range(
    x: Array, first: int, size: int, range_to_scale: np.float32, symmetric: bool
) -> tuple[np.float32, np.float32]:
    """quantizer.group_range of the group x[first : first + size]; x: [n] float32."""
    low = high = x[first]
    for i in range(first, first + size):
        low, high = minimum(low, x[i]), maximum(high, x[i])
    if symmetric:
        return maximum(high, -low) * range_to_scale, ZERO
    scale = (high - low) * range_to_scale
    return scale, high * HALF + low * HALF + scale * HALF


@helper
def quantize(
    x: Array, first: int, scale: np.float32, offset: np.float32, codes: Array, bits: int
) -> np.int32:
    """quantizer.quantize of x[first : first + len(codes)] into codes (int8). Returns their sum."""
    least = -np.float32(1 << (bits - 1))
    largest = -ONE - least
    inverse = ZERO if scale == ZERO else ONE / scale
    total = np.int32(0)
    for i in range(len(codes)):
        level = np.rint((x[first + i] - offset) * inverse)
        level = level if level == level else ZERO
        level = level if level > least else least
        code = np.int32(level if level < largest else largest)
        codes[i] = np.int8(code)
        total = np.int32(total + code)
    return total


@helper
def block_hadamard(x: Array, core: Array, block: int, norm: np.float32) -> None:
    """rotation.apply_block_hadamard in place. x: [n] float32; core: [m, m] float32, 1 and -1."""
    order = len(core)
    if order > 1:
        sums = np.empty(order, np.float32)
        for start in range(0, len(x), order):
            for j in range(order):
                sums[j] = x[start] * core[0, j]
            for i in range(1, order):
                for j in range(order):
                    sums[j] += x[start + i] * core[i, j]
            for j in range(order):
                x[start + j] = sums[j]
    stride = order
    while stride < block:
        for start in range(0, len(x), 2 * stride):
            for i in range(start, start + stride):
                first, second = x[i], x[i + stride]
                x[i], x[i + stride] = first + second, first - second
        stride *= 2
    for i in range(len(x)):
        x[i] *= norm


@helper
def highest(x: Array) -> np.float32:
    top = -INFINITY
    for i in range(len(x)):
        top = maximum(top, x[i])
    return top


@helper
def largest(x: Array) -> np.float32:
    """Of the absolute values."""
    most = ZERO
    for i in range(len(x)):
        most = maximum(most, abs(x[i]))
    return most


@njit(error_model="numpy", fastmath={"reassoc"})
def sum_of(x: Array) -> np.float32:
    """In an order that suits the processor."""
    total = ZERO
    for i in range(len(x)):
        total += x[i]
    return total


@helper
def exp2(x: np.float32) -> np.float32:
    """2^x to one unit in the last place or so, for x up to 0; NaN stays NaN."""
    x = LEAST_EXPONENT if x < LEAST_EXPONENT else x
    whole = np.float32(x + ROUNDER)
    f = x - (whole - ROUNDER)
    p = C6 * f + C5
    p = p * f + C4
    p = p * f + C3
    p = p * f + C2
    p = p * f + C1
    p = p * f + ONE
    exponent = whole.view(np.int32) << 23  # ROUNDER's own bits are shifted out
    return np.int32(np.float32(p).view(np.int32) + exponent).view(np.float32)


@helper
def split_bytes(x: Array, size: np.float32, bytes_: Array, start: Array, rest: Array) -> np.float32:
    """x, none larger than size, as integers of B bytes, the highest first. Returns: their step.

    bytes_: [B, any] int8; start: [B] int32, -8 times the sum of each row, because codes are stored
    + 8; rest: [any] int32, scratch.
    """
    last = len(bytes_) - 1
    most = np.float32(127 << 8 * last)
    inverse = ZERO if size == ZERO else most / size
    for i in range(len(x)):
        level = np.rint(x[i] * inverse)
        rest[i] = np.int32(level if level == level else ZERO)
    for b in range(last, -1, -1):
        row, total = bytes_[b], np.int32(0)
        for i in range(len(x)):
            higher = np.int32(rest[i] + 128) >> 8 if b else 0
            row[i] = np.int8(rest[i] - (higher << 8))
            total = np.int32(total + row[i])
            rest[i] = higher
        start[b] = -8 * total
    return size / most


@helper
def join_bytes(sums: Array, start: Array, out: Array) -> None:
    """Products of integers from those of their bytes. sums: [B, any] int32; start: [B] int32."""
    out[:] = ZERO
    for b in range(len(sums)):
        row = sums[b]
        for i in range(len(out)):
            out[i] = out[i] * BYTE + np.float32(np.int32(row[i] + start[b]))
