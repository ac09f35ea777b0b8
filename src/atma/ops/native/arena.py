"""Memory for the results between the calls of a recorded computation, shared by recordings that never run at once.

A result's place is free again when the tensor is gone from Python: no later call of the same recording reads it, since
nothing could name it. Each recording begins with every place free, so many of them take as much as the largest.
"""

import bisect
import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64


class ArenaFull(Exception):
    """There is no place left for a result."""


class Arena:
    """`most` bytes of address space, of which what was ever used is memory."""

    def __init__(self, most: int = 256 << 20) -> None:
        self.most, self.bytes = most, 0
        """`bytes`: up to the end of the furthest place that was ever taken."""
        mapped = mmap.mmap(-1, max(most, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = np.frombuffer(mapped, np.uint8)


class Places:
    """Those of one recording in an arena, from the byte `start` on; they end at `end`."""

    def __init__(self, arena: Arena, start: int = 0) -> None:
        self.arena, self.start, self.end = arena, start, start
        self._taken: list[tuple[int, int]] = []
        self._gone: deque[tuple[int, int]] = deque()  # filled whenever Python lets a tensor go, also within `_take`

    def like(self, x: Tensor) -> Tensor:
        """A tensor of x's shape, strides and dtype, unwritten. ArenaFull."""
        if not x.numel():
            return x
        extent = 1 + sum((size - 1) * step for size, step in zip(x.shape, x.stride(), strict=True))
        count = extent * x.element_size()
        start, end = self._take(count)
        block = self.arena.memory[start : start + count]
        weakref.finalize(block, self._gone.append, (start, end)).atexit = False
        return torch.from_numpy(block).view(x.dtype).as_strided(x.shape, x.stride())

    def holds(self, x: Tensor) -> bool:
        """Whether a tensor lies in the arena."""
        start = self.arena.memory.ctypes.data
        return start <= x.untyped_storage().data_ptr() < start + self.arena.most

    def _take(self, count: int) -> tuple[int, int]:
        """The first gap that is large enough."""
        while self._gone:
            self._taken.remove(self._gone.popleft())
        count, start = -(-count // ALIGNMENT) * ALIGNMENT, self.start
        for begin, end in [*self._taken, (self.arena.most, 0)]:
            if begin - start >= count:
                break
            start = end
        else:
            raise ArenaFull(f"{count:,} bytes more do not fit in {self.arena.most:,}")
        place = start, start + count
        bisect.insort(self._taken, place)
        self.end = max(self.end, place[1])
        self.arena.bytes = max(self.arena.bytes, self.end)
        return place
