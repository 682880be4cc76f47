"""Triton's interpreter (TRITON_INTERPRET=1) with the arithmetic of a GPU.

Triton's own adds bfloat16 numbers as if they were integers and truncates where a GPU rounds, has
(3.7) no bfloat16 constants, takes TF32 for float32, is slow at int8 products, and knows no inline
PTX. `install()` puts one in its place that does better, with the PTX that the kernels have.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, as uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, as uint16: to nearest, ties to even, as cvt.rn.bf16.f32."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(x.shape)


def cut_to_tf32(x: np.ndarray) -> np.ndarray:
    """The first 11 binary digits, which are all that tensor cores look at."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


class Builder(InterpreterBuilder):
    """What the interpreter calls for each operation of a kernel."""

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        to_bfloat16 = dst_type.scalar == tl.bfloat16
        if is_bfloat16(src) and not to_bfloat16:
            return super().cast_impl(TensorHandle(widen(src.data), tl.float32), dst_type)
        if to_bfloat16 and not is_bfloat16(src):
            return TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return super().cast_impl(src, dst_type)

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(narrow(np.array([value])), tl.bfloat16)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if is_bfloat16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def binary_op(self, lhs: Any, rhs: Any, op: Callable) -> Any:
        bitwise = op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if bitwise or not (is_bfloat16(lhs) and is_bfloat16(rhs)):
            return super().binary_op(lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        return TensorHandle(result if result.dtype == bool else narrow(result), tl.bfloat16)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        x, y = (widen(h.data) if is_bfloat16(h) else h.data for h in (a, b))
        if input_precision == INPUT_PRECISION.TF32 and x.dtype == np.float32:
            x, y = cut_to_tf32(x), cut_to_tf32(y)
        if x.dtype == np.int8:  # by BLAS, in floats that hold the sums
            exact = np.float32 if x.shape[-1] * 128 * 128 < 2**24 else np.float64
            product = np.matmul(x.astype(exact), y.astype(exact)).astype(np.int32)
        else:
            product = np.matmul(x.astype(np.float32), y.astype(np.float32))
        return TensorHandle((product + d.data).astype(d.data.dtype), d.dtype.scalar)

    def create_inline_asm(
        self,
        asm: str,
        constraints: str,
        values: Sequence[Any],
        types: Sequence[Any],
        is_pure: bool,
        pack: int,
    ) -> "Results":
        """`pack` elements of each argument at a time, as 32-bit registers."""

        def words(handle: Any) -> np.ndarray:
            return np.ascontiguousarray(handle.data).reshape(-1, pack).view(np.uint32)

        inputs = [column.copy() for value in values for column in words(value).T]
        elements = [getattr(kind, "scalar", kind) for kind in types]
        counts = [pack * kind.primitive_bitwidth // 32 for kind in elements]
        outputs = run_ptx(asm, inputs, sum(counts))
        results = []
        for kind, count in zip(elements, counts, strict=True):
            taken, outputs = np.stack(outputs[:count], 1), outputs[count:]
            numbers = taken.view(interpreter._get_np_dtype(kind)).reshape(values[0].data.shape)
            results.append(TensorHandle(numbers, kind))
        return Results(results)


class Results(list):
    """As Triton expects what inline assembly returns."""

    get_result = list.__getitem__


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Any bitwise function of three, by its truth table."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(table.flat[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four of the eight bytes of a and b, as the selector's hexadecimal digits name them."""
    digits = [int(selector.flat[0]) >> 4 * i & 7 for i in range(4)]
    chosen = ((b if digit & 4 else a) >> np.uint32(8 * (digit & 3)) & 255 for digit in digits)
    return np.bitwise_or.reduce([byte << np.uint32(8 * i) for i, byte in enumerate(chosen)])


PTX: dict[str, Callable] = {
    "mov.b32": np.copy,
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
}


def run_ptx(asm: str, inputs: list[np.ndarray], num_outputs: int) -> list[np.ndarray]:
    """inputs: each register of each thread, [threads] uint32. Returns: likewise."""
    registers = {f"${num_outputs + i}": values for i, values in enumerate(inputs)}
    code = re.sub(r"//.*", "", asm).replace("{", "").replace("}", "")
    for statement in filter(None, map(str.strip, code.split(";"))):
        if statement.startswith(".reg"):
            continue
        name, arguments = statement.split(None, 1)
        target, *sources = (argument.strip() for argument in arguments.split(","))
        operands = [
            registers[source] if source in registers else np.full_like(inputs[0], int(source, 0))
            for source in sources
        ]
        registers[target] = PTX[name](*operands).astype(np.uint32)
    return [registers[f"${i}"] for i in range(num_outputs)]


_patched: set[int] = set()


def call(self: InterpretedFunction, *arguments: Any, **named: Any) -> Any:
    """Of one device function by another. Triton's own prepares the whole language anew each time,
    which takes a millisecond; what it does to a module's globals stays."""
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*arguments, **named)


def install() -> None:
    """For all kernels that this process launches from now on."""
    interpreter.interpreter_builder = Builder()
    interpreter.interpreter_semantic = TritonSemantic(interpreter.interpreter_builder)
    InterpretedFunction.__call__ = call
