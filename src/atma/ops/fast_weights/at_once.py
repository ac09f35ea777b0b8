"""All pieces of a call together, but for what an anchor decides (mixers.md, sections 4.4 and 4.5), with gates of heads.

Only the inner gradients of a piece and the weights behind it wait for the piece before: they are the scan. Coefficients
are of the gates alone and come first, reads need the weights before each piece and come last, each for all pieces at once.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from atma.ops.fast_weights.boundary import renewed
from atma.ops.fast_weights.coefficients import Coefficients, coefficients
from atma.ops.fast_weights.masked import base_of, behind_piece, never_stale
from atma.ops.fast_weights.network import gradients
from atma.ops.fast_weights.pieces import Grid, Piece, apart, joined, shared, whole
from atma.ops.fast_weights.reads import Scanned, read_of
from atma.ops.fast_weights.rule import Gates, Memory
from atma.ops.fast_weights.state import MemoryState, chosen, empty
from atma.ops.segments import tokens_before

HELD = 1 << 22
"""Numbers of the weights before pieces whose reads are taken together: more would leave the cache and fill the memory."""


def at_once(
    given: tuple[Tensor, Tensor, Tensor, Gates],
    memory: Memory,
    state: MemoryState,
    grid: Grid,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """The reads (B, H, T, V) of a call, and the state behind it."""
    q, k, v, gates = given
    every, after = _with_tails(whole(q, k, v, gates, grid), (k, v), state, grid, segment_ids)
    by = coefficients(every, memory.rule.optimiser == "momentum", gates.keep is not None)
    fresh = None if grid.begun is None else empty(memory, q.shape[0])
    reads, state = [], state._replace(k_tail=None, v_tail=None)
    for part, piece, of_piece in _parts(every, by, memory, grid):
        scanned, state = _scan(piece, of_piece, memory, state, part, fresh)
        reads.append(read_of(piece, memory, scanned, of_piece))
    tails = {"k_tail": after.k_tail, "v_tail": after.v_tail}
    return joined(torch.cat(reads), grid), state._replace(length=after.length, **tails)


def _parts(every: Piece, by: Coefficients, memory: Memory, grid: Grid) -> Iterator[tuple[Grid, Piece, Coefficients]]:
    """So many pieces at a time that the weights before them are few."""
    rows, count = grid.here.shape[:2]
    numbers = rows * sum(w.numel() for w in memory.initial)
    size = max(1, HELD // numbers)
    for first in range(0, count, size):
        pieces, of_rows = slice(first, first + size), slice(first * rows, (first + size) * rows)
        begun = None if grid.begun is None else grid.begun[:, pieces]
        part = grid._replace(here=grid.here[:, pieces], ends=grid.ends[:, pieces], begun=begun)
        yield part, Piece(*_rows(every, of_rows)), Coefficients(*_rows(by, of_rows))


def _rows(record: tuple[Any, ...], rows: slice) -> list[Any]:
    return [x if x is None else x[rows] for x in record]


def _scan(
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


def _with_tails(
    every: Piece, pair: tuple[Tensor, Tensor], state: MemoryState, grid: Grid, segment_ids: Tensor | None
) -> tuple[Piece, MemoryState]:
    """Each piece with its window's tail in front of its keys and values, and length and tail of the state behind all."""
    length = state.length + pair[0].shape[2]
    if segment_ids is not None:
        length = (1 + tokens_before(segment_ids)[:, -1]).to(length.dtype)
    if state.k_tail is None or state.v_tail is None:
        return every, state._replace(length=length)
    k, k_tail = _tailed(pair[0], state.k_tail, grid, segment_ids)
    v, v_tail = _tailed(pair[1], state.v_tail, grid, segment_ids)
    return every._replace(k=k, v=v), state._replace(length=length, k_tail=k_tail, v_tail=v_tail)


def _tailed(
    x: Tensor, tail: Tensor, grid: Grid, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N B, H, c − 1 + L, …): what is before each piece, zeros before its document, and the piece; and the last c − 1."""
    (rows, count, size), window = grid.here.shape, tail.shape[2]
    joint = torch.cat([tail, x], 2)
    columns = torch.arange(window + size, device=x.device)
    index = grid.index[:, :, :1] + columns  # of `joint`, whose first is c − 1 tokens before the call
    found = _picked(joint, index.clamp(max=joint.shape[2] - 1).flatten(1)).unflatten(2, (count, -1))
    last = joint[:, :, joint.shape[2] - window :]
    if segment_ids is not None:
        behind = tokens_before(segment_ids)
        before = behind.gather(1, grid.index[:, :, 0])[..., None] + columns - window
        found = torch.where((before >= 0)[:, None, ..., None], found, 0)
        since = behind[:, -1:] + 1 - window + columns[:window]
        last = torch.where((since >= 0)[:, None, :, None], last, 0)
    return found.permute(2, 0, 1, 3, 4).flatten(0, 1), last.clone()


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """(B, H, M, …) of (B, H, T, …) at (B, M)."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
