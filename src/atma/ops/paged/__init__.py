"""Attention over keys and values in pages, so that many texts of any length share one pool (atma.serve).

A page holds a fixed number of neighbouring positions of one text; the pool of keys is (pages, G, K, page), that of
values (pages, G, page, K). A row's table is a ring: it tells of as many neighbouring pages of a text as it has places,
so a text of which only a window is read may be of any length. Compiled, queries read the pages where they lie;
otherwise those that they see are gathered to contiguous keys and the ordinary operation reads these. Inference only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops import native as kernels
from atma.ops.backend import backend_for, implementation
from atma.ops.paged import native
from atma.ops.paged.pages import Pages


def hold(keys: Pages, values: Pages, k: Tensor, v: Tensor, length: Tensor) -> tuple[Pages, Pages]:
    """The pages with k and v (B, G, T, K) written in place at each row's positions from length (B,) on."""
    if _compiled(keys.pool):
        native.hold(keys, values, k, v, length)
        return keys, values
    page = values.pool.shape[2]
    position = length.long()[:, None] + torch.arange(k.shape[2], device=k.device)
    at, slot = keys.table.gather(1, position // page % keys.table.shape[1]).long(), position % page
    keys.pool[at, :, :, slot] = k.to(keys.pool.dtype).transpose(1, 2)
    values.pool[at, :, slot] = v.to(keys.pool.dtype).transpose(1, 2)
    return keys, values


class Gathered(NamedTuple):
    """What the queries of a call see, in one piece."""

    keys: Tensor
    """(B, G, S, K), zero behind each row's last."""
    values: Tensor
    start: Tensor
    """(B,): where in it the first query stands."""


def gather(keys: Pages, values: Pages, start: Tensor, queries: int, window: int | None) -> Gathered:
    """The keys that so many queries of each row see, from start (B,) on, from the first page that has one of them."""
    page, count = values.pool.shape[2], keys.table.shape[1]
    first = torch.zeros_like(start)
    if window is not None:
        count = min(count, (window + queries - 2) // page + 2)
        first = (start - window + 1).clamp(min=0) // page
    index = (first[:, None] + torch.arange(count, device=start.device)) % keys.table.shape[1]
    table, start = keys.table.gather(1, index.long()).long(), start - first * page
    k, v = (x.transpose(1, 2).flatten(2, 3) for x in (keys.pool[table].mT, values.pool[table]))
    unused = (torch.arange(k.shape[2], device=k.device) >= start[:, None] + queries)[:, None, :, None]
    return Gathered(k.masked_fill(unused, 0), v.masked_fill(unused, 0), start)


def polar_attention(
    q: Tensor,
    keys: Pages,
    values: Pages,
    scalars: tuple[Tensor, ...],
    start: Tensor | None,
    window: int | None,
    count_limit: int | None,
    sharpening: float,
) -> tuple[Tensor, Tensor]:
    """As `atma.ops.polar_attention`, the queries' own keys already held; scalars are its five learned tensors."""
    from atma.ops import polar

    assert start is not None
    if not _compiled(keys.pool):
        k, v, start = gather(keys, values, start, q.shape[2], window)
        gain, base, slope, magnitude_slope, null_value = scalars
        learned = (gain, base, slope, magnitude_slope, null_value)
        return polar.polar_attention(q, k, v, *learned, start, None, window, count_limit, sharpening)
    first, last = polar.visible_range(q, start, None, window)
    work = torch.promote_types(q.dtype, torch.float32)
    wide = tuple(x.to(work) for x in scalars)
    attend = implementation("polar", "native").attend
    c, magnitude = attend(q, keys, values, first, last, wide, count_limit, sharpening)
    return c.to(q.dtype), magnitude.to(q.dtype)


def softmax_attention(
    q: Tensor, keys: Pages, values: Pages, scale: float, start: Tensor | None, window: int | None
) -> Tensor:
    """As `atma.ops.softmax_attention`, the queries' own keys already held."""
    from atma.ops import polar

    assert start is not None
    if not _compiled(keys.pool):
        k, v, start = gather(keys, values, start, q.shape[2], window)
        return polar.softmax_attention(q, k, v, scale, start, None, window)
    first, last = polar.visible_range(q, start, None, window)
    work = torch.promote_types(q.dtype, torch.float32)
    scales = torch.full(q.shape[:-1], scale, dtype=work, device=q.device)
    S, L, _, _ = native.statistics(q, keys, values, scales, first, last)
    return (S / L.unsqueeze(-1)).to(q.dtype)


def _compiled(pool: Tensor) -> bool:
    return kernels.available(pool.dtype) and backend_for("auto", pool, "polar") == "native"


__all__ = ["Gathered", "Pages", "gather", "hold", "polar_attention", "softmax_attention"]
