"""A piece of a chunk with the weights of each of its tokens, C P numbers a head (mixers.md, sections 4.4 and 4.6).

For muon, whose step NS(S_t) is no sum of gradients, and kl, whose reads are softmaxes. All tokens' Newton–Schulz rounds
are one batch.
"""

import torch
from torch import Tensor

from atma.ops.fast_weights.coefficients import coefficients, products, windowed
from atma.ops.fast_weights.masked import Pairs, along_axis, at_anchor, base_of, summed
from atma.ops.fast_weights.network import Weights, applied
from atma.ops.fast_weights.newton_schulz import newton_schulz
from atma.ops.fast_weights.pieces import Piece
from atma.ops.fast_weights.retention import retained
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState


def spread(piece: Piece, memory: Memory, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The reads (B, H, L, V) of a piece, and the state behind it, its boundary aside."""
    pairs, state = at_anchor(piece, memory, state)
    s, added = (_rounds if memory.rule.optimiser == "muon" else _steps)(piece, memory, state, pairs)
    base, B = base_of(memory, state), piece.keep.cumprod(-1).mT  # (B, H, L, X)
    weights = []
    for i, more in enumerate(added):
        away = state.weights[i] if base is None else state.weights[i] - base[i]
        one = along_axis(B, i) * away[:, :, None] + more
        weights.append(one if base is None else base[i][:, None] + one)
    read_at = retained(tuple(weights), None if state.scale is None else state.scale[:, :, None], memory.rule)
    read = applied(lambda i, x: (read_at[i] @ x[..., None])[..., 0], piece.q, memory)
    last = tuple(w[:, :, -1] for w in weights)
    return read, state._replace(weights=last, momentum=s)


def _steps(piece: Piece, memory: Memory, state: MemoryState, pairs: Pairs) -> tuple[Weights | None, Weights]:
    """S behind the piece, and f_t S_s − Σ_j G_{tj} e_j z_jᵀ (B, H, L, rows, columns) of each matrix."""
    by = coefficients(piece, memory.rule.optimiser == "momentum")
    added = tuple(-_each(by.G, pair, i) for i, pair in enumerate(pairs))
    if state.momentum is None or by.f is None or by.of_s is None or by.of_u is None:
        return None, added
    s = tuple(along_axis(by.of_s, i) * one - summed(by.of_u, pairs[i], i) for i, one in enumerate(state.momentum))
    held = (along_axis(by.f.mT, i) * one[:, :, None] for i, one in enumerate(state.momentum))
    return s, tuple(a + b for a, b in zip(added, held, strict=True))


def _rounds(piece: Piece, memory: Memory, state: MemoryState, pairs: Pairs) -> tuple[Weights, Weights]:
    """S behind the piece, and Σ_i R_{ti} θ_i NS(S_i) of each matrix, with S_t = H_{t,s} S_s − Σ_i H_{ti} u_i."""
    assert piece.momentum is not None and state.momentum is not None
    eta = piece.momentum.cumprod(-1).mT
    H = windowed(products(piece.momentum) * piece.here[..., None, :], piece)
    part = products(piece.keep) * piece.step[..., None, :]
    last, added = [], []
    for i, pair in enumerate(pairs):
        s = along_axis(eta, i) * state.momentum[i][:, :, None] - _each(H, pair, i)
        last.append(s[:, :, -1])
        added.append(_carried(part, newton_schulz(s, memory.rule.schedule), i))
    return tuple(last), tuple(added)


def _each(part: Tensor, pair: tuple[Tensor, ...], i: int) -> Tensor:
    """Σ_j part_{tj} e_j z_jᵀ for every t of part (B, H, X, L, J): (B, H, L, rows, columns)."""
    e, z = pair
    return summed(part.transpose(2, 3), (e[:, :, None], z[:, :, None]), i)


def _carried(part: Tensor, steps: Tensor, i: int) -> Tensor:
    """Σ_i part_{ti} of steps (B, H, L, rows, columns), by channel along the axis of size V."""
    if part.shape[2] == 1:
        return (part[:, :, 0] @ steps.flatten(3)).view_as(steps)
    return torch.einsum("bhvti,bhivc->bhtvc" if i == 0 else "bhvti,bhicv->bhtcv", part, steps)
