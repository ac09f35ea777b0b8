"""The neural memory in chunks (mixers.md, section 4.4): the pieces of a grid one after another, their tokens at once.

Inside a chunk gradients are taken at one anchor, so that all reads of a piece are masked products of its tokens, and no
token has weights of its own (masked.py). Where a token's read is no sum over gradients, with Newton–Schulz and kl, the
weights of one piece are formed at once (spread.py). Chunks that are written at their end need neither (at_end.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atma.ops.fast_weights import reference
from atma.ops.fast_weights.at_end import collected
from atma.ops.fast_weights.at_once import Scan, at_once
from atma.ops.fast_weights.boundary import renewed, written
from atma.ops.fast_weights.kernel import Kernel, KernelState, folded, token_by_token, unfolded
from atma.ops.fast_weights.kernel_blocks import kernel_blocks
from atma.ops.fast_weights.masked import masked
from atma.ops.fast_weights.pieces import Grid, Piece, grid_of, joined, pieces
from atma.ops.fast_weights.rule import Gates, Memory, Rule
from atma.ops.fast_weights.scan import scan
from atma.ops.fast_weights.spread import spread
from atma.ops.fast_weights.state import MemoryState, chosen, empty

Form = Callable[[Piece, Memory, MemoryState], tuple[Tensor, MemoryState]]


def fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """Arguments and results of the reference, in chunks; what `_token_by_token` names is the reference's own."""
    return in_chunks(scan, (q, k, v, gates), memory, state, segment_ids)


def in_chunks(
    by: Scan,
    tokens: tuple[Tensor, Tensor, Tensor, Gates],
    memory: Memory,
    state: MemoryState,
    segment_ids: Tensor | None,
) -> tuple[Tensor, MemoryState]:
    """`fast_weights` with a scan of one's own."""
    q, k, v, gates = tokens
    before = state
    given = q, k, v, *gates, *state.weights
    if q.shape[2] == 1 or _token_by_token(memory.rule) or _broken(given):
        return reference.fast_weights(q, k, v, gates, memory, state, segment_ids)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    grid = grid_of(state.length, q.shape[2], memory.rule.chunk, segment_ids)
    if _at_once(memory.rule):
        read, state = at_once(by, (q, k, v, gates), memory, state, grid, segment_ids)
    else:
        read, state = _one_by_one(pieces(q, k, v, gates, grid), memory, state, grid)
    # Behind a boundary W̄ and A are one tensor; a state's parts share none.
    state = state._replace(anchor=tuple(w.clone() for w in state.anchor))
    return read, _apart(state, before) if torch.is_grad_enabled() else state


def _apart(after: Any, before: Any) -> Any:
    """`after` with copies of what is still `before`'s own: with gradients that one is kept, and a step without them
    overwrites what it is given."""
    if after is None or isinstance(after, Tensor):
        return after.clone() if isinstance(after, Tensor) and after is before else after
    parts = [_apart(one, other) for one, other in zip(after, before, strict=True)]
    return type(after)(*parts) if hasattr(after, "_fields") else tuple(parts)


def _one_by_one(each: list[Piece], memory: Memory, state: MemoryState, grid: Grid) -> tuple[Tensor, MemoryState]:
    """Reads and state of pieces that are read as they are written."""
    fresh, reads = None if grid.begun is None else empty(memory, len(state.length)), []
    form = _form(memory.rule)
    for n, piece in enumerate(each):
        if fresh is not None and grid.begun is not None:
            state = chosen(grid.begun[:, n], fresh, state)
        read, state = form(piece, memory, state)
        state = state._replace(length=state.length + piece.here.sum((1, 2, 3)).to(state.length.dtype))
        state = _at_boundary(grid.ends[:, n], memory, state)
        reads.append(read)
    return joined(torch.cat(reads), grid), state


def _at_once(rule: Rule) -> bool:
    """Whether reads are products of a few numbers a token, so that they can wait for the scan of all pieces."""
    plain = rule.granularity == "token" and rule.gates == "head"
    return plain and rule.optimiser != "muon" and rule.retention != "kl"


def kernel_memory(
    q: Tensor, k: Tensor, v: Tensor, omega: Tensor, memory: Kernel, state: KernelState, segment_ids: Tensor | None
) -> tuple[Tensor, KernelState]:
    """Arguments and results of the reference, in blocks."""
    state = unfolded(state)
    alone = q.shape[2] == 1 or _broken((q, k, v, omega, state.keys, state.written))
    form = token_by_token if alone else kernel_blocks
    read, after = form(q, k, v, omega, memory, state, segment_ids)
    return read, folded(after)


def _token_by_token(rule: Rule) -> bool:
    """Whether a piece is no product: chunks of one token, and of anchor = hidden all but section 4.5's system."""
    system = rule.bias in ("l2", "dot") and rule.optimiser == "gd" and rule.gates == "head"
    system = system and rule.window == 1 and not rule.norm
    return rule.chunk == 1 or (rule.anchor == "hidden" and not system)


def _broken(given: tuple[Tensor | None, ...]) -> bool:
    """Whether a number is none: 0 · NaN is NaN, so that in a piece's products it would reach back to tokens before."""
    if torch.compiler.is_compiling():
        return False
    return not all(bool(torch.isfinite(x.detach().sum())) for x in given if x is not None)


def _form(rule: Rule) -> Form:
    """What computes a piece: under autograd, where a piece holds more than a few numbers a token, again when asked."""
    if rule.granularity == "chunk":
        return collected
    if rule.optimiser == "muon" or rule.retention == "kl":
        return _again(spread)
    return _again(masked)


def _again(form: Form) -> Form:
    """Keep a piece's arguments alone for the gradient, and compute it a second time there."""
    if not torch.is_grad_enabled():
        return form
    return lambda piece, memory, state: checkpoint(  # pyright: ignore
        form, piece, memory, state, use_reentrant=False, preserve_rng_state=False
    )


def _at_boundary(ends: Tensor, memory: Memory, state: MemoryState) -> MemoryState:
    """The state behind a piece, in the rows (B,) where it ends at a boundary of the grid."""
    crossed = renewed if memory.rule.granularity == "token" else written
    if torch.compiler.is_compiling():
        return chosen(ends, crossed(memory, state), state)
    if not bool(ends.any()):
        return state
    after = crossed(memory, state)
    return after if bool(ends.all()) else chosen(ends, after, state)


__all__ = ["fast_weights", "kernel_memory"]
