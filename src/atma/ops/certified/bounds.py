"""What polar attention can have changed by not reading some keys, bounded from what is known of them (mixers.md, 6.7).

Keys are read, or stand in groups of which only a range of logits and the size of the values are known. The null sink
gives every mass a scale that is there before anything is read, so that both outputs get a bound: the chord of the
direction, the distance of the magnitude. Masses are relative to the largest exponent met, x: e = exp(a − x), and the
null's is ζ = exp(a_N − x).
"""

from typing import NamedTuple

import torch
from torch import Tensor

CLAMP = 1e-6
"""τ: a direction is D/max(‖D‖, τ (ζ + L))."""


class Groups(NamedTuple):
    """Groups of keys that are not read; floating tensors (…, P)."""

    count: Tensor
    """Keys of each."""
    low: Tensor
    """No key's logit is less; −inf where nothing is known."""
    high: Tensor
    """No key's logit is more."""
    norm: Tensor
    """V: no value is longer."""
    value_sum: Tensor | None = None
    """v̂ (…, P, K): the sum of the values; with `norm_sum` it stands for them."""
    norm_sum: Tensor | None = None
    """N: the sum of the lengths of the values."""


class Masses(NamedTuple):
    """Sums over what is read, and what bounds those over what is not; D (…, K), all else (…)."""

    L: Tensor
    Q: Tensor
    D: Tensor
    """Of what is read, and of what stands for what is not; the null's value is in it."""
    null: Tensor
    """ζ."""
    most: Tensor
    """Λ, and the three beside it of (6.2): the masses not read at the most and at the least, and those of squares."""
    least: Tensor
    most_squares: Tensor
    least_squares: Tensor
    slack: Tensor
    """‖D − that of all keys‖ at the most: Σ_V, or Σ_S where summaries stand for what is not read."""


class Certified(NamedTuple):
    """Polar attention of part of the keys, and bounds of what the others change; direction (…, K), all else (…)."""

    direction: Tensor
    magnitude: Tensor
    direction_error: Tensor
    """‖c − c′‖ at the most (C2); 2, which is always true, where nothing better can be said."""
    magnitude_error: Tensor
    """|μ − μ′| at the most (C3)."""
    variation: Tensor
    """½ Σ |w − w′| over all keys and the null at the most (C1), with nothing standing for what is not read."""
    null_weight: tuple[Tensor, Tensor]
    """The least and the most that the null's weight can be."""


def certificate(
    logits: Tensor, values: Tensor, groups: Groups, null_logit: Tensor, null_value: Tensor, kappa: Tensor
) -> Certified:
    """What is read, as polar attention computes it, with bounds of what the groups would change (6.1)–(6.4).

    logits (…, n) and values (…, n, K) of the keys read (n may be 0); null_logit a_N (…); null_value (…, K); kappa (…)
    is sp(magnitude_slope). Groups with sums of their values are stood for by them; otherwise they are left out. The
    dtype of the logits is computed with; not differentiable.
    """
    masses = _masses(logits, values, groups, null_logit, null_value)
    summed = groups.value_sum is not None
    total = masses.null + masses.L
    direction, direction_error = direction_bound(masses, summed)
    magnitude, magnitude_error = magnitude_bound(masses, kappa, summed)
    most, least = total + masses.most, total + masses.least
    variation = masses.most / most
    return Certified(
        direction, magnitude, direction_error, magnitude_error, variation, (masses.null / most, masses.null / least)
    )


def _masses(logits: Tensor, values: Tensor, groups: Groups, null_logit: Tensor, null_value: Tensor) -> Masses:
    work = torch.promote_types(logits.dtype, torch.float32)
    logits, values, a_null = logits.to(work), values.to(work), null_logit.to(work)
    count, low, high, norm = (x.to(work) for x in groups[:4])
    x = torch.cat([a_null.unsqueeze(-1), logits, high], -1).amax(-1)
    e, null = (logits - x.unsqueeze(-1)).exp(), (a_null - x).exp()
    upward = 1.0 if work == torch.float64 else 1 + 2.0**-20
    E, F = (high - x.unsqueeze(-1)).exp() * upward, (low - x.unsqueeze(-1)).exp() / upward
    D = torch.einsum("...n,...nk->...k", e, values) + null.unsqueeze(-1) * null_value
    if groups.value_sum is None:
        slack = (count * E * norm).sum(-1)
    else:
        assert groups.norm_sum is not None
        D = D + torch.einsum("...p,...pk->...k", (E + F) / 2, groups.value_sum.to(work))
        slack = ((E - F) * groups.norm_sum.to(work)).sum(-1) / 2
    sums = [(count * mass).sum(-1) for mass in (E, F, E.square(), F.square())]
    return Masses(e.sum(-1), e.square().sum(-1), D, null, sums[0], sums[1], sums[2], sums[3], slack)


def direction_bound(masses: Masses, summed: bool) -> tuple[Tensor, Tensor]:
    """c (…, K) and (C2). summed: what is not read is stood for by summaries."""
    size = masses.D.abs().amax(-1)  # whose square may be below the least number
    unit = size.where(size > 0, 1)
    length = torch.linalg.vector_norm(masses.D / unit.unsqueeze(-1), dim=-1) * unit
    total, most = masses.null + masses.L, masses.null + masses.L + masses.most
    held = length - masses.slack >= CLAMP * most
    if not summed:
        held &= masses.L > 0
    rho = torch.where(held, masses.slack / length, 0).clamp(max=1)
    # The chord √(2 − 2√(1 − ϱ²)) in the form that keeps a small ϱ.
    chord = rho * (2 / (1 + (1 - rho.square()).sqrt())).sqrt()
    nothing = (masses.slack == 0) & (masses.most == (masses.least if summed else 0))
    error = torch.where(held, chord, 2.0).masked_fill(nothing, 0)
    bar = CLAMP * (most if summed else total)
    return masses.D / torch.maximum(length, bar).unsqueeze(-1), error


def magnitude_bound(masses: Masses, kappa: Tensor, summed: bool) -> tuple[Tensor, Tensor]:
    """μ and (C3): that of what is read, or summed, the middle of the range."""
    L, Q, null, least, most, least_squares, most_squares = (
        masses.L, masses.Q, masses.null, masses.least, masses.most, masses.least_squares, masses.most_squares,
    )  # fmt: skip
    low = magnitude_of(L + least, Q + most_squares, null, kappa)
    high = magnitude_of(L + most, Q + least_squares, null, kappa)
    if summed:
        return (low + high) / 2, (high - low) / 2
    own = magnitude_of(L, Q, null, kappa)
    return own, torch.maximum(high - own, own - low)


def magnitude_of(L: Tensor, Q: Tensor, null: Tensor, kappa: Tensor) -> Tensor:
    """μ of (6.1): tanh(κ log(1 + m)), m = L³/(Q (ζ + L)); 0/0 is 0, a positive number over 0 ∞."""
    m = torch.where(L > 0, L / (null + L) * L * (L / Q), 0)  # no cube that could fall below the least number
    return torch.tanh(kappa * m.log1p())


def bar(null_logit: Tensor, visible: Tensor, epsilon: float) -> Tensor:
    """(6.6): keys of which no logit is above it, whatever else there is, move all weights together by at most epsilon.

    null_logit t ν and visible n, the keys that a query sees, (…).
    """
    return null_logit - (visible / epsilon).log()


def box_bound(q: Tensor, least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """The range of q·k (…, P) over keys that lie between `least` and `most` (…, P, K), channel by channel; q (…, K)."""
    q = q.unsqueeze(-2)
    low, high = torch.minimum(q * least, q * most).sum(-1), torch.maximum(q * least, q * most).sum(-1)
    size = (q.abs() * torch.maximum(least.abs(), most.abs())).sum(-1) * gamma(q)
    return low - size, high + size


def gamma(q: Tensor) -> float:
    """γ_K: what a dot product with q (…, K) may lose to rounding, relative to the product of the absolute values."""
    return (q.shape[-1] + 2) * torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps / 2


__all__ = [
    "CLAMP",
    "Certified",
    "Groups",
    "Masses",
    "bar",
    "box_bound",
    "certificate",
    "direction_bound",
    "gamma",
    "magnitude_bound",
    "magnitude_of",
]
