"""The reads of many pieces at once, from the weights before each and the gradients in each ((4.10) of mixers.md)."""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.masked import Pairs
from atma.ops.fast_weights.network import applied, by_head
from atma.ops.fast_weights.pieces import Piece
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState


class Scanned(NamedTuple):
    """What reads need of N pieces, whose first B rows are the first pieces."""

    before: MemoryState  # of N B rows: A, S and κ before each piece
    first: MemoryState  # before the first pieces, in which alone W̄ and A may differ
    pairs: Pairs


def read_of(piece: Piece, memory: Memory, scanned: Scanned, by: Coefficients) -> Tensor:
    """(N B, H, L, V)."""
    state = scanned.before
    B, f, G = by.B.mT, None if by.f is None else by.f.mT, by.G[:, :, 0]
    part = 1 / piece.place if memory.rule.average else None  # read W̄ + (A − W̄)/i

    def product(i: int, x: Tensor) -> Tensor:
        """x_t to A_t x_t, of lq times κ."""
        (e, z), read = scanned.pairs[i], x @ state.weights[i].mT
        if part is not None:
            return _averaged(read, x, i, scanned.first, part) - ((part * G) * (x @ z.mT)) @ e
        read = B * read if memory.rule.decay_to == "zero" else torch.lerp(by_head(x, memory.initial[i]), read, B)
        read = read - (G * (x @ z.mT)) @ e
        if f is not None and state.momentum is not None:
            read = read + f * (x @ state.momentum[i].mT)
        return read if state.scale is None else state.scale[..., i, None, None] * read

    return applied(product, piece.q, memory)


def _averaged(read: Tensor, x: Tensor, i: int, first: MemoryState, part: Tensor) -> Tensor:
    """(W̄ + (A − W̄)/i) x_t of A x_t."""
    if first.anchor is first.weights:
        return read
    rows = len(first.weights[i])
    away = (part[:rows] - 1) * (x[:rows] @ (first.weights[i] - first.anchor[i]).mT)
    return torch.cat([read[:rows] + away, read[rows:]])
