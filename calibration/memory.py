"""Memory that is given back as soon as it is free."""

import ctypes
from typing import Any

M_MMAP_THRESHOLD = -3
"""Of mallopt, in malloc.h."""
LARGE_BYTES = 4 * 2**20


def map_large_tensors() -> None:
    """Let each large tensor have pages of its own, for the rest of the process.

    The C library (glibc) raises the size from which it does so up to 32 MiB, as it sees large
    tensors go, and keeps smaller ones in a heap; blocks of weights that come and go leave holes
    there, in which others find no room, and the process grows with every one of them.
    """
    _call("mallopt", M_MMAP_THRESHOLD, LARGE_BYTES)


def give_back() -> None:
    """Return the pages between what is left of smaller tensors to the system. Milliseconds."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: Any) -> None:
    """Of glibc; other libraries are left as they are."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
