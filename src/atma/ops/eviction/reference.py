"""The kept set in plain PyTorch, a row and a piece of a block at a time: the oracle, and the one with gradients."""

import torch
from torch import Tensor

from atma.ops.eviction import Budget, Kept

Sums = tuple[Tensor, Tensor, Tensor, Tensor]


def attend_kept(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, null: Tensor | None, length: Tensor, kept: Kept, budget: Budget
) -> tuple[Sums, Kept]:
    """`atma.ops.eviction.attend_kept`, nothing in place."""
    rows = []
    for b in range(len(q)):
        own = Kept(*(x[b] for x in kept))
        rows.append(_row(q[b], k[b], v[b], scale[b], None if null is None else null[b], int(length[b]), own, budget))
    sums = tuple(torch.stack(column) for column in zip(*(found for found, _ in rows), strict=True))
    return sums, Kept(*map(torch.stack, zip(*(after for _, after in rows), strict=True)))  # pyright: ignore


def _row(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, null: Tensor | None, length: int, kept: Kept, budget: Budget
) -> tuple[Sums, Kept]:
    pieces, at = [], 0
    while at < q.shape[1]:
        n = length + at
        size = min(budget.block - n % budget.block, q.shape[1] - at)
        some, filled = slice(at, at + size), min(n // budget.block * budget.block, budget.budget) + n % budget.block
        kept = _held(kept, k[:, some], v[:, some], filled, n)
        sums, received = _read(q[:, some], kept, scale[:, some], None if null is None else null[:, some], filled)
        kept = kept._replace(lately=kept.lately + received, wholly=kept.wholly + received)
        if (n + size) % budget.block == 0:
            kept = evicted(kept, filled + size, n + size - 1, budget)
        pieces.append(sums)
        at += size
    S, L, Q, M = (torch.cat(column, 1) for column in zip(*pieces, strict=True))
    return (S, L, Q, M), kept


def _held(kept: Kept, k: Tensor, v: Tensor, filled: int, n: int) -> Kept:
    """New k and v (G, T, K), from position n on, in the slots from `filled` on."""
    index = torch.arange(filled, filled + k.shape[1], device=k.device)
    place = torch.arange(n, n + k.shape[1], device=k.device, dtype=torch.int32).expand(k.shape[:2])
    keys = kept.keys.index_copy(2, index, k.mT.to(kept.keys.dtype))
    values = kept.values.index_copy(1, index, v.to(kept.values.dtype))
    return kept._replace(keys=keys, values=values, place=kept.place.index_copy(1, index, place))


def _read(q: Tensor, kept: Kept, scale: Tensor, null: Tensor | None, filled: int) -> tuple[Sums, Tensor]:
    """The statistics of queries q (H, T, K), the first of which sees slot `filled` last; what keys receive (G, N)."""
    work, group = kept.lately.dtype, q.shape[0] // kept.keys.shape[0]
    end = filled + q.shape[1]
    keys, values = (x.to(work).repeat_interleave(group, 0) for x in (kept.keys[..., :end], kept.values[:, :end]))
    slot = torch.arange(end, device=q.device)
    hidden = slot > filled + torch.arange(q.shape[1], device=q.device)[:, None]
    a = (q.to(work) @ keys * scale[..., None]).masked_fill(hidden, -torch.inf)
    M = a.amax(-1).detach()
    p = (a - M[..., None]).exp()
    L = p.sum(-1)
    share = 1 / (L + (0 if null is None else (null.to(work) - M).exp()))
    weights = (p * share[..., None]).detach().unflatten(0, (-1, group)).sum((1, 2))
    received = torch.nn.functional.pad(weights, (0, kept.lately.shape[1] - end))
    # 0 · NaN is NaN: a value that a query does not see must not spoil it.
    S = p @ values
    if not values.isfinite().all():
        S = torch.where(hidden[..., None], 0, p[..., None] * values[:, None]).sum(-2)
    return (S, L, p.square().sum(-1), M), received


def evicted(kept: Kept, filled: int, position: int, budget: Budget) -> Kept:
    """What is left of `filled` slots after the token at `position`, the last of a block (mixers.md, section 6.9)."""
    slot = torch.arange(kept.place.shape[1], device=kept.place.device)
    stays = (slot < filled).expand_as(kept.place)
    if filled > budget.budget:
        free = stays & (kept.place + budget.window <= position)
        anchors = _largest(kept.lately, free, torch.full_like(kept.place[:, :1], budget.anchors))
        beside = ((kept.place[:, :, None] - kept.place[:, None]).abs() <= 1) & anchors[:, None]
        chosen = stays & ~free | free & beside.any(-1)
        stays = chosen | _largest(kept.wholly, free & ~chosen, budget.budget - chosen.sum(-1, keepdim=True))
    index = torch.where(stays, slot, len(slot)).sort(-1).values
    none, index = index == len(slot), index.clamp(max=len(slot) - 1)
    place, lately, wholly = (x.gather(1, index) for x in kept[2:])
    keys = kept.keys.gather(2, index[:, None].expand_as(kept.keys)).masked_fill(none[:, None], 0)
    values = kept.values.gather(1, index[..., None].expand_as(kept.values)).masked_fill(none[..., None], 0)
    lately, wholly = (lately * budget.decay).masked_fill(none, 0), wholly.masked_fill(none, 0)
    return Kept(keys, values, place.masked_fill(none, -1), lately, wholly)


def _largest(x: Tensor, among: Tensor, wanted: Tensor) -> Tensor:
    """Which of the slots `among` (G, N) have the `wanted` (G, 1) largest numbers, of equal ones the first."""
    x = torch.where(x.isnan(), torch.inf, x).masked_fill(~among, -1)
    order = x.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(x.shape[1], device=x.device).expand_as(order).clone()
    )
    return among & (rank < wanted)
