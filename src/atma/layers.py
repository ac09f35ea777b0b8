"""The small layers every mixer and block is made of."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from atma.ops.dense import Gate, gated, linear, rms_norm


class Linear(nn.Linear):
    """x · weightᵀ + bias, with the compiled product where few rows are read without gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a learned weight, or one plus it (Gemma's form)."""

    def __init__(self, width: int, epsilon: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.epsilon, self.plus_one = epsilon, plus_one

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.plus_one else self.weight
        return rms_norm(x, weight, weight.shape[0], self.epsilon)


class MLP(nn.Module):
    """a, g = split(in_proj(x)); y = out_proj(g ⊙ φ(a)) (maths.md, section 1); `gate` names φ."""

    def __init__(self, width: int, inner: int, gate: Gate = "square", bias: bool = True) -> None:
        super().__init__()
        self.gate: Gate = gate
        self.in_proj = Linear(width, 2 * inner, bias)
        self.out_proj = Linear(inner, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(gated(self.in_proj(x), self.gate))


def init_linear(layer: nn.Linear, generator: torch.Generator | None, zero: bool = False) -> None:
    """Weights uniform in ±1/√(inputs), or zero for an output projection; biases zero."""
    bound = 0.0 if zero else 1 / math.sqrt(layer.in_features)
    nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class without_init(TorchFunctionMode):
    """Within it parameters are not drawn: for a model whose weights are read next, which takes a large one seconds."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
