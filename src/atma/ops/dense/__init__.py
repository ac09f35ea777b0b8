"""What surrounds the mixers: linear layers on few rows, the RMS norm, the MLP's gate, and the optimiser's products.

PyTorch's operations, or compiled: one pass where they are several.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.backend import backend_for, recording
from atma.ops.dense import native

FEW_ROWS = 8
"""Rows up to which a linear layer is bound by reading its weights, and the compiled product of few rows is faster."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, I) · weightᵀ (O, I) + bias (O,) as F.linear. Few rows without gradient take the compiled product."""
    few = x.numel() <= FEW_ROWS * x.shape[-1] and x.dtype == weight.dtype
    if few and not recording() and not torch.is_autocast_enabled(x.device.type) and _native(x):
        return native.linear(x, weight, bias)
    return F.linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float) -> Tensor:
    """x (…, width) / sqrt(mean x² + epsilon) · weight (width,) over the last axis.

    In x's dtype; under autocast in its lower one, which is what the linear layers behind it would round it to.
    """
    device = x.device.type
    lowered = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    low = torch.get_autocast_dtype(device) if lowered else x.dtype
    if _native(x) and not recording():
        return native.rms_norm(x, weight, epsilon).to(low)
    if _native(x) and low in (x.dtype, torch.bfloat16):
        return native.rms_norm_recorded(x, weight, epsilon, lowered)
    return F.rms_norm(x, (width,), None if weight is None else weight.to(x.dtype), epsilon).to(low)


def gated_square(h: Tensor) -> Tensor:
    """g ⊙ relu(a)² of h = [a, g] (…, 2F) (maths.md, section 1). Returns (…, F)."""
    if _native(h):
        return native.gated_square(h)
    a, g = h.chunk(2, -1)
    return g * F.relu(a).square()


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    """F of the rounds P = a + b G + c G², F ← P F, G ← P G P from G = gram, F = 1 (Muon, maths.md, section 6).

    gram (…, n, n) symmetric, with at most one dimension before n. Compiled, only the lower halves are computed.
    """
    if gram.dtype in (torch.float32, torch.float64) and _native(gram):
        return native.newton_schulz(gram, coefficients, turns)
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


def _native(x: Tensor) -> bool:
    return backend_for("auto", x, "dense") == "native"


__all__ = ["gated_square", "linear", "newton_schulz", "rms_norm"]
