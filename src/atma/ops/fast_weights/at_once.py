"""All pieces of a call together, but for what an anchor decides (mixers.md, sections 4.4 and 4.5), with gates of heads.

Only the inner gradients of a piece and the weights behind it wait for the piece before: they are the scan. Coefficients
are of the gates alone and come first; reads need the weights before each piece and come last. Both are of all pieces.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from atma.ops.fast_weights.coefficients import Coefficients, coefficients
from atma.ops.fast_weights.pieces import Grid, Piece, joined, whole
from atma.ops.fast_weights.reads import Scanned, read_of
from atma.ops.fast_weights.rule import Gates, Memory
from atma.ops.fast_weights.state import MemoryState, empty
from atma.ops.segments import tokens_before

HELD = 1 << 22
"""Numbers of the weights before pieces whose reads are taken together: more would fill the memory of a long prompt."""
HELD_ON_DEVICE = 1 << 26
"""The same on a GPU, where as many launches take as much time whatever they are of."""


Scan = Callable[[Piece, Coefficients, Memory, MemoryState, Grid, MemoryState | None], tuple[Scanned, MemoryState]]
"""`scan.scan`: of pieces, what their reads need of it, and the state behind them."""


def at_once(
    scan: Scan,
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
        scanned, state = scan(piece, of_piece, memory, state, part, fresh)
        reads.append(read_of(piece, memory, scanned, of_piece))
    tails = {"k_tail": after.k_tail, "v_tail": after.v_tail}
    return joined(torch.cat(reads), grid), state._replace(length=after.length, **tails)


def _parts(every: Piece, by: Coefficients, memory: Memory, grid: Grid) -> Iterator[tuple[Grid, Piece, Coefficients]]:
    """So many pieces at a time that the weights before them are few."""
    rows, count = grid.here.shape[:2]
    numbers = rows * sum(w.numel() for w in memory.initial)
    size = max(1, (HELD if grid.here.device.type == "cpu" else HELD_ON_DEVICE) // numbers)
    for first in range(0, count, size):
        pieces, of_rows = slice(first, first + size), slice(first * rows, (first + size) * rows)
        begun = None if grid.begun is None else grid.begun[:, pieces]
        part = grid._replace(here=grid.here[:, pieces], ends=grid.ends[:, pieces], begun=begun)
        yield part, Piece(*_rows(every, of_rows)), Coefficients(*_rows(by, of_rows))


def _rows(record: tuple[Any, ...], rows: slice) -> list[Any]:
    return [x if x is None else x[rows] for x in record]


def _with_tails(
    every: Piece, pair: tuple[Tensor, Tensor], state: MemoryState, grid: Grid, segment_ids: Tensor | None
) -> tuple[Piece, MemoryState]:
    """Each piece with its window's tail in front of its keys and values, and length and tail behind all."""
    length = state.length + pair[0].shape[2]
    if segment_ids is not None:
        length = (1 + tokens_before(segment_ids)[:, -1]).to(length.dtype)
    if state.k_tail is None or state.v_tail is None:
        return every, state._replace(length=length)
    k, k_tail = _tailed(pair[0], state.k_tail, grid, segment_ids)
    v, v_tail = _tailed(pair[1], state.v_tail, grid, segment_ids)
    return every._replace(k=k, v=v), state._replace(length=length, k_tail=k_tail, v_tail=v_tail)


def _tailed(x: Tensor, tail: Tensor, grid: Grid, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N B, H, c − 1 + L, …): before each piece its tail, zeros before a document; and the last c − 1 tokens."""
    (_, count, size), window = grid.here.shape, tail.shape[2]
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
