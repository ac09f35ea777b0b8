"""The neural memory token by token: the definition (mixers.md, sections 4.3 and 4.8), differentiable by autograd.

Letters are the specification's; n is the token at hand, θ, γ, η and ω its gates.
"""

import torch
from torch import Tensor

from atma.ops.fast_weights.boundary import between, renewed, written
from atma.ops.fast_weights.kernel import kernel_memory
from atma.ops.fast_weights.network import Weights, gradients, network
from atma.ops.fast_weights.newton_schulz import newton_schulz
from atma.ops.fast_weights.retention import along, decayed, retained
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
    momentum, after = _stepped(kept, u, at, memory, state)
    place = state.length % rule.chunk + 1  # i: tokens of the chunk written so far
    state = state._replace(length=state.length + 1, weights=after, momentum=momentum)
    if rule.average:
        weights = between(state, 1 / place.to(q.dtype).view(-1, 1, 1, 1))
    else:
        weights = retained(after, state.scale, rule)
    read = network(weights, q[:, :, None], memory)[:, :, 0]  # (4.6)
    return read, chosen(place == rule.chunk, renewed(memory, state), state)


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
    return read, chosen(state.length % rule.chunk == 0, written(memory, state), state)


def _with(total: Tensor | None, gate: Tensor | None) -> Tensor | None:
    """A sum over the chunk's tokens with one more."""
    return None if total is None or gate is None else total + gate


__all__ = ["fast_weights", "kernel_memory"]
