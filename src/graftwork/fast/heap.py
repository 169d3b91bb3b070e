"""Memory that a step has freed, kept for the next one."""

from __future__ import annotations

import ctypes
import os
import sys

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h
ALL, LARGEST = 2**31 - 1, 32 << 20  # bytes: the most that each of them takes
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep() -> bool:
    """Let glibc keep what is freed, for the whole process; whether it does so now.

    By itself it gives the end of the heap back to the system when much of it is free, and the next
    step pays for each page again, or it does not, as the heap happens to lie. Where the environment
    says how it is to be (``MALLOC_TRIM_THRESHOLD_``), and with other libraries, nothing is done.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(TRIM, ALL) and mallopt(MMAP, LARGEST))
