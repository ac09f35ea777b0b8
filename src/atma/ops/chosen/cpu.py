"""Pages chosen and read in blocks of queries, in plain PyTorch: memory grows with a text by its scores alone."""

import torch
from torch import Tensor

from atma.ops.chosen import Held, slots_of
from atma.ops.chosen.rows import in_one_piece
from atma.ops.paged.pages import Pages

BLOCK_NUMBERS = 1 << 22
"""Of scores, or of gathered keys, at once."""


def choose(u: Tensor, summaries: Held, last: Tensor, page: int, k: int, window: int) -> Tensor:
    """See `choose_pages`."""
    x = in_one_piece(summaries)
    count = x.shape[2] // page
    pages = x[:, :, : count * page].unflatten(2, (count, page)).flatten(3)[..., : u.shape[3]].to(u.dtype)
    step = max(1, BLOCK_NUMBERS // max(1, u.shape[0] * u.shape[1] * count))
    parts = zip(u.split(step, 2), last.split(step, 1), strict=True)
    return torch.cat([_best(some, pages, end, (page, k, window)) for some, end in parts], 2)


def _best(u: Tensor, pages: Tensor, last: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    page, k, window = sizes
    slots = slots_of(k, window, page)
    first = (last - window).clamp(min=0) // page  # (B, T): the first page of the window
    grouped = u.unflatten(1, (pages.shape[1], -1)).flatten(2, 3)
    scores = (grouped @ pages.mT).view(*u.shape[:3], -1).nan_to_num(nan=torch.finfo(u.dtype).min)
    before = (torch.arange(scores.shape[3], device=u.device) < first[..., None])[:, None]
    most = min(k, scores.shape[3])
    # A stable sort, not topk: of equal scores the first pages are wanted.
    order = scores.masked_fill(~before, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., :most]
    absent = scores.shape[3] + slots
    chosen = order.where(torch.arange(most, device=u.device) < first[:, None, :, None], absent)
    near = first[..., None] + torch.arange(slots - k, device=u.device)
    near = near.where(near * page < last[..., None], absent)[:, None].expand(*u.shape[:3], -1)
    found = torch.cat([chosen, near, near.new_full((*u.shape[:3], k - most), absent)], -1).sort(-1).values
    return found.where(found < absent, -1).int()


def statistics(
    q: Tensor, keys: Held, values: Held, scale: Tensor, chosen: tuple[Tensor, int], last: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `chosen_statistics`."""
    k, v, (pages, page) = in_one_piece(keys), in_one_piece(values), chosen
    step = max(1, BLOCK_NUMBERS // (q.shape[0] * q.shape[1] * pages.shape[3] * page * q.shape[-1]))
    found = []
    for i in range(0, q.shape[2], step):
        some = slice(i, i + step)
        add = None if bias is None else bias[:, :, some]
        found.append(_sums(q[:, :, some], k, v, scale[:, :, some], (pages[:, :, some], page), last[:, some], add))
    S, L, Q, M = (torch.cat(column, 2) for column in zip(*found, strict=True))
    return S, L, Q, M


def _sums(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, chosen: tuple[Tensor, int], last: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (pages, page), work = chosen, torch.promote_types(q.dtype, torch.float32)
    place = pages.long()[..., None] * page + torch.arange(page, device=q.device)  # (B, H, T, N, page)
    seen = ((pages[..., None] >= 0) & (place < last[:, None, :, None, None])).flatten(3)
    place = place.flatten(3).clamp(0, k.shape[2] - 1)
    group = q.shape[1] // k.shape[1]
    row, head = torch.arange(q.shape[0], device=q.device), torch.arange(q.shape[1], device=q.device) // group
    at = row[:, None, None, None], head[:, None, None], place
    keys, values = k[at].to(work), v[at].to(work)  # (B, H, T, N·page, K)
    own = q if q.ndim == 5 else q[:, :, :, None]
    a = (own.to(work)[..., None, :] * keys.unflatten(3, (-1, page))).sum(-1).flatten(3) * scale[..., None]
    if bias is not None:
        a = a + bias.to(work).repeat_interleave(page, -1)
    a = a.masked_fill(~seen, -torch.inf)
    M = a.amax(-1).detach().clamp(min=-1e30)  # finite where nothing is seen
    p = (a - M[..., None]).exp()
    return (
        torch.einsum("bhts,bhtsk->bhtk", p, values.masked_fill(~seen[..., None], 0)),
        p.sum(-1),
        p.square().sum(-1),
        M,
    )


def boxes(keys: Held, summaries: Held, length: Tensor, tokens: int, page: int) -> Held:
    """See `page_boxes`."""
    first = length.long() // page
    index = first[:, None] + torch.arange((tokens - 1) // page + 2, device=length.device)
    full = (index + 1) * page <= (length + tokens)[:, None]
    place = (index[..., None] * page + torch.arange(page, device=length.device)).flatten(1)
    x = rows_at(keys, place).unflatten(2, (-1, page))
    box = torch.cat([x.amin(3), x.amax(3)], -1)  # (B, G, pages, 2K)
    return write_summaries(summaries, box, index, full, page)


def write_summaries(summaries: Held, x: Tensor, index: Tensor, full: Tensor, page: int) -> Held:
    """The summaries with x (B, G, P, n) as those of the pages index (B, P) that are `full` (B, P)."""
    pool = summaries.pool if isinstance(summaries, Pages) else summaries
    width = pool.shape[3]
    x = (
        torch.nn.functional.pad(x.to(pool.dtype), (0, page * width - x.shape[3]))
        .unflatten(3, (page, width))
        .flatten(2, 3)
    )
    place = (index[..., None] * page + torch.arange(page, device=index.device)).flatten(1)
    kept = torch.where(full.repeat_interleave(page, 1)[:, None, :, None], x, rows_at(summaries, place))
    if isinstance(summaries, Pages):
        at, slot = _in_pool(summaries, place)
        pool[at, :, slot] = kept.transpose(1, 2)
        return summaries
    # Pages that have no room lie behind the last full one, and are not written.
    inside = place.clamp(max=summaries.shape[2] - 1)
    kept = torch.where((place < summaries.shape[2])[:, None, :, None], kept, rows_at(summaries, inside))
    where = inside[:, None, :, None].expand_as(kept)
    return summaries.scatter(2, where, kept) if torch.is_grad_enabled() else summaries.scatter_(2, where, kept)


def rows_at(held: Held, place: Tensor) -> Tensor:
    """Rows (B, G, N, ·) at places (B, N); some row or other where there is no such place."""
    if isinstance(held, Pages):
        at, slot = _in_pool(held, place)
        return held.pool[at, :, slot].transpose(1, 2)
    place = place.clamp(max=held.shape[2] - 1)[:, None, :, None]
    return held.gather(2, place.expand(-1, held.shape[1], -1, held.shape[3]))


def hold_in_pages(held: Pages, x: Tensor, length: Tensor) -> Pages:
    """See `hold_rows`."""
    at, slot = _in_pool(held, length.long()[:, None] + torch.arange(x.shape[2], device=x.device))
    held.pool[at, :, slot] = x.to(held.pool.dtype).transpose(1, 2)
    return held


def _in_pool(held: Pages, place: Tensor) -> tuple[Tensor, Tensor]:
    """The pages of the pool and the places in them (B, N) of positions (B, N)."""
    size = held.pool.shape[2]
    return held.table.gather(1, place // size % held.table.shape[1]).long(), place % size
