"""What surrounds the mixers: linear layers on few rows, the RMS norm, the MLP's gate, and the optimiser's products.

PyTorch's operations, or compiled: one pass where they are several.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.backend import backend_for, implementation, recording
from atma.ops.dense import cpu

Gate = Literal["square", "silu", "gelu"]
"""Of an MLP (`gated`)."""
FEW_ROWS = 8
"""Rows up to which a linear layer is bound by reading its weights, and the compiled product of few rows is faster."""
LARGE, FEW_OF_LARGE = 1 << 18, 16
"""Numbers of a weight that no near cache holds, which is read for longer: for up to so many rows."""
FEW_WIDENED = 32
"""The same for a weight in bfloat16 on a processor without products of it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, I) · weightᵀ (O, I) + bias (O,) as F.linear. Without gradient few rows take the compiled product.

    PyTorch's product of bfloat16 is made in float32 where the processor has none (`cpu.linear`).
    """
    if recording() or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    few = FEW_WIDENED if cpu.widens(x) else FEW_OF_LARGE if weight.numel() >= LARGE else FEW_ROWS
    return (_of(x) if x.numel() <= few * x.shape[-1] else cpu).linear(x, weight, bias)


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float) -> Tensor:
    """x (…, width) / sqrt(mean x² + epsilon) · weight (width,) over the last axis.

    In x's dtype; under autocast in its lower one, which is what the linear layers behind it would round it to.
    """
    device = x.device.type
    lowered = x.dtype == torch.float32 and torch.is_autocast_enabled(device)
    low = torch.get_autocast_dtype(device) if lowered else x.dtype
    taken = not recording() or low in (x.dtype, torch.bfloat16)  # with a gradient, no other is compiled
    chosen = _of(x) if taken else implementation("dense", "cpu")
    return chosen.rms_norm(x, weight, width, epsilon, low)


def gated(h: Tensor, kind: Gate = "square") -> Tensor:
    """g ⊙ φ(a) of h = [a, g] (…, 2F) (maths.md, section 1). Returns (…, F).

    kind: φ is relu(a)² ("square"), a σ(a) ("silu") or the tanh form of GELU ("gelu").
    """
    return _of(h).gated(h, kind)


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    """F of the rounds P = a + b G + c G², F ← P F, G ← P G P from G = gram, F = 1 (Muon, maths.md, section 6).

    gram (…, n, n) symmetric, with at most one dimension before n. Compiled, only the lower halves are computed.
    """
    taken = gram.dtype in (torch.float32, torch.float64)
    chosen = _of(gram) if taken else implementation("dense", "cpu")
    return chosen.newton_schulz(gram, coefficients, turns)


def _of(x: Tensor) -> Any:
    return implementation("dense", backend_for("auto", x, "dense"))


__all__ = ["Gate", "gated", "linear", "newton_schulz", "rms_norm"]
