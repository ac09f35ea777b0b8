"""PyTorch's own operations, on any device and for any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float, low: torch.dtype) -> Tensor:
    return F.rms_norm(x, (width,), None if weight is None else weight.to(x.dtype), epsilon).to(low)


def gated(h: Tensor, kind: str) -> Tensor:
    a, g = h.chunk(2, -1)
    if kind == "square":
        return g * F.relu(a).square()
    return g * (F.silu(a) if kind == "silu" else F.gelu(a, approximate="tanh"))


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    (a, b, c), factor = coefficients, None
    add_product = torch.addmm if gram.ndim == 2 else torch.baddbmm
    for turn in range(turns):
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if turn + 1 < turns:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    return factor
