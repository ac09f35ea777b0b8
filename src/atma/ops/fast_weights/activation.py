"""The activation of a hidden layer together with its derivative, which inner gradients need of the same numbers.

By itself autograd would keep every step of both formulas for each token; here it keeps the input and the derivative.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROOT = math.sqrt(2 * math.pi)


def activated(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(x) and act′(x) of gelu (with erf) or silu."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return cast(Any, _Activated.apply(x, activation))
    return _plain(x, activation)


def _plain(x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act′ is Φ(x) + x Φ′(x), or σ(x) (1 + x (1 − σ(x)))."""
    if activation == "gelu":
        return F.gelu(x), 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-0.5 * x * x) / ROOT
    sigma = x.sigmoid()
    return F.silu(x), sigma * (1 + x * (1 - sigma))


def _curve(x: Tensor, activation: str) -> Tensor:
    """act″: Φ′(x) (2 − x²), or σ (1 − σ) (2 + x (1 − 2 σ))."""
    if activation == "gelu":
        square = x * x
        return torch.exp(-0.5 * square).mul_(square.neg_().add_(2)).div_(ROOT)
    sigma = x.sigmoid()
    return sigma * (1 - sigma) * (2 + x * (1 - 2 * sigma))


class _Activated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> tuple[Tensor, Tensor]:
        active, slope = _plain(x, activation)
        ctx.save_for_backward(x, slope)
        ctx.activation = activation
        return active, slope

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_active: Tensor, of_slope: Tensor) -> tuple[Tensor, None]:
        x, slope = ctx.saved_tensors
        return torch.addcmul(of_active * slope, of_slope, _curve(x, ctx.activation)), None
