"""The neural memory on a GPU: in chunks (cpu.py), their scan a Triton kernel (gpu_scan.py) in place of some twenty
small ones for each piece, and its gradient another (gpu_back.py). Coefficients and reads are products of all pieces
together and stay PyTorch's.

The kernels take float32, and memories whose gradients are all taken at the last boundary (`taken` says which);
everything else, and what a compiler records, is `scan`'s.
"""

import torch
from torch import Tensor

from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.cpu import in_chunks, kernel_memory
from atma.ops.fast_weights.gpu_call import Given, scanned_by_kernel, taken
from atma.ops.fast_weights.pieces import Grid, Piece
from atma.ops.fast_weights.reads import Scanned
from atma.ops.fast_weights.rule import Gates, Memory
from atma.ops.fast_weights.scan import scan
from atma.ops.fast_weights.state import MemoryState, chosen


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Arguments and results of the reference, in chunks: q, k, v (B, H or G or G', T, ·), what is read (B, H, T, V)."""
    return in_chunks(scanned, (q, k, v, gates), memory, state, segment_ids)


def scanned(
    piece: Piece, by: Coefficients, memory: Memory, state: MemoryState, grid: Grid, fresh: MemoryState | None
) -> tuple[Scanned, MemoryState]:
    """Arguments and results of `scan`; what the kernel does not take is its own."""
    if torch.compiler.is_compiling() or not taken(memory.rule, piece):
        return scan(piece, by, memory, state, grid, fresh)
    found = scanned_by_kernel(memory.rule, grid, Given.of(piece, by, memory, state))
    before = state._replace(weights=found.before, momentum=found.momentum_before or None)
    after = state._replace(weights=found.after, anchor=found.anchor_after, momentum=found.momentum_after or None)
    pairs = [(found.e, piece.k)] if found.h is None else [(found.e, found.h), (found.back, piece.k)]
    if fresh is not None and grid.begun is not None and memory.rule.average:
        state = chosen(grid.begun[:, 0], fresh, state)
    return Scanned(before, state, pairs), after  # pyright: ignore[reportArgumentType]


__all__ = ["fast_weights", "kernel_memory"]
