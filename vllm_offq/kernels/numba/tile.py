"""The inner loop, in vector instructions: rows of signed bytes times the 4-bit codes of a tile.

A tile is laid out as in cpu/src/kernels.h. numba has no vectors, so the intrinsics here write those
of LLVM. They take contiguous arrays, whose shapes say how far to go.
"""

from collections.abc import Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from vllm_offq.errors import UserError
from vllm_offq.kernels.cpu import BLOCK, TILE
from vllm_offq.kernels.numba.llvm import (
    FLOAT16,
    FLOAT32,
    I8,
    I16,
    I32,
    call,
    integer,
    lanes,
    load,
    place,
    splat,
    unpack,
)

BLOCK_BYTES = TILE * BLOCK // 2

INTEGERS, FLOATS = ir.VectorType(I32, TILE), ir.VectorType(FLOAT32, TILE)


class Generic:
    """For any processor."""

    width = 32
    """Bytes of codes at a time."""
    rows = 4
    """Of the largest register tile."""
    accumulator = ir.VectorType(I16, 16)
    """Each lane sums pairs of products..."""
    blocks = 4
    """...of so many blocks: 4 * 4 * 15 * 128 < 2^15."""
    accumulators = 1
    """Which take turns, where adding to one takes long."""

    def pairs(self, b: Any, codes: Any, row: Any) -> Any:
        wide = ir.VectorType(I16, self.width)
        return self._add_pairs(b, b.mul(b.zext(codes, wide), b.sext(row, wide)))

    def multiply_add(self, b: Any, total: Any, codes: Any, word: Any) -> Any:
        """Plus the codes of each channel times the four bytes of a row that word holds."""
        row = b.bitcast(splat(b, word, self.width // 4), codes.type)
        return b.add(total, self.pairs(b, codes, row))

    def widen(self, b: Any, total: Any) -> Any:
        """An int32 for each channel."""
        return self._add_pairs(b, b.sext(total, INTEGERS))

    @staticmethod
    def _add_pairs(b: Any, vector: Any) -> Any:
        even, odd = (range(i, vector.type.count, 2) for i in (0, 1))
        return b.add(lanes(b, vector, vector, even), lanes(b, vector, vector, odd))


class Avx2(Generic):
    def pairs(self, b: Any, codes: Any, row: Any) -> Any:
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", self.accumulator, codes, row)

    def widen(self, b: Any, total: Any) -> Any:
        ones = ir.Constant(self.accumulator, [1] * 16)
        return call(b, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), total, ones)


class Avx512Vnni(Generic):
    """Sums four products into an int32 lane at once."""

    width, rows, accumulator, blocks, accumulators = 64, 8, INTEGERS, 2**31, 2

    def multiply_add(self, b: Any, total: Any, codes: Any, word: Any) -> Any:
        operands = b.bitcast(codes, INTEGERS), splat(b, word, TILE)
        return call(b, "llvm.x86.avx512.vpdpbusd.512", INTEGERS, total, *operands)

    def widen(self, b: Any, total: Any) -> Any:
        return total


TARGET, _, _features = cpu_target.target_context.codegen().magic_tuple()
FEATURES = _features.split(",")
"""Of the processor that numba compiles for: NUMBA_CPU_FEATURES, or this one's."""

if TARGET.startswith("x86_64") and "+f16c" not in FEATURES:
    raise UserError(
        "OffQ's numba kernels need a processor with F16C, which every one with AVX2 has"
    )

ISA = Avx512Vnni() if "+avx512vnni" in FEATURES else Avx2() if "+avx2" in FEATURES else Generic()


def dots(b: Any, rows: Any, stride: Any, count: int, codes: Any, blocks: Any) -> list[Any]:
    """For `count` rows of bytes, stride apart: the sums over all blocks of byte times code + 8."""
    vectors = range(BLOCK_BYTES // ISA.width)
    tile = [(m, v) for m in range(count) for v in vectors]
    vector = ir.VectorType(I8, ISA.width)
    low, four = (ir.Constant(vector, [value] * ISA.width) for value in (15, 4))
    zero = ir.Constant(ir.VectorType(I32, ISA.width // 4), None)
    narrow_zero = ir.Constant(ISA.accumulator, None)
    sums = {mv: cgutils.alloca_once_value(b, zero) for mv in tile}
    most = integer(ISA.blocks)
    with cgutils.for_range_slice(b, integer(0), blocks, most, inc=True) as (start, _):
        totals = {
            (*mv, i): cgutils.alloca_once_value(b, narrow_zero)
            for mv in tile
            for i in range(ISA.accumulators)
        }
        left = b.sub(blocks, start)
        with cgutils.for_range(b, b.select(b.icmp_signed("<", left, most), left, most)) as loop:
            block = b.add(start, loop.index)
            at = b.mul(block, integer(BLOCK_BYTES))
            both = [load(b, codes, b.add(at, integer(v * ISA.width)), vector) for v in vectors]
            nibbles = [(b.and_(x, low), b.lshr(x, four)) for x in both]
            for m in range(count):
                at = b.add(b.mul(stride, integer(m)), b.mul(block, integer(BLOCK)))
                words = [load(b, rows, b.add(at, integer(i)), I32) for i in (0, 4)]
                for v in vectors:
                    for i, word in enumerate(words):
                        total = totals[m, v, i % ISA.accumulators]
                        b.store(ISA.multiply_add(b, b.load(total), nibbles[v][i], word), total)
        for (m, v, _), total in totals.items():
            b.store(b.add(b.load(sums[m, v]), ISA.widen(b, b.load(total))), sums[m, v])
    halves = [[b.load(sums[m, v]) for v in vectors] for m in range(count)]
    return [lanes(b, parts[0], parts[-1], range(TILE)) for parts in halves]


def row_tiles(b: Any, rows: Any) -> Iterator[tuple[Any, int]]:
    """Cuts rows into register tiles. Yields: first row and number of rows; emit what uses them."""
    start, count = integer(0), ISA.rows
    while count:
        end = b.and_(rows, integer(-count))
        with cgutils.for_range_slice(b, start, end, integer(count), inc=True) as (row, _):
            yield row, count
        start, count = end, count // 2


@intrinsic
def multiply(typing: Any, rows: Any, codes: Any, sums: Any, column: Any) -> Any:
    """``sums[r, b, column + n] = sum_k rows[r, b, k] * (code[n, k] + 8)``, n in a tile of channels.

    rows: [R, B, any] int8; codes: [8 K] uint8 of whole blocks, for K bytes of each row; sums:
    [any, B, any] int32.
    """

    def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
        (rows, shape), (codes, (size,)), (sums, (_, _, width)), column = unpack(
            context, b, signature, values
        )
        count, stride = b.mul(shape[0], shape[1]), shape[2]
        blocks = b.sdiv(size, integer(BLOCK_BYTES))
        for row, m in row_tiles(b, count):
            first = b.gep(rows, [b.mul(row, stride)])
            for i, total in enumerate(dots(b, first, stride, m, codes, blocks)):
                at = b.add(b.mul(b.add(row, integer(i)), width), column)
                b.store(total, place(b, sums, at, INTEGERS), align=4)
        return context.get_dummy_value()

    return types.none(rows, codes, sums, column), emit


@intrinsic
def multiply_segments(
    typing: Any,
    rows: Any,
    scale: Any,
    offset: Any,
    start: Any,
    codes: Any,
    sums: Any,
    weight_scale: Any,
    scale_step: Any,
    y: Any,
    column: Any,
) -> Any:
    """A tile of a linear layer, for all tokens::

        dot[s, t, n] = start[s, t] + sum_k rows[s, t, k] * (code[s, n, k] + 8)
        y[t, column + n] = sum_s w[s, n] * (scale[s, t] * dot[s, t, n] + offset[s, t] * sums[s, n])

    rows: [S, T, 8 B] int8; scale, offset: [S, T] float32; start: [S, T] int32; codes: [S, B, 64]
    uint8; sums: [S, 16] int16; w is weight_scale, float16 as uint16, of each segment scale_step
    after the one before; y: [T, any] float32.
    """

    def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
        (
            (rows, (segments, tokens, stride)),
            (scale, _),
            (offset, _),
            (start, _),
            (codes, (_, blocks, _)),
            (sums, _),
            (weight_scale, _),
            scale_step,
            (y, (_, width)),
            column,
        ) = unpack(context, b, signature, values)

        def spread(pointer: Any, index: Any) -> Any:
            return splat(b, b.load(b.gep(pointer, [index])), TILE)

        def multiply_add(x: Any, y: Any, z: Any) -> Any:
            return call(b, "llvm.fmuladd.v16f32", FLOATS, x, y, z)

        for row, m in row_tiles(b, tokens):
            totals = [cgutils.alloca_once_value(b, ir.Constant(FLOATS, None)) for _ in range(m)]
            with cgutils.for_range(b, segments) as loop:
                segment = loop.index
                first = b.add(b.mul(segment, tokens), row)
                at = b.mul(segment, b.mul(blocks, integer(BLOCK_BYTES)))
                x = b.gep(rows, [b.mul(first, stride)])
                products = dots(b, x, stride, m, b.gep(codes, [at]), blocks)
                at = b.mul(segment, scale_step)
                w = b.fpext(load(b, weight_scale, at, ir.VectorType(FLOAT16, TILE)), FLOATS)
                at = b.mul(segment, integer(TILE))
                added = b.sitofp(load(b, sums, at, ir.VectorType(I16, TILE)), FLOATS)
                added = b.fmul(added, w)
                for i, (product, total) in enumerate(zip(products, totals, strict=True)):
                    at = b.add(first, integer(i))
                    dot = b.fmul(b.sitofp(b.add(product, spread(start, at)), FLOATS), w)
                    y_row = multiply_add(spread(offset, at), added, b.load(total))
                    b.store(multiply_add(spread(scale, at), dot, y_row), total)
            for i, total in enumerate(totals):
                at = b.add(b.mul(b.add(row, integer(i)), width), column)
                b.store(b.load(total), place(b, y, at, FLOATS), align=4)
        return context.get_dummy_value()

    arguments = rows, scale, offset, start, codes, sums, weight_scale, scale_step, y, column
    return types.none(*arguments), emit
