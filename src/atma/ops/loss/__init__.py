"""Cross-entropy of soft-capped logits from the hidden states, the logits of one block at a time."""

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation

NOT_SCORED = -100
"""The target of a token that is not scored: no loss and no gradient."""


def softcap(z: Tensor, cap: float) -> Tensor:
    """cap · z / sqrt(z² + cap²): slope 1 at 0, bounded by ±cap; z itself for the cap 0, which is none."""
    return z * (cap * (z.square() + cap * cap).rsqrt()) if cap else z


def softcap_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float = 15.0, backend: str = "auto"
) -> Tensor:
    """Nats of each target under softmax(softcap(hidden · weightᵀ + bias)) (maths.md, section 1).

    hidden (…, D); weight (V, D); bias (V,) or None; targets (…) int64 in [0, V), or −100: loss 0, no gradient. cap 0:
    none. Returns (…) float32 (float64 for float64). On CPU, targets outside are a ValueError.
    """
    check_tensors("hidden weight bias", hidden, weight, bias)
    if hidden.ndim < 2 or weight.ndim != 2 or 0 in weight.shape or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} must be (…, D) and (V, D), neither D nor V 0")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be {tuple(weight.shape[:1])}, a number for each target, not {tuple(bias.shape)}")
    check_indices("targets", targets, tuple(hidden.shape[:-1]), hidden.device)
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        if high >= weight.shape[0] or (low < 0 and low != NOT_SCORED):
            raise ValueError(f"targets must be in [0, {weight.shape[0]}) or {NOT_SCORED}; found {low} to {high}")
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; they must be of one dtype")
    chosen = implementation("loss", backend_for(backend, hidden, "loss"))
    return chosen.losses(hidden.flatten(0, -2), weight, bias, targets.flatten(), cap).view(targets.shape)


__all__ = ["NOT_SCORED", "softcap", "softcap_loss"]
