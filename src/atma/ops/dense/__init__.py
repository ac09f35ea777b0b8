"""What surrounds the mixers: linear layers on few rows, the RMS norm, the MLP's gate. PyTorch, or one compiled pass."""

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
    """x (…, width) / sqrt(mean x² + epsilon) · weight (width,) over the last axis."""
    if not recording() and _native(x):
        return native.rms_norm(x, weight, epsilon)
    return F.rms_norm(x, (width,), weight, epsilon)


def gated_square(h: Tensor) -> Tensor:
    """g ⊙ relu(a)² of h = [a, g] (…, 2F) (maths.md, section 1). Returns (…, F)."""
    if _native(h):
        return native.gated_square(h)
    a, g = h.chunk(2, -1)
    return g * F.relu(a).square()


def _native(x: Tensor) -> bool:
    return backend_for("auto", x, "dense") == "native"


__all__ = ["gated_square", "linear", "rms_norm"]
