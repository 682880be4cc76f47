"""Loops on torch's own threads: vLLM binds them to processors, and no second pool competes.

GOMP_parallel starts them, as compilers have it do for `#pragma omp parallel`, in whichever OpenMP
runtime torch has loaded. Nothing in them needs Python or waits for its lock.
"""

import ctypes
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_offq.errors import UserError
from vllm_offq.kernels.numba.llvm import I8, I32, call, integer

VOID, POINTER = ir.VoidType(), I8.as_pointer()


def _find_openmp() -> None:
    try:
        start = ctypes.CDLL(None).GOMP_parallel
    except AttributeError:
        raise UserError("OffQ's numba kernels need a build of torch with OpenMP") from None
    binding.add_symbol("GOMP_parallel", ctypes.cast(start, ctypes.c_void_p).value)


_find_openmp()


def parallel(loop: Any) -> Any:
    """An intrinsic of (arguments, count, parts, threads): calls the jitted loop(*arguments, first,
    last) for ranges that make up range(count), so many parts, each on the next free thread."""

    @intrinsic
    def run(typing: Any, arguments: Any, count: Any, parts: Any, threads: Any) -> Any:
        def emit(context: Any, b: Any, signature: Any, values: Any) -> Any:
            *given, threads = values
            state = [*given, integer(0), integer(0)]  # parts begun so far, whether one has failed
            shared = cgutils.alloca_once_value(b, cgutils.pack_struct(b, state))
            body = _body(context, b.module, loop, signature.args[0], shared.type)
            data = b.bitcast(shared, POINTER)
            call(b, "GOMP_parallel", VOID, body, data, b.trunc(threads, I32), ir.Constant(I32, 0))
            failed = b.load(cgutils.gep_inbounds(b, shared, 0, 4))
            with cgutils.if_unlikely(b, b.icmp_unsigned("!=", failed, integer(0))):
                message = ("OffQ's numba kernels found no memory for intermediate results",)
                context.call_conv.return_user_exc(b, MemoryError, message)
            return context.get_dummy_value()

        return types.none(arguments, count, parts, threads), emit

    return run


def _body(context: Any, module: Any, loop: Any, arguments: Any, shared: Any) -> Any:
    """What each thread runs: a function of a pointer of type `shared`."""
    kinds = (*arguments, types.int64, types.int64)
    loop.compile(kinds)
    compiled = loop.overloads[kinds]
    context.add_linking_libs([compiled.library])

    name = f"{compiled.fndesc.mangled_name}.on_each_thread"
    body = ir.Function(module, ir.FunctionType(VOID, [POINTER]), name)
    body.linkage = "internal"
    b = ir.IRBuilder(body.append_basic_block())
    begin, work, end = (body.append_basic_block() for _ in range(3))
    state = b.bitcast(body.args[0], shared)
    places = [cgutils.gep_inbounds(b, state, 0, i) for i in range(5)]
    given, count, parts = (b.load(place) for place in places[:3])
    b.branch(begin)

    b.position_at_end(begin)
    part = b.atomic_rmw("add", places[3], integer(1), "monotonic")
    b.cbranch(b.icmp_signed("<", part, parts), work, end)

    b.position_at_end(work)
    bounds = [b.sdiv(b.mul(count, i), parts) for i in (part, b.add(part, integer(1)))]
    values = [*cgutils.unpack_tuple(b, given), *bounds]
    status, _ = context.call_internal_no_propagate(b, compiled.fndesc, compiled.signature, values)
    with b.if_then(status.is_error):
        b.store(integer(1), places[4])
    b.branch(begin)

    b.position_at_end(end)
    b.ret_void()
    return body
