"""Small Triton kernels, and functions that cross compile them."""

from typing import Any

import triton
import triton.language as tl

from benchmarks.cross_compile import Compilation, Target, cross_compile


@triton.jit
def copy_add_kernel(x_ptr, y_ptr, size, addend, block: tl.constexpr):
    """y = x + addend, [size], as many blocks at a time as there are programs."""
    step = block * tl.num_programs(0)
    for start in range(block * tl.program_id(0), size, step):
        i = start + tl.arange(0, block)
        x = tl.load(x_ptr + i, mask=i < size)
        tl.store(y_ptr + i, x + addend, mask=i < size)


@triton.jit
def int8_dot_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    out_features,
    in_features,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
):
    """y [M, out] = x [M, in] w[out, in] transposed + bias [out], if any; no size needs a mask."""
    m = tile_m * tl.program_id(0) + tl.arange(0, tile_m)
    n = tile_n * tl.program_id(1) + tl.arange(0, tile_n)
    k = tl.arange(0, tile_k)
    x_ptrs = x_ptr + m[:, None] * in_features + k
    w_ptrs = w_ptr + n[:, None] * in_features + k
    accumulator = tl.zeros([tile_m, tile_n], tl.int32)
    for start in range(0, in_features, tile_k):
        accumulator = tl.dot(
            tl.load(x_ptrs + start), tl.load(w_ptrs + start).T, accumulator, out_dtype=tl.int32
        )
    y = accumulator.to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n)
    tl.store(y_ptr + m[:, None] * out_features + n, y.to(tl.bfloat16))


@triton.jit
def assembly_kernel(x_ptr, y_ptr, instruction: tl.constexpr, constraints: tl.constexpr):
    """y = instruction(x), [128]."""
    i = tl.arange(0, 128)
    x = tl.load(x_ptr + i)
    y = tl.inline_asm_elementwise(instruction, constraints, [x], tl.int32, is_pure=True, pack=1)
    tl.store(y_ptr + i, y)


COPY_ADD_SIGNATURE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "size": "i32", "addend": "fp32"}


def compile_copy_add(target: Target, **arguments: Any) -> Compilation:
    return cross_compile(copy_add_kernel, COPY_ADD_SIGNATURE, {"block": 512}, target, **arguments)


def compile_int8_dot(target: Target, bias: str | None = None, **options: Any) -> Compilation:
    """bias: what `signature` may say of a pointer."""
    signature = {
        "x_ptr": "*i8",
        "w_ptr": "*i8",
        "y_ptr": "*bf16",
        "out_features": "i32",
        "in_features": "i32",
    }
    constants: dict[str, Any] = {"tile_m": 128, "tile_n": 64, "tile_k": 64}
    if bias:
        signature["bias_ptr"] = bias
    else:
        constants["bias_ptr"] = None
    return cross_compile(
        int8_dot_kernel, signature, constants, target, ("out_features", "in_features"), **options
    )


def compile_assembly(target: Target, instruction: str, constraints: str) -> Compilation:
    signature = {"x_ptr": "*i32", "y_ptr": "*i32"}
    constants = {"instruction": instruction, "constraints": constraints}
    return cross_compile(assembly_kernel, signature, constants, target)
