"""The neural memory token by token: the definition (mixers.md, sections 4.3 and 4.8), differentiable by autograd.

Letters are the specification's; n is the token at hand, θ, γ, η and ω its gates.
"""

import torch
from torch import Tensor

from atma.ops.fast_weights.kernel import kernel_memory
from atma.ops.fast_weights.network import Weights, gradients, network
from atma.ops.fast_weights.newton_schulz import newton_schulz
from atma.ops.fast_weights.retention import along, decayed, renormed, retained, scale_of
from atma.ops.fast_weights.rule import Gates, Memory
from atma.ops.fast_weights.state import MemoryState, chosen, empty
from atma.ops.segments import begins


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Arguments of the public function in one dtype throughout."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    fresh = None if segment_ids is None else empty(memory, q.shape[0])
    begun = None if segment_ids is None else begins(segment_ids)
    token = _by_token if memory.rule.granularity == "token" else _by_chunk
    reads = []
    for n in range(q.shape[2]):
        if begun is not None and fresh is not None:
            state = chosen(begun[:, n], fresh, state)
        at = Gates(*(None if gate is None else gate[:, :, n] for gate in gates))  # pyright: ignore
        read, state = token(q[:, :, n], (k[:, :, n], v[:, :, n]), at, memory, state)
        reads.append(read)
    return torch.stack(reads, 2), state


def _by_token(
    q: Tensor, pair: tuple[Tensor, Tensor], at: Gates, memory: Memory, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """One token that is written before it is read (section 4.3)."""
    rule = memory.rule
    kept = decayed(state.weights, at.keep, memory)  # Γ_n(A)
    point = state.anchor if rule.anchor == "all" else (kept[0], *state.anchor[1:])  # section 4.5
    u, state = _gradient(point, pair, at, memory, state)
    momentum, written = _stepped(kept, u, at, memory, state)
    place = state.length % rule.chunk + 1  # i: tokens of the chunk written so far
    state = state._replace(length=state.length + 1, weights=written, momentum=momentum)
    if rule.average:
        weights = _between(state, 1 / place.to(q.dtype).view(-1, 1, 1, 1))
    else:
        weights = retained(written, state.scale, rule)
    read = network(weights, q[:, :, None], memory)[:, :, 0]  # (4.6)
    return read, chosen(place == rule.chunk, _renewed(memory, state), state)


def _gradient(
    point: Weights, pair: tuple[Tensor, Tensor], at: Gates, memory: Memory, state: MemoryState
) -> tuple[list[Tensor], MemoryState]:
    """u_n = Σ_j ω_{n,j} g_{n−j} of each matrix (4.2), and the state with the tail moved on."""
    k, v = (x[:, :, None] for x in pair)
    if state.k_tail is not None and state.v_tail is not None:
        k, v = torch.cat([state.k_tail, k], 2), torch.cat([state.v_tail, v], 2)
        state = state._replace(k_tail=k[:, :, 1:], v_tail=v[:, :, 1:])
    delta = at.delta if at.delta is None else at.delta.reshape(*k.shape[:2], 1, -1)
    pairs = gradients(point, k, v, delta, memory)
    if at.omega is not None:
        omega = at.omega.flip(-1)[..., None]  # the oldest first, as the tail
        pairs = [(omega * e, z) for e, z in pairs]
    return [e.mT @ z for e, z in pairs], state


def _stepped(
    kept: Weights, u: list[Tensor], at: Gates, memory: Memory, state: MemoryState
) -> tuple[Weights | None, Weights]:
    """S and A after the step (4.3)–(4.5), of kept = Γ_n(A)."""
    rule, count = memory.rule, range(len(u))
    theta = [along(at.step, i, rule) for i in count]
    if rule.optimiser == "gd":
        return None, tuple(kept[i] - theta[i] * u[i] for i in count)
    assert state.momentum is not None and at.momentum is not None
    eta = [along(at.momentum, i, rule) for i in count]
    if rule.optimiser == "momentum":
        s = tuple(eta[i] * state.momentum[i] - theta[i] * u[i] for i in count)
        return s, tuple(kept[i] + s[i] for i in count)
    s = tuple(eta[i] * state.momentum[i] - u[i] for i in count)
    return s, tuple(kept[i] + theta[i] * newton_schulz(s[i], rule.schedule) for i in count)


def _between(state: MemoryState, part: Tensor | float) -> Weights:
    """W̄ + (A − W̄) part: of part = 1/i the mean of i steps from the anchor, each by itself (section 4.10)."""
    return tuple(w + (a - w) * part for a, w in zip(state.weights, state.anchor, strict=True))


def _renewed(memory: Memory, state: MemoryState) -> MemoryState:
    """W̄ ← ρ(A) at a boundary (4.7)."""
    rule = memory.rule
    written = _between(state, 1 / rule.chunk) if rule.average else state.weights
    scale = scale_of(written, rule)
    return state._replace(weights=written, anchor=retained(written, scale, rule), scale=scale)


def _by_chunk(
    q: Tensor, pair: tuple[Tensor, Tensor], at: Gates, memory: Memory, state: MemoryState
) -> tuple[Tensor, MemoryState]:
    """One token of a memory that is written at the end of a chunk (section 4.8)."""
    rule = memory.rule
    read = network(state.weights, q[:, :, None], memory)[:, :, 0]
    u, state = _gradient(state.anchor, pair, at, memory, state)
    if not rule.step_at_end:
        u = [along(at.step, i, rule) * one for i, one in enumerate(u)]
    assert state.pending is not None and state.pending_keep is not None
    state = state._replace(
        length=state.length + 1,
        pending=tuple(a + b for a, b in zip(state.pending, u, strict=True)),
        pending_momentum=_with(state.pending_momentum, at.momentum),
        pending_keep=state.pending_keep if at.keep is None else state.pending_keep * at.keep,
        pending_step=_with(state.pending_step, at.step),
    )
    return read, chosen(state.length % rule.chunk == 0, _written(memory, state), state)


def _with(total: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """A sum over the chunk's tokens with one more."""
    return None if total is None or gate is None else total + gate


def _written(memory: Memory, state: MemoryState) -> MemoryState:
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


__all__ = ["fast_weights", "kernel_memory"]
