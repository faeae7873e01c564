"""Let a benchmark's process keep the memory that it frees, as one that has run for a while does.

glibc hands large blocks back to the system until it has learned not to, and what it has learned
depends on the history of the process: page faults would decide a comparison of two of them.
"""

from __future__ import annotations

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Set the thresholds of malloc to a gigabyte; nothing outside of Linux."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        for threshold in (TRIM_THRESHOLD, MMAP_THRESHOLD):
            libc.mallopt(threshold, 1 << 30)
