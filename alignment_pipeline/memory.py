"""How the process asks the operating system for memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Let malloc keep what is freed, so that the next tensor of that size finds its pages in place.

    By default glibc maps large blocks anew each time, and a training step on a CPU then spends a sixth of its time on
    page faults (measured in docs/benchmarks.md). Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
