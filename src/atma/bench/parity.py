"""Whether a thing computes what it should, against float64: asked before anything is timed.

The measure is the root mean square error of each output and each gradient. In float32, 1e-4 of max(1, rms of the exact
value) is allowed, as in the project's tests; in lower precision, a multiple of the error that the plain reference makes
in that precision, or one rounding of the exact value, or of a rounding of the largest (an exact 0 has none of its own).
The exact values are computed in float64 on the device that is asked about: at full size a CPU would take minutes.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-4
FORWARD, GRADIENT = 2.0, 4.0
"""How many times the plain reference's error outputs and gradients in low precision may have."""

PEER_SLACK = 4.0
"""Peers are to be the same function, not to keep our promises: their errors in low precision may be larger."""

Outputs = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Way(NamedTuple):
    """How a thing is computed: in which dtype, where, with gradients or without, and how much slack it has."""

    dtype: torch.dtype
    device: torch.device
    with_gradients: bool = False
    slack: float = 1.0

    def of_peer(self) -> "Way":
        return self._replace(slack=PEER_SLACK)


def evaluate(outputs: Outputs, tensors: Sequence[Tensor], with_gradients: bool) -> list[Tensor]:
    """The outputs, and after them the gradients of a fixed random sum of them with respect to every tensor, as float64
    on the CPU."""
    if not with_gradients:
        with torch.no_grad():
            return [x.detach().double().cpu() for x in outputs(tensors)]
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    with torch.enable_grad():
        found = outputs(leaves)
        total = torch.zeros((), dtype=torch.float64, device=found[0].device)
        for i, x in enumerate(found):
            weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            total = total + (x.double() * weights.to(x.device)).sum()
        gradients = torch.autograd.grad(total, leaves)
    return [x.detach().double().cpu() for x in (*found, *gradients)]


def compare(what: str, found: Outputs, exact: Outputs, tensors: Sequence[Tensor], way: Way) -> None:
    """ValueError unless `found` gives, in this way, what `exact` gives on the float64 `tensors`.

    Tensors of one dimension stay float32. Their gradients are long sums that cancel: low precision leaves them out.
    """
    dtype, device, with_gradients, slack = way
    low = [x.to(device, dtype) if x.dim() > 1 else x.to(device, torch.float32) for x in tensors]
    truth = evaluate(exact, [x.to(device) for x in tensors], with_gradients)
    values = evaluate(found, low, with_gradients)
    if dtype in (torch.float32, torch.float64):
        allowed = [TOLERANCE * max(1.0, rms(x)) for x in truth]
    else:
        rough = evaluate(exact, low, with_gradients)
        outputs = len(truth) - with_gradients * len(tensors)
        eps, largest = torch.finfo(dtype).eps, max(rms(x) for x in truth)
        allowed = [
            max(slack * (FORWARD if i < outputs else GRADIENT) * rms(a - b), eps / 2 * rms(b), eps * eps / 4 * largest)
            if i < outputs or b.dim() > 1
            else float("inf")
            for i, (a, b) in enumerate(zip(rough, truth, strict=True))
        ]
    require(what, values, truth, allowed)


def require(what: str, found: Sequence[Tensor], exact: Sequence[Tensor], allowed: Sequence[float]) -> None:
    """ValueError unless every value is as near to the exact one as allowed."""
    for a, b, most in zip(found, exact, allowed, strict=True):
        error = rms(a - b)
        if not error <= most:
            raise ValueError(
                f"no figures: {what} is {error:.1e} (rms) off its float64 reference; {most:.1e} is allowed"
            )


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def draw(shape: Sequence[int], seed: int) -> Tensor:
    """Normal float64 numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
