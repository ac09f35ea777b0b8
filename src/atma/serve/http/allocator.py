"""One heap for the server's threads, and no spare memory in it when serving begins.

glibc gives every thread a heap of its own, none of which takes what another has freed; and loading a model frees as
much as it keeps.
"""

import ctypes
import platform
import sys

_ARENAS = -8
MOST = 2
"""Heaps: that of the main thread, which answers connections, and one for all others, of which the engine's computes."""


def few_heaps() -> bool:
    """Set it for the whole process, before other threads begin. False where the C library is not glibc, or refuses."""
    return _is_glibc() and bool(ctypes.CDLL(None).mallopt(_ARENAS, MOST))


def give_back() -> bool:
    """Return freed memory to the system. False where the C library is not glibc, or there was none."""
    return _is_glibc() and bool(ctypes.CDLL(None).malloc_trim(0))


def _is_glibc() -> bool:
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
