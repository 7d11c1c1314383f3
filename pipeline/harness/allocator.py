"""How this process gets its memory."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library
KEPT, AT_ONCE = 2**31 - 1, 1 << 30  # bytes
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Keep what is freed for what is asked for next, where the C library can; returns whether it does.

    By itself the GNU C library gives each large block back to the kernel, which clears it, page by page, for the next layer of
    a network. Kept are blocks of up to AT_ONCE bytes, and KEPT bytes at the end of the heap. Whoever has set the allocator in
    the environment (SETTINGS), or runs another one, keeps that.
    """
    if sys.platform != "linux" or any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, AT_ONCE)) and bool(mallopt(M_TRIM_THRESHOLD, KEPT))
