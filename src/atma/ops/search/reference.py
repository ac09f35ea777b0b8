"""The choices in plain PyTorch, all rows of a call at once: the oracle, and the path without compiled kernels."""

import torch
from torch import Tensor

from atma.ops.chosen.rows import in_one_piece
from atma.ops.paged.pages import Pages
from atma.ops.search import Reach, finished

ROWS = 256
"""Queries whose parts are scored at once."""


def search_blocks(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.search_blocks`."""
    k = in_one_piece(keys)
    group = q.shape[1] // k.shape[1]
    count = -(-k.shape[2] // reach.block)
    chosen = torch.zeros(*q.shape[:3], count, dtype=torch.bool, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(0, q.shape[2], ROWS):
                some = slice(i, i + ROWS)
                chosen[b, h, some] = _searched(q[b, h, some], k[b, h // group], last[b, some].long(), reach, count)
    return finished(chosen, slots)


def heaviest_pages(q: Tensor, keys: Tensor | Pages, last: Tensor, reach: Reach, slots: int) -> Tensor:
    """`atma.ops.search.heaviest_pages`."""
    k = in_one_piece(keys)
    group = q.shape[1] // k.shape[1]
    whole = k.shape[2] // reach.block
    scores = _ordered(q @ k[:, :, : whole * reach.block].repeat_interleave(group, 1).to(q.dtype).mT)
    best = scores.unflatten(-1, (whole, reach.block)).amax(-1)
    index = torch.arange(-(-k.shape[2] // reach.block), device=q.device)
    before = (last - reach.window).clamp(min=0).div(reach.block, rounding_mode="floor")[:, None, :, None]
    best = best.masked_fill(index[:whole] >= before, -torch.inf)
    wanted = last.div(reach.share, rounding_mode="floor").clamp(reach.least, reach.most)
    wanted = -(-wanted // reach.block)[:, None, :, None]
    order = best.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, index[:whole].expand_as(order).contiguous())
    chosen = torch.zeros(*q.shape[:3], len(index), dtype=torch.bool, device=q.device)
    chosen[..., :whole] = (rank < wanted) & (index[:whole] < before)
    return finished(chosen | _recent(index, before, last[:, None, :, None], reach), slots)


def _ordered(scores: Tensor) -> Tensor:
    """No number at all is the least there is."""
    return scores.nan_to_num(nan=torch.finfo(scores.dtype).min)


def _recent(index: Tensor, before: Tensor, last: Tensor, reach: Reach) -> Tensor:
    return (index >= before) & (index * reach.block < last)


def _searched(q: Tensor, k: Tensor, last: Tensor, reach: Reach, count: int) -> Tensor:
    """Which of `count` blocks each of the queries q (R, K) of one head chooses among k (S, K): (R, count) bool."""
    parts, sinks = reach.kept // reach.block, reach.sinks // reach.block
    index = torch.arange(count, device=q.device)
    end = (last - reach.window).clamp(min=0)[:, None]
    begun = end.div(reach.block, rounding_mode="floor")
    read = ((index < sinks) & (index * reach.block < last[:, None])) | _recent(index, begun, last[:, None], reach)
    every = end - reach.sinks <= reach.kept
    blocks = (end - reach.sinks + reach.block - 1).clamp(min=0).div(reach.block, rounding_mode="floor")
    j = torch.arange(parts + 1, device=q.device)
    edges = (j * blocks).div(parts, rounding_mode="floor")
    start, size = edges[:, :-1], edges.diff(dim=-1)
    while bool((size > 1).any()):
        start, size = _halved(q, k, start, size, end, reach)
    found = torch.zeros_like(read)
    found.scatter_(1, (sinks + start).clamp(max=count - 1), (size > 0))
    return torch.where(every, index * reach.block < last[:, None], read | found)


def _halved(q: Tensor, k: Tensor, start: Tensor, size: Tensor, end: Tensor, reach: Reach) -> tuple[Tensor, Tensor]:
    """Each interval (R, N) cut in two, and of the parts the N best in their order."""
    left = size.div(2, rounding_mode="floor")
    starts, sizes = (torch.stack(pair, -1).flatten(1) for pair in ((start, start + left), (left, size - left)))
    at = reach.sinks + starts[..., None] * reach.block + torch.arange(reach.block, device=q.device)
    scores = torch.einsum("rk,rnbk->rnb", q, k[at.clamp(max=len(k) - 1)].to(q.dtype))
    best = _ordered(scores).masked_fill(at >= end[..., None], -torch.inf).amax(-1)
    order = best.masked_fill(sizes == 0, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    kept = order[:, : start.shape[1]].sort(-1).values
    return starts.gather(1, kept), sizes.gather(1, kept)
