"""Kernel memories block by block (mixers.md, section 4.7): what a block writes solves a triangular system.

A token writes at c keys, so a block of m tokens is m c writes, the (t, j)-th at the key of token t − j. A write knows
the memory before the block, and in the block what tokens before its own have written.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.fast_weights.kernel import Kernel, KernelState, weights
from atma.ops.segments import document_start

WRITES = 256
"""At most so many writes a block, where a token has no more."""


class _Block(NamedTuple):
    """m tokens; places are those of the state's keys."""

    q: Tensor  # (B, H, m, K)
    v: Tensor  # v_{t−j} (B, H, m c, V)
    omega: Tensor  # ω (B, H, m c, 1), 0 before the text
    place: Tensor  # (B, m), of the tokens
    first: Tensor  # (B, m), of their documents' first tokens
    at: Tensor  # (B, m c), of the keys that are written at


def kernel_blocks(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState, segment_ids: Tensor | None
) -> tuple[Tensor, KernelState]:
    """Arguments and results of the definition. Documents stay where they are in the row until the last is returned."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    tokens = torch.arange(q.shape[2], device=q.device)
    place = state.length[:, None].long() + tokens
    first = torch.zeros_like(place) if segment_ids is None else document_start(segment_ids).long()
    places = torch.arange(state.keys.shape[2], device=q.device)
    new = ((places >= place[:, :1]) & (places <= place[:, -1:]))[:, None, :, None]
    keys, written = _put(state.keys, place, k), torch.where(new, 0.0, state.written)
    v = v if state.v_tail is None else torch.cat([state.v_tail, v], 2)
    back, reads = torch.arange(memory.window, device=q.device), []
    for some in tokens.split(max(1, WRITES // memory.window)):
        at = place[:, some, None] - back
        there = (at >= first[:, some, None]).flatten(1)[:, None, :, None]
        values = v[:, :, (some[:, None] + memory.window - 1 - back).flatten()]
        gate = torch.where(there, omega[:, :, some].flatten(2)[..., None], 0.0)
        block = _Block(q[:, :, some], values, gate, place[:, some], first[:, some], at.flatten(1).clamp(min=0))
        read, written = _read(block, keys, written, memory)
        reads.append(read)
    state = KernelState(state.length + q.shape[2], keys, written, _tail(v, place, first, memory), state.open)
    return torch.cat(reads, 2), state if segment_ids is None else _last(state, first[:, -1])


def _read(block: _Block, keys: Tensor, written: Tensor, memory: Kernel) -> tuple[Tensor, Tensor]:
    """The reads of a block (4.14), and u behind it (4.13)."""
    places = torch.arange(keys.shape[2], device=keys.device)
    old = (places >= block.first[..., None]) & (places < block.place[:, :1, None])  # (B, m, L)
    at, mine = _take(keys, block.at), block.place.repeat_interleave(memory.window, 1)
    steps = block.omega * block.v
    if memory.rule == "delta":
        first = block.first.repeat_interleave(memory.window, 1)[..., None]
        system = weights(at, at, _within(mine[..., None], mine[:, None], first, 1), memory)
        known = weights(at, keys, old.repeat_interleave(memory.window, 1)[:, None], memory) @ written
        steps = torch.linalg.solve_triangular(
            block.omega * system, steps - block.omega * known, upper=False, unitriangular=True
        )
    seen = _within(block.place[..., None], mine[:, None], block.first[..., None], 0)
    kappa = weights(block.q, keys, old[:, None], memory)
    read = kappa @ written + weights(block.q, at, seen, memory) @ steps
    if memory.normalise:
        near = (places >= block.first[..., None]) & (places <= block.place[..., None])
        read = read / weights(block.q, keys, near[:, None], memory).sum(-1, keepdim=True)
    index = block.at[:, None, :, None].expand_as(steps)
    return read, written.scatter_add(2, index, steps)


def _within(reader: Tensor, writer: Tensor, first: Tensor, behind: int) -> Tensor:
    """(B, 1, N, m c): writes of tokens of the reader's document that are at least `behind` tokens before it."""
    return ((writer <= reader - behind) & (writer >= first))[:, None]


def _put(keys: Tensor, place: Tensor, k: Tensor) -> Tensor:
    return keys.scatter(2, place[:, None, :, None].expand_as(k), k)


def _take(x: Tensor, place: Tensor) -> Tensor:
    """(B, H, N, …) at places (B, N)."""
    return x.gather(2, place[:, None, :, None].expand(*x.shape[:2], -1, x.shape[3]))


def _tail(v: Tensor, place: Tensor, first: Tensor, memory: Kernel) -> Tensor | None:
    """The last c − 1 values of the last document, zeros before it."""
    if memory.window == 1:
        return None
    back = torch.arange(memory.window - 2, -1, -1, device=v.device)
    there = place[:, -1:] - back >= first[:, -1:]
    return torch.where(there[:, None, :, None], v[:, :, 1 - memory.window :], 0.0)


def _last(state: KernelState, first: Tensor) -> KernelState:
    """The memory of the last document alone, moved to the first place."""
    room = state.keys.shape[2]
    places = torch.arange(room, device=first.device) + first[:, None]
    here = (places < state.length[:, None])[:, None, :, None]
    keys, written = (torch.where(here, _take(x, places.clamp(max=room - 1)), 0.0) for x in (state.keys, state.written))
    return state._replace(length=(state.length - first).to(state.length.dtype), keys=keys, written=written)
