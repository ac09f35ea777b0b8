"""Where the queries of one call look: participation, null sink, first tokens, and chosen keys, of each head.

The statistics come from the streamed sums of `atma.ops.polar`, the weights on keys from these sums block by block, so
that no (queries, keys) matrix of a long text is held. Source: maths.md, section 4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.diagnose.observed import Seen
from atma.mixers.heads import Attending
from atma.ops.polar import statistics_of, visible_range

KEY_BLOCK = 8192
RECENT = 128
"""Keys right before the first query, which no sink is looked for in."""


class Queries(NamedTuple):
    """The queries of one row's call, and what they see: query i the keys of tokens first[i] ≤ s < last[i]."""

    scaled: Tensor  # (H, P, K): logits are scaled · key
    keys: Tensor  # (G, S, K)
    first: Tensor  # (P,)
    last: Tensor  # (P,)
    total: Tensor  # (H, P): log of the sum of all weights before they are normalised, the null's among them
    effective: Tensor  # (H, P): n_eff
    null: Tensor | None  # (H, P): the null sink's weight, None without one


class Sink(NamedTuple):
    """The key, the first and the recent ones aside, with the largest mean weight of a head."""

    place: int | None
    mass: float


@torch.inference_mode()
def queries_of(mixer: Attending, seen: Seen) -> Queries:
    """The queries of an observed call of one row, with their softmax statistics in float32 or wider."""
    projected = mixer.project(seen.x, seen.before)
    q, k = mixer.core.turn(projected.q, projected.k, seen.start, None)
    keys, values, start, *_ = mixer.attended(seen.before, k, projected.v, in_order=True)
    assert isinstance(keys, Tensor) and isinstance(values, Tensor) and start is not None
    first, last = visible_range(q, start, None, mixer.core.window)
    work = torch.promote_types(q.dtype, torch.float32)
    scale, null_logit = mixer.core.scale_and_null(q, (last - first).to(work))
    _, L, Q, M = statistics_of("auto", q)(q, keys, values, scale, first, last)
    total = M + L.log()
    null = None
    if null_logit is not None:
        total = torch.logaddexp(total, null_logit)
        null = (null_logit - total).exp()[0]
    scaled = q[0].to(work) * scale[0, ..., None]
    gone = int(seen.start - start)  # keys before the first that a layer with a window still holds
    placed = F.pad(keys[0], (0, 0, gone, 0))
    return Queries(scaled, placed, first[0] + gone, last[0] + gone, total[0], (L.square() / Q)[0], null)


def weights(queries: Queries, start: int, stop: int) -> Tensor:
    """The weights (H, P, stop − start) of the keys from start to stop; zero where they are not seen."""
    group = queries.scaled.shape[0] // queries.keys.shape[0]
    keys = queries.keys[:, start:stop].to(queries.scaled.dtype).repeat_interleave(group, 0)
    p = (queries.scaled @ keys.mT - queries.total[..., None]).exp_()
    s = torch.arange(start, stop, device=p.device)
    return p.masked_fill_((s < queries.first[:, None]) | (s >= queries.last[:, None]), 0)


@torch.inference_mode()
def mean_weights(queries: Queries) -> Tensor:
    """The weight (H, S) of every key up to the last query's, averaged over the queries."""
    keys = int(queries.last.max())
    blocks = [weights(queries, i, min(i + KEY_BLOCK, keys)).mean(1) for i in range(0, keys, KEY_BLOCK)]
    return torch.cat(blocks, 1)


def sink(mass: Tensor, first_query: int) -> Sink:
    """Of one head's mean weights (S,); nowhere where no key but the first and the recent ones is seen."""
    candidates = mass[1 : max(1, first_query - RECENT)]
    if len(candidates) == 0 or float(candidates.max()) == 0:
        return Sink(None, 0.0)
    place = int(candidates.argmax())
    return Sink(place + 1, float(candidates[place]))


@torch.inference_mode()
def copy_mass(queries: Queries, places: list[int]) -> Tensor:
    """Each head's (H,) mean weight of the i-th of these keys at the i-th of the last len(places) queries."""
    span = weights(queries, places[0], places[-1] + 1)[:, -len(places) :]
    at = torch.tensor([place - places[0] for place in places], device=span.device)
    return span[:, torch.arange(len(places), device=span.device), at].mean(1)
