"""What a neural memory remembers between calls (mixers.md, section 4.12). All of it is carried, nothing grows."""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from atma.ops.fast_weights.network import Weights
from atma.ops.fast_weights.retention import retained, scale_of
from atma.ops.fast_weights.rule import Memory

S = TypeVar("S")


class MemoryState(NamedTuple):
    """Float32 or wider. Weights are one (B, H, rows, columns) per matrix; what a rule does not need is None."""

    length: Tensor  # (B,) int32: where on the grid a row stands
    anchor: Weights  # W̄: where inner gradients are taken
    weights: Weights  # A, of kl the dual; with writes at chunk ends W, which is read
    momentum: Weights | None = None  # S, with momentum and muon
    scale: Tensor | None = None  # κ (B, H, matrices), lq
    k_tail: Tensor | None = None  # (B, H, c − 1, K′), the oldest first, c > 1
    v_tail: Tensor | None = None  # (B, H, c − 1, V)
    pending: Weights | None = None  # U of the half-finished chunk, with writes at chunk ends, as all that follows
    pending_momentum: Tensor | None = None  # Σ η (B, H), with channel gates (B, H, V)
    pending_keep: Tensor | None = None  # Π γ, likewise
    pending_step: Tensor | None = None  # Σ θ (B, H), with a step for each matrix (B, H, matrices), muon and l2


def shapes(memory: Memory, batch: int) -> dict[str, list[tuple[int, ...]]]:
    """The shapes of the tensors of every field that the memory needs."""
    rule, each = memory.rule, [(batch, *w.shape) for w in memory.initial]
    head, width, inner, tail = each[0][:2], each[0][2], each[-1][-1], rule.window - 1
    gate = (*head, width) if rule.gates == "channel" else head
    step = (*head, rule.matrices) if rule.gates == "matrix" else gate
    momentum, ends = rule.optimiser != "gd", rule.granularity == "chunk"
    found = {"length": [(batch,)], "anchor": each, "weights": each}
    found |= {"momentum": each} if momentum else {}
    found |= {"scale": [(*head, rule.matrices)]} if rule.retention == "lq" else {}
    found |= {"k_tail": [(*head, tail, inner)], "v_tail": [(*head, tail, width)]} if tail else {}
    found |= {"pending": each, "pending_keep": [gate]} if ends else {}
    found |= {"pending_momentum": [gate]} if ends and momentum else {}
    return found | ({"pending_step": [step]} if rule.step_at_end else {})


def empty(memory: Memory, batch: int) -> MemoryState:
    """Before the first token of `batch` rows: A = W⁰, W̄ = ρ(W⁰), nothing behind it (mixers.md, sections 4.3 and 4.8).

    In the dtype of W⁰, float32 or wider, and differentiable to it.
    """
    rule = memory.rule
    work = torch.promote_types(memory.initial[0].dtype, torch.float32)
    weights = tuple(w.to(work).repeat(batch, 1, 1, 1) for w in memory.initial)
    held: dict[str, Any] = {
        name: tuple(map(weights[0].new_zeros, each)) for name, each in shapes(memory, batch).items()
    }
    state = MemoryState(**{name: parts if name in _WEIGHTS else parts[0] for name, parts in held.items()})
    scale = scale_of(weights, rule)
    return state._replace(
        length=state.length.int(),
        anchor=tuple(w.clone() for w in retained(weights, scale, rule)),
        weights=weights,
        scale=scale,
        pending_keep=None if state.pending_keep is None else state.pending_keep + 1,
    )


_WEIGHTS = ("anchor", "weights", "momentum", "pending")


def chosen(rows: Tensor, new: S, old: S) -> S:
    """The state `new` in the rows (B,) that are true, `old` in the others."""
    if old is None:
        return old
    if isinstance(old, Tensor):
        return torch.where(rows.view(-1, *[1] * (old.ndim - 1)), new, old)  # pyright: ignore
    parts = [chosen(rows, a, b) for a, b in zip(new, old, strict=True)]  # pyright: ignore
    return type(old)(*parts) if hasattr(old, "_fields") else tuple(parts)  # pyright: ignore
