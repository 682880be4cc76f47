"""Compiling with numba: when it is imported, for known types, and once for a machine."""

import logging
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
from numba import njit, types
from numba.core.caching import FunctionCache

from vllm_offq.kernels.numba.threads import parallel

logger = logging.getLogger(__name__)

# Parameters of kernels: numbers, and contiguous arrays of so many dimensions.
Bool = Annotated[bool, types.boolean]
Int = Annotated[int, types.int64]
Float = Annotated[float, types.float32]
Array = np.ndarray
UInt8s1 = Annotated[Array, types.uint8[::1]]
UInt8s4 = Annotated[Array, types.uint8[:, :, :, ::1]]
UInt16s2 = Annotated[Array, types.uint16[:, ::1]]
Int8s3 = Annotated[Array, types.int8[:, :, ::1]]
Int16s3 = Annotated[Array, types.int16[:, :, ::1]]
Int32s1 = Annotated[Array, types.int32[::1]]
Int32s2 = Annotated[Array, types.int32[:, ::1]]
Int64s1 = Annotated[Array, types.int64[::1]]
Int64s2 = Annotated[Array, types.int64[:, ::1]]
Floats2 = Annotated[Array, types.float32[:, ::1]]
Floats3 = Annotated[Array, types.float32[:, :, ::1]]

helper = njit(error_model="numpy")
"""For functions that kernels call. Not fast math: codes must be those of quantizer.py."""


def kernel(loop: Callable) -> Callable:
    """Compiles ``loop(*arguments, first, last)`` now, for the types that it is annotated with.

    Returns: a function of the arguments and a count. It calls the loop for ranges that make up
    range(count), on as many threads as torch uses, and without the GIL.

    The machine code is kept in __pycache__ or, where that cannot be written, in the user's cache
    directory; NUMBA_CACHE_DIR overrides both.
    """
    *hints, _first, _last, _return = get_type_hints(loop, include_extras=True).values()
    run_in_parallel = parallel(njit(error_model="numpy")(loop))

    def run(arguments: tuple, count: int, parts: int, threads: int) -> None:
        run_in_parallel(arguments, count, parts, threads)

    run.__qualname__ = loop.__qualname__  # by which numba names the file
    compiled = njit(nogil=True)(run)
    try:
        compiled._cache = _Cache(run)
    except RuntimeError:  # numba found no directory
        _warn()
    arguments = types.BaseTuple.from_types([hint.__metadata__[0] for hint in hints])
    compiled.compile(types.void(arguments, types.int64, types.int64, types.int64))
    compiled.disable_compile()

    def call(*arguments: Any, count: int, parts_per_thread: int = 1) -> None:
        threads = torch.get_num_threads()
        parts = min(count, threads * parts_per_thread)
        if parts:
            compiled(arguments, count, parts, min(parts, threads))

    return call


class _Cache(FunctionCache):
    """numba's, but for the key, which changes with any file that is compiled into a kernel."""

    def _index_key(self, signature: Any, codegen: Any) -> tuple:
        return signature, codegen.magic_tuple(), _sources()

    def load_overload(self, *arguments: Any) -> Any:
        found = super().load_overload(*arguments)
        if found is None:
            _announce()
        return found


@cache
def _sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


@cache
def _announce() -> None:
    logger.info("Compiling OffQ's numba kernels for this processor, once: about 15 seconds")


@cache
def _warn() -> None:
    logger.warning("OffQ's numba kernels are compiled at every start: set NUMBA_CACHE_DIR")
