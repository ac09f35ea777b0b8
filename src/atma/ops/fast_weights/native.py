"""The neural memory in chunks, whose scan is compiled where there are kernels for it (anchored.py); else as `cpu`."""

from torch import Tensor

from atma.ops.fast_weights import cpu
from atma.ops.fast_weights.anchored import anchored
from atma.ops.fast_weights.cpu import kernel_memory
from atma.ops.fast_weights.rule import Gates, Memory
from atma.ops.fast_weights.state import MemoryState


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Arguments and results of the reference."""
    return cpu.in_chunks(anchored, (q, k, v, gates), memory, state, segment_ids)


__all__ = ["fast_weights", "kernel_memory"]
