"""The neural memory on a GPU: in chunks (cpu.py), their scan one Triton kernel (gpu_scan.py) in place of some twenty
small ones for each piece. Coefficients and reads are products of all pieces together and stay PyTorch's.

The kernel takes float32, and memories whose gradients are all taken at the last boundary (`taken` says which);
everything else, and what a compiler records, is `scan`'s. The gradient is exact: the backward pass computes the scan
of its pieces again by `scan` under autograd, launch by launch, and what that keeps until it is done grows with the text
alone. So a training step holds less than with `scan` alone, and takes the kernel's time longer: what the kernel saves,
it saves without gradients. A backward pass in Triton is still to come.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.cpu import in_chunks, kernel_memory
from atma.ops.fast_weights.gpu_call import Found, Given, flat, launched, taken
from atma.ops.fast_weights.pieces import Grid, Piece
from atma.ops.fast_weights.reads import Scanned
from atma.ops.fast_weights.rule import Gates, Memory, Rule
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
    given = flat(Given.of(piece, by, memory, state))
    results = (_Scan.apply if torch.is_grad_enabled() else launched)(memory.rule, grid, *given)
    found = Found.of(memory.rule, results)
    before = state._replace(weights=found.before, momentum=found.momentum_before or None)
    after = state._replace(weights=found.after, anchor=found.anchor_after, momentum=found.momentum_after or None)
    pairs = [(found.e, piece.k)] if found.h is None else [(found.e, found.h), (found.back, piece.k)]
    if fresh is not None and grid.begun is not None and memory.rule.average:
        state = chosen(grid.begun[:, 0], fresh, state)
    return Scanned(before, state, pairs), after  # pyright: ignore[reportArgumentType]


class _Scan(torch.autograd.Function):
    """Forward by the kernel, backward by `scan` under autograd."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, grid: Grid, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.rule, ctx.grid = rule, grid
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return launched(rule, grid, *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        given = [None if x is None else x.detach().requires_grad_(needed) for x, needed in saved]
        with torch.enable_grad():
            found = Given.from_flat(ctx.rule, given).scanned(ctx.rule, ctx.grid)
        told = [(x, slope) for x, slope in zip(flat(found), slopes, strict=True) if x is not None and slope is not None]
        told = [(x, slope) for x, slope in told if x.requires_grad]
        asked = [x for x in given if x is not None and x.requires_grad]
        outputs, gradients = [x for x, _ in told], [slope for _, slope in told]
        grads = torch.autograd.grad(outputs, asked, gradients, allow_unused=True) if told else [None] * len(asked)
        each = iter(grads)
        return None, None, *(next(each) if x is not None and x.requires_grad else None for x in given)


__all__ = ["fast_weights", "kernel_memory"]
