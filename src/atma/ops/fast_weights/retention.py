"""How a memory forgets: the decay Γ, and ρ between what is written and what is read (mixers.md, section 4.6)."""

import torch
from torch import Tensor

from atma.ops.fast_weights.network import Weights
from atma.ops.fast_weights.rule import Memory, Rule


def along(gate: Tensor, matrix: int, rule: Rule) -> Tensor:
    """A gate of one token (B, H, …) as it multiplies a matrix, W₁ being 0: a number for each head, for each matrix, or
    for each place of the axis of size V, which is W₁'s rows and the others' columns."""
    if gate.ndim == 2:
        return gate[..., None, None]
    if rule.gates == "matrix":
        return gate[..., matrix, None, None]
    return gate[..., None] if matrix == 0 else gate[..., None, :]


def decayed(weights: Weights, keep: Tensor | None, memory: Memory) -> Weights:
    """Γ(A) = γ A, or W⁰ + γ (A − W⁰)."""
    if keep is None:
        return weights
    gammas = [along(keep, i, memory.rule) for i in range(len(weights))]
    if memory.rule.decay_to == "zero":
        return tuple(gamma * a for gamma, a in zip(gammas, weights, strict=True))
    return tuple(w + gamma * (a - w) for gamma, a, w in zip(gammas, weights, memory.initial, strict=True))


def retained(weights: Weights, scale: Tensor | None, rule: Rule) -> Weights:
    """ρ(A), of lq with the numbers κ (B, H, matrices): what is read, and at a boundary the new anchor."""
    if rule.retention == "kl":
        return tuple(a.shape[-1] * a.softmax(-1) for a in weights)
    if scale is None:
        return weights
    return tuple(scale[..., i, None, None] * a for i, a in enumerate(weights))


def scale_of(weights: Weights, rule: Rule) -> Tensor | None:
    """κ = ‖A‖_q^{−(q−2)} (…, matrices) of lq, the norm over all entries of a matrix; None for other retentions."""
    if rule.retention != "lq":
        return None
    norms = [torch.linalg.vector_norm(a, rule.q, dim=(-2, -1)) for a in weights]
    return torch.stack(norms, -1) ** (2 - rule.q)


def renormed(weights: Weights, memory: Memory) -> Weights:
    """Every row as long as it was at first: A_r ‖W⁰_r‖/(‖A_r‖ + 1e-5) (4.15)."""
    return tuple(a * _rows(w) / (_rows(a) + 1e-5) for a, w in zip(weights, memory.initial, strict=True))


def _rows(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=-1, keepdim=True)
