"""Memory of a process that computes on a CPU."""

import ctypes
import os
import platform
import sys

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD, _MADV_HUGEPAGE = -8, -4, -1, 14
"""mallopt(3) and madvise(2)."""
_LARGE_PAGE = 2**21


def keep_memory() -> bool:
    """Let the C library keep the memory that is given back, in large pages; before anything is computed. False if not.

    XLA takes the memory of a step anew in every step, and in between the C library returns it to the system, which
    clears it page by page: a third of a training step's time. What is kept counts as this process's until it ends. For
    processes that do little else: all commands do it. On Linux with glibc alone.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # One heap for all threads, for large arrays too, and never cut off at its end.
    if not all(
        library.mallopt(what, value) for what, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    ):
        return False
    # The heap as long as it may become, and what is not used of it is no memory yet, only addresses with large pages.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = library.malloc(size)
    if not block:
        return False
    first = -(-block // _LARGE_PAGE) * _LARGE_PAGE
    library.madvise(first, (block + size - first) // _LARGE_PAGE * _LARGE_PAGE, _MADV_HUGEPAGE)
    library.free(block)
    return True
