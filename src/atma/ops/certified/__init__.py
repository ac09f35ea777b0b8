"""Attention that reads less and says by how much it may be wrong (mixers.md, section 6.7).

`certificate` bounds what polar attention changes by leaving groups of keys unread. `shadow_attention` reads every key
and value in 8 bits, and exactly those of which the bound asks it; `shadow_statistics` reads the 8 bits alone, for any
core.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_tensors, implementation, own_precision, recording
from atma.ops.certified.bounds import Certified, Groups, bar, box_bound, certificate
from atma.ops.certified.shadows import MOST_WIDTH, Held, Quantised, Shadows, empty, hold, quantise
from atma.ops.paged.pages import Pages

TOLERANCES = 0.05, 0.02
"""Of the direction and of the magnitude."""


class Certificate(NamedTuple):
    """What is certain of each query and head, (B, H, T)."""

    direction_error: Tensor
    """‖c − c′‖ at the most, in lengths of a unit vector."""
    magnitude_error: Tensor
    """|μ − μ′| at the most."""
    read: Tensor
    """int32: the keys that were read exactly; where it is all that the query sees, both errors are 0."""


@own_precision
def shadow_attention(
    q: Tensor,
    k: Held,
    v: Held,
    shadows: Shadows,
    scale: Tensor,
    null_logit: Tensor,
    magnitude_slope: Tensor,
    null_value: Tensor,
    first: Tensor,
    last: Tensor,
    tolerances: tuple[float, float] = TOLERANCES,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Certificate]:
    """Polar attention of shadows, and of the exact keys and values where its bounds would be above the tolerances.

    q (B, H, T, K); k, v (B, G, S, K) or pages, and their `Shadows`; scale t/√K and null_logit t ν (B, H, T), float32 or
    wider; magnitude_slope (H,) and null_value (H, K) as in `polar_attention`; query i of row b sees the keys
    first[b, i] ≤ s < last[b, i], (B, T) int32. tolerances: of direction and magnitude; with 0 everything is read
    exactly, and `Certificate.read` says so. Returns direction (B, H, T, K) and magnitude (B, H, T) in q's dtype, and
    the certificate. Inference only; the bounds are of mathematics and of the rounding of products and exponentials,
    not of the other rounding that every order of additions has.
    """
    check_tensors("q scale null_logit magnitude_slope null_value", q, scale, null_logit, magnitude_slope, null_value)
    check_tolerances(tolerances)
    if recording() and q.requires_grad:
        raise ValueError("shadow_attention has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    chosen = _backend(backend, q)
    numbers = [scale, null_logit, magnitude_slope, null_value]
    if chosen == "native":
        numbers = [x.to(torch.float32) for x in numbers]
        exact = [x.pool if isinstance(x, Pages) else x for x in (k, v)]
        if not exact[0].dtype == exact[1].dtype == q.dtype:
            q = q.to(exact[0].dtype)
    else:
        numbers = [x.to(scale.dtype) for x in numbers]
    attention = implementation("certified", chosen).attention
    c, magnitude, *certain = attention(q, k, v, shadows, tuple(numbers), first, last, tolerances)
    return c.to(q.dtype), magnitude.to(q.dtype), Certificate(*certain)


@own_precision
def shadow_statistics(
    q: Tensor, shadows: Shadows, scale: Tensor, first: Tensor, last: Tensor, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistics S (B, H, T, K), L, Q and M (B, H, T) of the keys and values of the shadows, nothing read exactly.

    Arguments as in `shadow_attention`; the results are those that `atma.ops.polar.statistics_of` gives of the keys and
    values that the shadows stand for, so `fold` makes polar attention of them and S / L is softmax attention.
    """
    check_tensors("q scale", q, scale)
    chosen = _backend(backend, q)
    given = scale.to(torch.float32) if chosen == "native" else scale
    return implementation("certified", chosen).statistics(q, shadows, given, first, last)


def check_tolerances(tolerances: tuple[float, float]) -> None:
    """ValueError unless both are numbers of at least 0."""
    for name, value in zip(("direction_tolerance", "magnitude_tolerance"), tolerances, strict=True):
        if not 0 <= value <= math.inf:
            raise ValueError(f"{name} must be at least 0 (0: everything is read exactly), not {value}")


def _backend(name: str, q: Tensor) -> str:
    """Compiled for float32 and bfloat16, and heads of at most MOST_WIDTH channels; the reference otherwise."""
    if q.dtype == torch.float64 or q.shape[-1] > MOST_WIDTH:
        if name == "native":
            raise ValueError(f"the native backend takes no {q.dtype} of {q.shape[-1]} channels; leave it out")
        name = "reference"
    return backend_for(name, q, "certified")


__all__ = [
    "TOLERANCES",
    "Certificate",
    "Certified",
    "Groups",
    "Quantised",
    "Shadows",
    "bar",
    "box_bound",
    "certificate",
    "check_tolerances",
    "empty",
    "hold",
    "quantise",
    "shadow_attention",
    "shadow_statistics",
]
