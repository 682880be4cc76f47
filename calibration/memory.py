"""The process's memory: whether there is enough, and how it is given back."""

import ctypes
from typing import Any

import psutil

from vllm_offq.errors import UserError

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


def refuse_small_memory(needed: int, what: str, advice: str) -> None:
    """Raises: UserError if less than this many bytes are free, for `what`."""
    free = psutil.virtual_memory().available
    if free < needed:
        raise UserError(
            f"{what} takes at least {needed / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB "
            f"are free; {advice}"
        )


def _call(name: str, *arguments: Any) -> None:
    """Of glibc; other libraries are left as they are."""
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*arguments)
