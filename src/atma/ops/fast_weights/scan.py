"""What must wait for the piece before: the inner gradients of each piece, at its anchor, and the weights behind it."""

from typing import Any

import torch
from torch import Tensor

from atma.ops.fast_weights.boundary import renewed
from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.masked import base_of, behind_piece, never_stale
from atma.ops.fast_weights.network import gradients
from atma.ops.fast_weights.pieces import Grid, Piece, apart, shared
from atma.ops.fast_weights.reads import Scanned
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState, chosen


def scan(
    piece: Piece, by: Coefficients, memory: Memory, state: MemoryState, grid: Grid, fresh: MemoryState | None
) -> tuple[Scanned, MemoryState]:
    """Piece by piece the inner gradients at the anchor, and the weights behind."""
    before, found = [], []
    each = [Coefficients(*one) for one in zip(*(shared(x, grid) for x in by), strict=True)]  # pyright: ignore
    crossed = [None] * len(each) if torch.compiler.is_compiling() else _crossed(grid.ends)
    for n, (one, of_one) in enumerate(zip(apart(piece, grid), each, strict=True)):
        if fresh is not None and grid.begun is not None:
            state = chosen(grid.begun[:, n], fresh, state)
        before.append(state)
        base = base_of(memory, state)
        if memory.rule.anchor == "all":
            pairs = gradients(state.anchor, one.k, one.v, one.delta, memory)
        else:
            pairs = never_stale(one, memory, state, base, of_one)
        found.append(pairs)
        state = behind_piece(None if memory.rule.average else base, pairs, of_one, state)
        if crossed[n] is None:
            state = chosen(grid.ends[:, n], renewed(memory, state), state)
        elif crossed[n]:
            state = renewed(memory, state)
    pairs = [tuple(torch.cat([one[i][j] for one in found]) for j in range(2)) for i in range(memory.rule.matrices)]
    return Scanned(_together(before), before[0], pairs), state


def _crossed(ends: Tensor) -> list[bool | None]:
    """Of each piece, whether all rows end at a boundary, none, or (None) some."""
    return [all(rows) if all(rows) or not any(rows) else None for rows in ends.mT.tolist()]


def _together(states: list[MemoryState]) -> MemoryState:
    """A, S and κ of states, as of one of all their rows."""
    first = states[0]
    return first._replace(
        weights=_joined([state.weights for state in states]),
        momentum=None if first.momentum is None else _joined([state.momentum for state in states]),
        scale=None if first.scale is None else torch.cat([state.scale for state in states]),  # pyright: ignore
    )


def _joined(weights: list[Any]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(each) for each in zip(*weights, strict=True))
