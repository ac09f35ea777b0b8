"""Weights in large pages of memory, where the system has them.

One new token reads every weight once. In pages of 4 KiB the processor then looks up a page for every thousand numbers,
and fetches ahead to the page's end at the most: in pages of 2 MiB the same bytes come up to a third sooner. Linux gives
these to a mapping that asks for them (`madvise`), which neither malloc nor PyTorch does by itself.
"""

import mmap
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

PAGE = 2 << 20
"""Bytes of a large page on x86 and, with small ones of 4 KiB, on ARM."""
ALIGNMENT = 64
"""Of a tensor, as PyTorch's own."""


@torch.no_grad()
def in_large_pages(tensors: Iterable[Tensor]) -> None:
    """Move those that are on the CPU into one mapping of large pages, in place.

    Numbers, shapes, strides and what shares memory stay; a tensor still has a storage of its own, and all of them
    together keep the mapping. Nothing happens where there are no such pages, or the tensors would not fill one.
    """
    held: dict[int, list[Tensor]] = {}
    for x in tensors:
        if x.device.type == "cpu" and x.layout == torch.strided and x.untyped_storage().nbytes():
            held.setdefault(x.untyped_storage().data_ptr(), []).append(x)
    sizes = {start: held[start][0].untyped_storage().nbytes() for start in held}
    memory = _mapped(sum(_aligned(size) for size in sizes.values()))
    if memory is None:
        return
    at = 0
    for start, sharing in held.items():
        block = torch.from_numpy(memory[at : at + sizes[start]])
        block.copy_(torch.empty(0, dtype=torch.uint8).set_(sharing[0].untyped_storage()))
        for x in sharing:
            x.data = block.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
        at += _aligned(sizes[start])


def _mapped(count: int) -> np.ndarray | None:
    """So many bytes from a large page's beginning on; None: there are no such pages, or they would not fill one."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or count < PAGE:
        return None
    mapped = mmap.mmap(-1, count + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        mapped.madvise(advice)
    except OSError:  # a kernel without them
        return None
    memory = np.frombuffer(mapped, np.uint8)
    return memory[-memory.ctypes.data % PAGE :][:count]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT) * ALIGNMENT
