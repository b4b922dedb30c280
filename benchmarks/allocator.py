"""glibc's allocator, which hands large tensors back to the system when they are freed.

Each new one then costs a page fault for every 4 kB. The environment variables in
``SETTINGS`` tell it to keep them; :func:`keep_freed_memory` does the same from within.
"""

import ctypes
import platform

SETTINGS = "MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Apply ``SETTINGS`` to this process for the rest of its life, if it has glibc."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def give_back_memory() -> None:
    """What was freed goes back to the system now."""
    ctypes.CDLL(None).malloc_trim(0)
