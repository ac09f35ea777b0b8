"""A piece of a chunk by masked products of its tokens (mixers.md, sections 4.4 and 4.5): no weights per token.

A_t x = W° x + B_t (A_s − W°) x + f_t S_s x − Σ_j G_{tj} (z_j·x) e_j. Gates by channel multiply the axis of size V of
each matrix: of W₁ e, of the others z and x.
"""

import torch
from torch import Tensor

from atma.ops.fast_weights.coefficients import Coefficients, coefficients
from atma.ops.fast_weights.network import Product, Weights, applied, behind, gradients, hidden_layer, output, share_of
from atma.ops.fast_weights.pieces import Piece
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState

Pairs = list[tuple[Tensor, ...]]
"""(e, z) of each matrix, (B, H, J, rows) and (B, H, J, columns)."""


def masked(piece: Piece, memory: Memory, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The reads (B, H, L, V) of a piece, and the state behind it, its boundary aside."""
    rule = memory.rule
    by = coefficients(piece, rule.optimiser == "momentum")
    base = base_of(memory, state)
    if rule.anchor == "all":
        pairs, state = at_anchor(piece, memory, state)
    else:
        pairs = never_stale(piece, memory, state, base, by)
    told = by
    if rule.average:  # read W̄ + (A − W̄)/i
        part = 1 / piece.place.mT
        told = by._replace(B=by.B * part, G=by.G * part.mT[:, :, None])
    read = applied(_running(base, pairs, told, state), piece.q, memory)
    return read, behind_piece(None if rule.average else base, pairs, by, state)


def base_of(memory: Memory, state: MemoryState) -> Weights | None:
    """W°, to which A decays: W⁰, or nothing; and for `average` W̄, from which the mean of the steps is taken."""
    if memory.rule.average:
        return state.anchor
    return None if memory.rule.decay_to == "zero" else memory.initial


def at_anchor(piece: Piece, memory: Memory, state: MemoryState) -> tuple[Pairs, MemoryState]:
    """The gradients of the window's tail and of the piece at W̄, and the state with the tail moved on."""
    k, v = piece.k, piece.v
    if state.k_tail is not None and state.v_tail is not None:
        k, v = torch.cat([state.k_tail, k], 2), torch.cat([state.v_tail, v], 2)
        count = piece.here.sum((1, 2, 3)).long()
        last = count[:, None] + torch.arange(state.k_tail.shape[2], device=k.device)
        k_tail, v_tail = (x.gather(2, last[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3])) for x in (k, v))
        state = state._replace(k_tail=k_tail, v_tail=v_tail)
    return gradients(state.anchor, k, v, piece.delta, memory), state


def _away(base: Weights | None, state: MemoryState, i: int) -> Tensor:
    """A_s − W°."""
    return state.weights[i] if base is None else state.weights[i] - base[i]


def never_stale(piece: Piece, memory: Memory, state: MemoryState, base: Weights | None, by: Coefficients) -> Pairs:
    """Gradients at (Γ(A₁), W̄₂, W̄₃), the errors by the triangular system (4.12)."""
    layer = hidden_layer(state.anchor, piece.k, memory.rule)
    z = layer.h
    away, B, G = _away(base, state, 0), by.B.mT, by.G[:, :, 0]  # G is R_{ti} θ_i
    e, share = -piece.v, share_of(z) if memory.rule.normalised else None
    if memory.rule.bias == "l2":
        core = B * (z @ away.mT) + (0 if base is None else z @ base[0].mT)
        system = G * (z @ z.mT)
        e = torch.linalg.solve_triangular(
            system if share is None else system * share.mT,
            output(core, piece.k, memory) - piece.v,
            upper=False,
            unitriangular=True,
        )
    e = e if share is None else e * share
    if memory.rule.network == "matrix":
        return [(e, z)]
    back = B * (e @ away) - (G * (e @ e.mT)).tril(-1) @ z + (0 if base is None else e @ base[0])
    return [(e, z), *behind(layer, back, piece.k)]


def _running(base: Weights | None, pairs: Pairs, by: Coefficients, state: MemoryState) -> Product:
    """x_t to A_t x_t, of lq times κ (4.10)."""

    def product(i: int, x: Tensor) -> Tensor:
        read = _gated(by.B, _away(base, state, i), x, i) - _mixed(by.G, pairs[i], x, i)
        if base is not None:
            read = read + x @ base[i].mT
        if by.f is not None and state.momentum is not None:
            read = read + _gated(by.f, state.momentum[i], x, i)
        return read if state.scale is None else state.scale[..., i, None, None] * read

    return product


def _gated(gate: Tensor, matrix: Tensor, x: Tensor, i: int) -> Tensor:
    """A matrix times x_t, its axis of size V times the gate (B, H, X, L) of t."""
    return gate.mT * (x @ matrix.mT) if i == 0 else (gate.mT * x) @ matrix.mT


def _mixed(G: Tensor, pair: tuple[Tensor, ...], x: Tensor, i: int) -> Tensor:
    """Σ_j G_{tj} (z_j·x_t) e_j, a G (B, H, X, L, J) by channel along the axis of size V."""
    e, z = pair
    if G.shape[2] == 1:
        return (G[:, :, 0] * (x @ z.mT)) @ e
    if i == 0:
        return torch.einsum("bhtj,bhvtj,bhjv->bhtv", x @ z.mT, G, e)
    return torch.einsum("bhtk,bhktj,bhjk->bhtj", x, G, z) @ e


def summed(part: Tensor, pair: tuple[Tensor, ...], i: int) -> Tensor:
    """Σ_j part_j e_j z_jᵀ of part (…, X, J)."""
    e, z = pair
    return (part.mT * e).mT @ z if i == 0 else e.mT @ (part.mT * z)


def along_axis(gate: Tensor, i: int) -> Tensor:
    """(…, X) as it multiplies a matrix: rows of W₁, columns of the others."""
    return gate[..., None] if i == 0 else gate[..., None, :]


def behind_piece(base: Weights | None, pairs: Pairs, by: Coefficients, state: MemoryState) -> MemoryState:
    """A and S after the piece (4.11); base: W° where it is not nothing, and nothing where γ is 1."""
    a, s = [], []
    for i, (pair, weights) in enumerate(zip(pairs, state.weights, strict=True)):
        B = along_axis(by.B[..., -1], i)
        kept = B * weights if base is None else torch.lerp(base[i], weights, B)
        if state.momentum is not None and by.f is not None and by.of_s is not None and by.of_u is not None:
            kept = kept + along_axis(by.f[..., -1], i) * state.momentum[i]
            s.append(less(along_axis(by.of_s, i) * state.momentum[i], by.of_u, pair, i))
        a.append(less(kept, by.G[..., -1, :], pair, i))
    return state._replace(weights=tuple(a), momentum=tuple(s) or None)


def less(matrix: Tensor, part: Tensor, pair: tuple[Tensor, ...], i: int) -> Tensor:
    """A matrix − Σ_j part_j e_j z_jᵀ, in one pass over it."""
    e, z = pair
    e, z = (part.mT * e, z) if i == 0 else (e, part.mT * z)
    e, z = (x.expand(*matrix.shape[:2], -1, -1).flatten(0, 1) for x in (e, z))
    return torch.baddbmm(matrix.flatten(0, 1), e.mT, z, alpha=-1).view_as(matrix)
