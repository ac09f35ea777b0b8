"""The network whose weights are fast, and the gradients of its inner loss in closed form (mixers.md, section 4.4).

Of one token the gradient of each matrix is e zᵀ. All here takes N tokens of every head side by side: weights
(B, H, rows, columns), inputs x (B, H, N, K′) and values v (B, H, N, V).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.fast_weights.activation import activated
from atma.ops.fast_weights.rule import Memory, Rule

EPSILON = 1e-6
"""ε, in the layer norm and under the roots of the inner losses."""

Weights = tuple[Tensor, ...]


Product = Callable[[int, Tensor], Tensor]
"""Of a matrix, W₁ being 0, and N inputs side by side: each input times the matrix."""


def network(weights: Weights, x: Tensor, memory: Memory) -> Tensor:
    """f(W; x) = J x + N(core(W; x)) (4.1), (B, H, N, V)."""
    return applied(_by(weights), x, memory)


def applied(product: Product, x: Tensor, memory: Memory) -> Tensor:
    """f of weights that are known by their products alone."""
    return output(product(0, hidden(product, x, memory.rule)), x, memory)


def gradients(weights: Weights, x: Tensor, v: Tensor, delta: Tensor | None, memory: Memory) -> list[tuple[Tensor, ...]]:
    """(e, z) of each matrix, of ∇_W ℓ(f(W; x), v) = e zᵀ: (B, H, N, rows) and (B, H, N, columns)."""
    rule = memory.rule
    layer = hidden_layer(weights, x, rule)
    core = layer.h @ weights[0].mT
    e = _through_norm(_at_output(output(core, x, memory), v, delta, rule), core, memory)
    if rule.normalised:
        e = e * share_of(layer.h)
    return [(e, layer.h)] if rule.network == "matrix" else [(e, layer.h), *behind(layer, e @ weights[0], x)]


def share_of(h: Tensor) -> Tensor:
    """1/max(1, ‖h‖²), (…, 1), of a normalised rule."""
    return 1 / h.square().sum(-1, keepdim=True).clamp(min=1)


class Layer(NamedTuple):
    """h, and of a network what the gradients of W₂ and W₃ need; of a matrix alone h is x."""

    h: Tensor
    active: Tensor | None = None  # act(W̄₂ x)
    slope: Tensor | None = None  # act′(W̄₂ x)
    side: Tensor | None = None  # W̄₃ x


def hidden_layer(weights: Weights, x: Tensor, rule: Rule) -> Layer:
    """What W₁ takes, at an anchor."""
    if rule.network == "matrix":
        return Layer(x)
    active, slope = activated(x @ weights[1].mT, rule.activation)
    if rule.network == "mlp":
        return Layer(active, active, slope)
    side = x @ weights[2].mT
    return Layer(active * side, active, slope, side)


def behind(layer: Layer, back: Tensor, x: Tensor) -> list[tuple[Tensor, ...]]:
    """(e, z) of W₂ and W₃, of back = W̄₁ᵀ e₁ (B, H, N, E); of a matrix alone none."""
    if layer.slope is None or layer.active is None:
        return []
    if layer.side is None:
        return [(back * layer.slope, x)]
    return [(back * layer.slope * layer.side, x), (back * layer.active, x)]


def hidden(product: Product, x: Tensor, rule: Rule) -> Tensor:
    """h, which W₁ takes."""
    if rule.network == "matrix":
        return x
    h = _activation(product(1, x), rule)
    return h if rule.network == "mlp" else h * product(2, x)


def _by(weights: Weights) -> Product:
    return lambda i, x: x @ weights[i].mT


def _activation(x: Tensor, rule: Rule) -> Tensor:
    return F.gelu(x) if rule.activation == "gelu" else F.silu(x)


def output(core: Tensor, x: Tensor, memory: Memory) -> Tensor:
    """J x + N(core)."""
    f = core
    if memory.rule.norm:
        assert memory.gain is not None and memory.shift is not None
        f = memory.gain[:, None] * _normed(core)[0] + memory.shift[:, None]
    if memory.rule.residual == "none":
        return f
    return f + (x if memory.skip is None else by_head(x, memory.skip))


def by_head(x: Tensor, matrix: Tensor) -> Tensor:
    """x (B, H, N, K) times a slow matrix of each head, (H, V, K): one product for all rows, which share it."""
    if x.shape[0] == 1 or x.shape[2] == 1:
        return x @ matrix.mT
    return (x.transpose(0, 1).flatten(1, 2) @ matrix.mT).unflatten(1, (x.shape[0], -1)).transpose(0, 1)


def _normed(core: Tensor) -> tuple[Tensor, Tensor]:
    """(core − mean)/√(variance + ε) over V, and the root."""
    centred = core - core.mean(-1, keepdim=True)
    root = (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt()
    return centred / root, root


def _through_norm(e: Tensor, core: Tensor, memory: Memory) -> Tensor:
    """e₁ = ∂ℓ/∂core of e = ∂ℓ/∂f: with n the normed core and d = gain ⊙ e, (d − mean d − n mean(d ⊙ n))/root."""
    if not memory.rule.norm:
        return e
    assert memory.gain is not None
    n, root = _normed(core)
    d = memory.gain[:, None] * e
    return (d - d.mean(-1, keepdim=True) - n * (d * n).mean(-1, keepdim=True)) / root


def _at_output(f: Tensor, v: Tensor, delta: Tensor | None, rule: Rule) -> Tensor:
    """e = ∂ℓ/∂f, the table of section 4.2; δ (B, H, 1, 1 or V)."""
    r = f - v
    if rule.bias == "dot":
        return -v
    if rule.bias == "l2":
        return r
    if rule.bias == "lp":
        return r * (r.square() + EPSILON) ** ((rule.p - 2) / 2)
    assert delta is not None
    if rule.bias == "huber_coordinate":
        return torch.minimum(torch.maximum(r, -delta), delta)
    squared = r.square().sum(-1, keepdim=True)
    if rule.bias == "huber":
        return r * delta / torch.maximum(delta.square(), squared).sqrt()
    return torch.where(squared <= delta.square(), r, delta * r / (r.square() + EPSILON).sqrt())
