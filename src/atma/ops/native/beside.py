"""Recorded computations that have nothing to do with one another, each replayed by a thread of its own.

A step of few rows is many short kernels, and threads that meet at the end of each wait as long as they work. Where each
computes rows of its own they meet once a step.
"""

import ctypes
from collections.abc import Sequence

from atma.ops import native
from atma.ops.native.recorder import Program, check


class Beside:
    """Programs that share nothing they write, replayed at once, each by a thread of its own."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._lists = (ctypes.c_void_p * len(programs))(*(ctypes.addressof(one.calls) for one in programs))
        self._lengths = (ctypes.c_int64 * len(programs))(*map(len, programs))
        library = native.status().library
        assert library is not None
        self._replay = library.replay_beside
        self._replay.restype = ctypes.c_int64

    def replay(self) -> None:
        """Compute all again. IndexError as `Program.replay`."""
        check(self._replay(self._lists, self._lengths, ctypes.c_int64(len(self._programs))))


__all__ = ["Beside"]
