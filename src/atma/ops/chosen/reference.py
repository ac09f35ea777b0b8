"""Pages chosen and read by materialised scores of all keys: the oracle, differentiable by autograd."""

import torch
from torch import Tensor

from atma.ops.chosen import Held, cpu, slots_of
from atma.ops.chosen.rows import in_one_piece

boxes, hold_in_pages = cpu.boxes, cpu.hold_in_pages


def choose(u: Tensor, summaries: Held, last: Tensor, page: int, k: int, window: int) -> Tensor:
    """See `choose_pages`: every page is scored, hidden ones −∞, and sorted."""
    x = in_one_piece(summaries)
    count = x.shape[2] // page
    pages = x[:, :, : count * page].unflatten(2, (count, page)).flatten(3)[..., : u.shape[3]]
    pages = pages.repeat_interleave(u.shape[1] // x.shape[1], 1)
    scores = torch.einsum("bhtn,bhpn->bhtp", u, pages.to(u.dtype)).nan_to_num(nan=torch.finfo(u.dtype).min)
    first = (last - window).clamp(min=0) // page
    index = torch.arange(count, device=u.device)
    before = (index < first[..., None])[:, None]
    order = scores.masked_fill(~before, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, index.expand_as(order))
    slots = slots_of(k, window, page)
    wanted = before & (rank < k)
    absent = slots + count
    found = torch.where(wanted, index, absent)
    near = first[..., None] + torch.arange(slots - k, device=u.device)
    near = torch.where(near * page < last[..., None], near, absent)[:, None].expand(*u.shape[:3], -1)
    pages = torch.cat([found, near], -1).sort(-1).values
    pages = torch.nn.functional.pad(pages, (0, max(0, slots - pages.shape[-1])), value=absent)[..., :slots]
    return pages.where(pages < absent, -1).int()


def statistics(
    q: Tensor, keys: Held, values: Held, scale: Tensor, chosen: tuple[Tensor, int], last: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `chosen_statistics`: of all keys those that are not chosen have the logit −∞."""
    k, v = in_one_piece(keys), in_one_piece(values)
    pages, page = chosen
    group, work = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(work).repeat_interleave(group, 1) for x in (k, v))
    s = torch.arange(k.shape[2], device=q.device)
    here = (s // page)[:, None] == pages[..., None, :]  # (B, H, T, S, N)
    seen = here.any(-1) & (s < last[..., None])[:, None]
    if q.ndim == 5:
        a = torch.where(here, torch.einsum("bhtnk,bhsk->bhtsn", q.to(work), k), 0).sum(-1) * scale[..., None]
    else:
        a = torch.einsum("bhtk,bhsk->bhts", q.to(work), k) * scale[..., None]
    if bias is not None:
        a = a + torch.where(here, bias.to(work)[..., None, :], 0).sum(-1)
    a = a.masked_fill(~seen, -torch.inf)
    M = a.amax(-1).detach().clamp(min=-1e30)  # finite where nothing is seen
    p = (a - M[..., None]).exp()
    return torch.einsum("bhts,bhsk->bhtk", p, v.masked_fill(~v.isfinite(), 0)), p.sum(-1), p.square().sum(-1), M
