"""What happens at a boundary of the grid: anchors are renewed, and chunks written (mixers.md, sections 4.3 and 4.8).

One text for every backend; a half-finished chunk is in the state, so that a boundary needs nothing else.
"""

import math

import torch
from torch import Tensor

from atma.ops.fast_weights.network import Weights
from atma.ops.fast_weights.newton_schulz import newton_schulz
from atma.ops.fast_weights.retention import along, decayed, renormed, retained, scale_of
from atma.ops.fast_weights.rule import Memory
from atma.ops.fast_weights.state import MemoryState


def between(state: MemoryState, part: Tensor | float) -> Weights:
    """W̄ + (A − W̄) part: of part = 1/i the mean of i steps from the anchor, each by itself (section 4.10)."""
    return tuple(w + (a - w) * part for a, w in zip(state.weights, state.anchor, strict=True))


def renewed(memory: Memory, state: MemoryState) -> MemoryState:
    """W̄ ← ρ(A) at a boundary (4.7)."""
    rule = memory.rule
    a = between(state, 1 / rule.chunk) if rule.average else state.weights
    if not math.isinf(rule.radius):
        a = tuple(_drawn_back(one, start, rule.radius) for one, start in zip(a, memory.initial, strict=True))
    scale = scale_of(a, rule)
    return state._replace(weights=a, anchor=retained(a, scale, rule), scale=scale)


def _drawn_back(a: Tensor, start: Tensor, radius: float) -> Tensor:
    """A where it is within the radius, else the point of the way to W⁰ that is."""
    moved, whole = a - start, (-2, -1)
    most = radius * torch.linalg.vector_norm(start, dim=whole, keepdim=True)
    far = torch.linalg.vector_norm(moved, dim=whole, keepdim=True)
    beyond = far > most
    return torch.where(beyond, start + moved * (most / torch.where(beyond, far, 1)), a)


def written(memory: Memory, state: MemoryState) -> MemoryState:
    """W, W̄ and S after the last token of a chunk, (4.15) and (4.16); the next chunk begins with nothing collected."""
    rule, pending = memory.rule, state.pending
    assert pending is not None and state.pending_keep is not None
    kept, momentum = decayed(state.anchor, state.pending_keep, memory), None  # Γ(W̄)
    if rule.optimiser == "gd":
        a = tuple(w - u for w, u in zip(kept, pending, strict=True))
    else:
        momentum, step = _steps_of_chunk(memory, state)
        a = tuple(w + s for w, s in zip(kept, step, strict=True))
    anchor = a if rule.retention == "l2" else renormed(a, memory)
    return state._replace(
        weights=anchor if rule.retention == "renorm" else a,
        anchor=anchor,
        momentum=momentum,
        pending=tuple(torch.zeros_like(u) for u in pending),
        pending_momentum=_zero(state.pending_momentum),
        pending_keep=torch.ones_like(state.pending_keep),
        pending_step=_zero(state.pending_step),
    )


def _zero(total: Tensor | None) -> Tensor | None:
    return None if total is None else torch.zeros_like(total)


def _steps_of_chunk(memory: Memory, state: MemoryState) -> tuple[Weights, Weights]:
    """S ← η̄ S − U, and what is added to Γ(W̄): S, NS(S), or with l2 θ̄ NS(S)."""
    rule, pending = memory.rule, state.pending
    assert state.momentum is not None and state.pending_momentum is not None and pending is not None
    eta = state.pending_momentum / rule.chunk
    s = tuple(along(eta, i, rule) * one - pending[i] for i, one in enumerate(state.momentum))
    if rule.optimiser == "momentum":
        return s, s
    steps = tuple(newton_schulz(one, rule.schedule) for one in s)
    if state.pending_step is not None:
        theta = state.pending_step / rule.chunk
        steps = tuple(along(theta, i, rule) * one for i, one in enumerate(steps))
    return s, steps
