"""Memory that was freed, given back."""

import ctypes


def release_freed() -> None:
    """Return the holes between living tensors to the system, where the C library can (glibc).

    It keeps them otherwise, and weights of other sizes find no room in them: every block that is
    loaded and dropped would leave the process larger by as much.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
