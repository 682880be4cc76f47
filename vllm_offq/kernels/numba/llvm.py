"""Small steps in writing LLVM for numba's intrinsics; b is the builder."""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT16, FLOAT32 = ir.HalfType(), ir.FloatType()


def integer(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def call(b: Any, name: str, result: Any, *arguments: Any) -> Any:
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, signature, name), arguments)


def lanes(b: Any, first: Any, second: Any, which: range) -> Any:
    return b.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(which)), [*which]))


def splat(b: Any, scalar: Any, count: int) -> Any:
    vector = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    one = b.insert_element(vector, scalar, ir.Constant(I32, 0))
    return b.shuffle_vector(one, vector, ir.Constant(ir.VectorType(I32, count), None))


def place(b: Any, pointer: Any, index: Any, of: Any) -> Any:
    return b.bitcast(b.gep(pointer, [index]), of.as_pointer())


def load(b: Any, pointer: Any, index: Any, of: Any) -> Any:
    return b.load(place(b, pointer, index, of), align=1)


def unpack(context: Any, b: Any, signature: Any, values: Any) -> Iterator[Any]:
    """The arguments of an intrinsic; of an array, its pointer and its shape."""
    for kind, value in zip(signature.args, values, strict=True):
        if isinstance(kind, types.Array):
            assert kind.layout == "C"
            array = context.make_array(kind)(context, b, value)
            yield array.data, cgutils.unpack_tuple(b, array.shape)
        else:
            yield value
