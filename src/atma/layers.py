"""The small layers every mixer and block is made of."""

import math

import torch
from torch import Tensor, nn

from atma.ops.dense import gated_square, linear, rms_norm


class Linear(nn.Linear):
    """x · weightᵀ + bias, with the compiled product where few rows are read without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a learned weight."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.weight.shape[0], self.epsilon)


class MLP(nn.Module):
    """a, g = split(in_proj(x)); y = out_proj(g ⊙ relu(a)²) (maths.md, section 1)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.in_proj = Linear(width, 2 * inner)
        self.out_proj = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(gated_square(self.in_proj(x)))


def init_linear(layer: nn.Linear, generator: torch.Generator | None, zero: bool = False) -> None:
    """Weights uniform in ±1/√(inputs), or zero for an output projection; biases zero."""
    bound = 0.0 if zero else 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
