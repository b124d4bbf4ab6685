"""Memory allocation of CPU processes."""

import ctypes
import os
import platform
import sys

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD, _MADV_HUGEPAGE = -8, -4, -1, 14
"""Constants of mallopt(3) and madvise(2)."""
_LARGE_PAGE = 2**21


def keep_memory() -> bool:
    """Let glibc keep freed memory, in large pages. Call it before the first computation; returns False if unsupported.

    XLA allocates memory again in every step. By default glibc returns it to the system in between, and the
    system clears it page by page, which took up to 40 % of a training step. The kept memory counts as the process's
    until it ends, so only the commands call this. Linux with glibc only.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    options = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))  # one heap for everything, never trimmed
    if not all(library.mallopt(*option) for option in options):
        return False
    # Reserve addresses with large pages for half of the memory; unused pages take no memory.
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    block = library.malloc(size)
    if not block:
        return False
    first = -(-block // _LARGE_PAGE) * _LARGE_PAGE
    library.madvise(first, (block + size - first) // _LARGE_PAGE * _LARGE_PAGE, _MADV_HUGEPAGE)
    library.free(block)
    return True
