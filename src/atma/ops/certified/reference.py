"""Attention over shadows in plain PyTorch, with every score of some queries at once: what the kernels are held to.

Logits of a key lie within a range about that of its shadow; ½(E + F) of its ends, times the shadow of its value, stands
for the key. What that leaves uncertain is bounded (6.7); while a bound is above its tolerance, the keys that cost most
of it are read exactly, and in the end all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.certified.bounds import Masses, direction_bound, gamma, magnitude_bound
from atma.ops.certified.shadows import STEPS, Held, Shadows

SCORES = 1 << 22
"""Scores of a head held at once."""
ROUNDS = 3


class Scores(NamedTuple):
    """Of some queries, masses relative to x, the largest exponent of each; (B, H, T, S) but where it says otherwise."""

    exact: Tensor
    most: Tensor
    least: Tensor
    slack: Tensor
    values: Tensor
    """(B, H, S, K) exact."""
    near: Tensor
    """(B, H, S, K) of the shadows."""
    null: Tensor
    """ζ (B, H, T)."""
    seen: Tensor
    """(B, 1, T, S) bool."""


def attention(
    q: Tensor,
    k: Held,
    v: Held,
    shadows: Shadows,
    logits: tuple[Tensor, Tensor, Tensor, Tensor],
    first: Tensor,
    last: Tensor,
    tolerances: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Direction (B, H, T, K), magnitude, direction_error, magnitude_error and the number of keys read exactly.

    logits: scale and null logit (B, H, T), magnitude slope (H,), null value (H, K); all else as in `shadow_attention`.
    """
    scale, null_logit, slope, null_value = logits
    held = tuple(_rows(x) for x in (k, v, *shadows))
    step = max(1, SCORES // (q.shape[0] * held[0].shape[2]))
    parts = []
    for i in range(0, q.shape[2], step):
        at = slice(i, i + step)
        scores = _scores(q[:, :, at], held, scale[:, :, at], null_logit[:, :, at], first[:, at], last[:, at])
        parts.append(_settled(scores, F.softplus(slope)[:, None], null_value[:, None], tolerances))
    joined = [torch.cat(x, 2) for x in zip(*parts, strict=True)]
    return joined[0], joined[1], joined[2], joined[3], joined[4]


def statistics(
    q: Tensor, shadows: Shadows, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (B, H, T, K), L, Q and M (B, H, T) of `atma.ops.polar.statistics_of` over what the shadows stand for."""
    from atma.ops.polar.reference import statistics

    keys, values, key_scale, _, value_scale, *_ = (_rows(x) for x in shadows)
    k, v = (x.to(scale.dtype) * unit.to(scale.dtype) for x, unit in ((keys, key_scale), (values, value_scale)))
    return statistics(q, k, v, scale, first, last)


def _rows(x: Held) -> Tensor:
    """(B, G, S, ·) of what may lie in pages, rows of which a table is not full being whatever they are."""
    if isinstance(x, Tensor):
        return x
    pool = x.pool.mT if x.axis == 3 else x.pool
    return pool[x.table.long()].transpose(1, 2).flatten(2, 3)


def _scores(
    q: Tensor, held: tuple[Tensor, ...], scale: Tensor, null_logit: Tensor, first: Tensor, last: Tensor
) -> Scores:
    work, group = scale.dtype, q.shape[1] // held[0].shape[1]
    s = torch.arange(held[0].shape[2], device=q.device)
    seen = ((s >= first.unsqueeze(-1)) & (s < last.unsqueeze(-1))).unsqueeze(1)
    used = seen.any(2).unsqueeze(-1)
    rows = [x.to(work).masked_fill(~used, 0).repeat_interleave(group, 1) for x in held]
    k, v, keys, values, key_scale, key_error, value_scale, value_error, value_norm = rows
    q, scale = q.to(work), scale.unsqueeze(-1)
    near = scale * (q @ (keys * key_scale).mT)
    longest = STEPS * q.shape[-1] ** 0.5 * key_scale.mT + key_error.mT
    length = scale.abs() * torch.linalg.vector_norm(q, dim=-1, keepdim=True)
    slightly = torch.finfo(work).eps * 4
    doubt = length * (key_error.mT * (1 + 2.0**-20) + gamma(q) * longest) + near.abs() * slightly
    x = torch.maximum((near + doubt).masked_fill(~seen, -torch.inf).amax(-1), null_logit).unsqueeze(-1)
    exact, most, least = (
        (a - x).masked_fill(~seen, -torch.inf).exp() for a in (scale * (q @ k.mT), near + doubt, near - doubt)
    )
    slack = (most - least) / 2 * value_norm.mT + most * value_error.mT
    return Scores(exact, most, least, slack, v, values * value_scale, (null_logit - x.squeeze(-1)).exp(), seen)


def _settled(
    scores: Scores, kappa: Tensor, null_value: Tensor, tolerances: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results, once every query is within the tolerances or has read everything."""
    read, share = torch.zeros_like(scores.seen.expand(scores.most.shape)), 0.9
    everything = min(tolerances) <= 0
    if everything:
        read = scores.seen.expand(scores.most.shape)
    for round in range(ROUNDS + 1):
        masses = _masses(scores, read, null_value)
        direction, direction_error = direction_bound(masses, summed=True)
        magnitude, magnitude_error = magnitude_bound(masses, kappa, summed=True)
        failed = ~((direction_error <= tolerances[0]) & (magnitude_error <= tolerances[1]))
        if everything or not bool(failed.any()):
            break
        more = scores.seen if round == ROUNDS else _dearest(scores, masses, kappa, tolerances, share)
        read, share, everything = torch.where(failed.unsqueeze(-1), more, read), share / 2, round == ROUNDS
        if everything:
            masses = _masses(scores, read, null_value)
            direction, direction_error = direction_bound(masses, summed=True)
            magnitude, magnitude_error = magnitude_bound(masses, kappa, summed=True)
    return direction, magnitude, direction_error, magnitude_error, read.sum(-1, dtype=torch.int32)


def _masses(scores: Scores, read: Tensor, null_value: Tensor) -> Masses:
    e, E, F_ = scores.exact.where(read, 0), scores.most.masked_fill(read, 0), scores.least.masked_fill(read, 0)
    D = e @ scores.values + ((E + F_) / 2) @ scores.near + scores.null.unsqueeze(-1) * null_value
    sums = [x.sum(-1) for x in (E, F_, E.square(), F_.square(), scores.slack.masked_fill(read, 0))]
    return Masses(e.sum(-1), e.square().sum(-1), D, scores.null, *sums)


def _dearest(scores: Scores, masses: Masses, kappa: Tensor, tolerances: tuple[float, float], share: float) -> Tensor:
    """The keys that are to be read, so that what the others leave uncertain is `share` of the tolerances.

    A key costs what it takes of either tolerance, whichever is more; the dearest are read, of equal ones the first.
    """
    direction, magnitude = tolerances
    L, Q = masses.L + (masses.most + masses.least) / 2, masses.Q + (masses.most_squares + masses.least_squares) / 2
    most = direction * (1 - direction**2 / 4) ** 0.5 if direction < 1.4 else 1.0
    length = torch.linalg.vector_norm(masses.D, dim=-1)
    slope = kappa / (2 * magnitude)
    squares = scores.most.square() - scores.least.square()
    of_magnitude = (scores.most - scores.least) * (3 * slope / L).unsqueeze(-1) + squares * (slope / Q).unsqueeze(-1)
    price = torch.maximum(scores.slack / (most * length).unsqueeze(-1), of_magnitude).masked_fill(~scores.seen, 0)
    order = torch.sort(price, dim=-1, stable=True, descending=True)
    left = order.values.flip(-1).cumsum(-1).flip(-1)  # what this key and all cheaper ones cost
    wanted = (left > share) | ~torch.isfinite(left)
    return torch.zeros_like(wanted).scatter_(-1, order.indices, wanted) & scores.seen


__all__ = ["attention", "statistics"]
