"""A piece of a chunk that is written at its end (mixers.md, section 4.8): reads of W, and sums for the boundary."""

from torch import Tensor

from atma.ops.fast_weights.coefficients import windowed
from atma.ops.fast_weights.masked import at_anchor, summed
from atma.ops.fast_weights.network import network
from atma.ops.fast_weights.pieces import Piece
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState


def collected(piece: Piece, memory: Memory, state: MemoryState) -> tuple[Tensor, MemoryState]:
    """The reads (B, H, L, V) of a piece, and the state behind it, its boundary aside."""
    rule = memory.rule
    read = network(state.weights, piece.q, memory)
    pairs, state = at_anchor(piece, memory, state)
    steps = piece.here if rule.step_at_end else piece.step
    part = windowed(steps[..., None, :], piece)[..., 0, :]  # Σ_n θ_n Ω_{n,j}, (B, H, X, J)
    assert state.pending is not None and state.pending_keep is not None
    pending = []
    for i, pair in enumerate(pairs):
        of_matrix = part[:, :, i : i + 1] if rule.gates == "matrix" and not rule.step_at_end else part
        pending.append(state.pending[i] + summed(of_matrix, pair, i))
    momentum = None if piece.momentum is None else piece.momentum * piece.here
    return read, state._replace(
        pending=tuple(pending),
        pending_momentum=_with(state.pending_momentum, momentum),
        pending_keep=state.pending_keep * _alike(piece.keep.prod(-1), state.pending_keep),
        pending_step=_with(state.pending_step, piece.step),
    )


def _with(total: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """Σ over the chunk's tokens of a gate (B, H, X, L), with this piece's."""
    return None if total is None or gate is None else total + _alike(gate.sum(-1), total)


def _alike(x: Tensor, total: Tensor) -> Tensor:
    """(B, H, X) as the state holds it, without an axis X of head gates."""
    return x if total.ndim == 3 else x[..., 0]
