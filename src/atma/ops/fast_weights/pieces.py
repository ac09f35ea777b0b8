"""A call cut into pieces at the boundaries of the absolute grid and of documents (mixers.md, section 4.4).

Rows of a batch stand at different places, so each is cut by itself. The n-th pieces of all rows are computed together;
a piece shorter than the longest is filled up behind its tokens with idle ones, which write nothing.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.fast_weights.rule import Gates
from atma.ops.segments import begins, tokens_before


class Grid(NamedTuple):
    """Where the tokens of a call stand: N pieces of at most L tokens."""

    index: Tensor  # (B, N, L): which token a place holds, any where it is idle
    here: Tensor  # (B, N, L) bool: m, false where it is idle
    place: Tensor  # (B, N): tokens of the grid's chunk before the piece
    ends: Tensor  # (B, N) bool: the piece ends at a boundary of the grid
    begun: Tensor | None  # (B, N) bool: the piece begins a document behind another
    slot: Tensor  # (B, T): which of the N L places is a token's
    regular: bool  # whether every place holds the token of its number, and those behind the last are idle


class Piece(NamedTuple):
    """The n-th pieces of all rows. X is 1, of channel gates V, and of a step for each matrix their number."""

    q: Tensor  # (B, H, L, K′)
    k: Tensor
    v: Tensor  # (B, H, L, V)
    step: Tensor  # θ (B, H, X, L), of an idle token 0
    keep: Tensor  # γ, likewise 1
    momentum: Tensor | None  # η, likewise 1
    delta: Tensor | None  # δ (B, H, L, 1 or V)
    omega: Tensor | None  # ω (B, H, L, c), likewise 0
    here: Tensor  # m (B, 1, 1, L)
    place: Tensor  # i (B, 1, L, 1): tokens of the grid's chunk written so far


def grid_of(length: Tensor, tokens: int, chunk: int, segment_ids: Tensor | None) -> Grid:
    """The pieces of `tokens` tokens of rows that stand at length (B,), or of documents that all begin at 0."""
    index = torch.arange(tokens, device=length.device)
    position = length[:, None].long() + index if segment_ids is None else tokens_before(segment_ids).long()
    cut = position % chunk == 0
    cut[:, 0] = True
    piece = cut.cumsum(1) - 1
    behind = index - torch.where(cut, index, 0).cummax(1).values
    if torch.compiler.is_compiling() and segment_ids is None:  # sizes that no value decides
        count, size = (tokens - 1) // chunk + 2, min(chunk, tokens)
    else:
        count, size = int(piece.max()) + 1, int(behind.max()) + 1
    slot, shape = piece * size + behind, (len(length), count * size)
    here = torch.zeros(shape, dtype=torch.bool, device=length.device).scatter(1, slot, True)
    at = torch.zeros(shape, dtype=torch.long, device=length.device).scatter(1, slot, index.expand_as(slot))
    at, here = at.unflatten(1, (count, size)), here.unflatten(1, (count, size))
    ends = _any(position % chunk == chunk - 1, piece, count)
    begun = None if segment_ids is None else _any(begins(segment_ids), piece, count)
    place = position.gather(1, at[:, :, 0]) % chunk
    regular = not torch.compiler.is_compiling() and bool((slot == index).all())
    return Grid(at, here, place, ends, begun, slot, regular)


def _any(of_tokens: Tensor, piece: Tensor, count: int) -> Tensor:
    """(B, N) of (B, T): which pieces hold a token that is so."""
    nowhere = torch.zeros(len(piece), count + 1, dtype=torch.bool, device=piece.device)
    return nowhere.scatter(1, torch.where(of_tokens, piece, count), True)[:, :count]


def pieces(q: Tensor, k: Tensor, v: Tensor, gates: Gates, grid: Grid) -> list[Piece]:
    """The call (B, H, T, …) piece by piece."""
    return apart(whole(q, k, v, gates, grid), grid)


def whole(q: Tensor, k: Tensor, v: Tensor, gates: Gates, grid: Grid) -> Piece:
    """The call (B, H, T, …) as one piece of N B rows: its first pieces, its second ones, and so on."""
    keep = torch.ones_like(q[..., 0]) if gates.keep is None else gates.keep
    filled = {"step": (gates.step, 0), "keep": (keep, 1), "momentum": (gates.momentum, 1)}
    parts: dict[str, Any] = {name: _cut(x, grid) for name, x in (("q", q), ("k", k), ("v", v))}
    parts |= {name: None if x is None else _cut(x, grid, idle).mT for name, (x, idle) in filled.items()}
    parts |= {"delta": _given(gates.delta, grid, 1), "omega": _given(gates.omega, grid, 0)}
    parts["here"] = grid.here.transpose(0, 1).flatten(0, 1)[:, None, None].to(q.dtype)
    count = 1 + torch.arange(grid.here.shape[2], device=q.device)
    parts["place"] = (grid.place.mT.flatten()[:, None] + count)[:, None, :, None].to(q.dtype)
    return Piece(**parts)


def apart(piece: Piece, grid: Grid) -> list[Piece]:
    """Each piece of `whole`."""
    return [Piece(*each) for each in zip(*(shared(x, grid) for x in piece), strict=True)]  # pyright: ignore


def shared(x: Tensor | None, grid: Grid) -> list[Any]:
    """Each piece's (B, …) of what is of all pieces, (N B, …)."""
    return [None] * grid.here.shape[1] if x is None else list(x.unflatten(0, (grid.here.shape[1], -1)).unbind())


def _given(x: Tensor | None, grid: Grid, idle: float) -> Tensor | None:
    return None if x is None else _cut(x, grid, idle)


def _cut(x: Tensor, grid: Grid, idle: float | None = None) -> Tensor:
    """(N B, H, L, …) of (B, H, T, …), one number a token as an axis of 1; idle: what idle tokens have."""
    x = x if x.ndim == 4 else x[..., None]
    (_, count, size), length = grid.here.shape, x.shape[2]
    if grid.regular:
        x = x if count * size == length else F.pad(x, (0, 0, 0, count * size - length), value=idle or 0.0)
        return x.unflatten(2, (count, size)).permute(2, 0, 1, 3, 4).flatten(0, 1).contiguous()
    index = grid.index.flatten(1)[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])
    x = x.gather(2, index).unflatten(2, (count, size))
    x = x if idle is None else torch.where(grid.here[:, None, :, :, None], x, idle)
    return x.permute(2, 0, 1, 3, 4).flatten(0, 1)


def joined(reads: Tensor, grid: Grid) -> Tensor:
    """(B, H, T, V) of the reads (N B, H, L, V) of the pieces."""
    read = reads.unflatten(0, (grid.here.shape[1], -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    if grid.regular:
        return read[:, :, : grid.slot.shape[1]]
    return read.gather(2, grid.slot[:, None, :, None].expand(-1, read.shape[1], -1, read.shape[3]))
