"""Keys of chunks in plain PyTorch, every chunk that a call touches at once: the oracle, and the one with gradients."""

import torch
from torch import Tensor

from atma.ops.chosen import Held, hold_summaries
from atma.ops.chosen.cpu import rows_at


def keys(summaries: Held, q: Tensor, ring: Tensor, held: tuple[Held, Held], length: Tensor) -> Held:
    """See `chunk_keys`."""
    chunk, tokens, start = ring.shape[2], q.shape[2], length.long()[:, None]
    index = start // chunk + torch.arange((tokens - 1) // chunk + 2, device=q.device)
    full = (index + 1) * chunk <= start + tokens
    place = (index[..., None] * chunk + torch.arange(chunk, device=q.device)).flatten(1)
    both = torch.cat([ring.to(q.dtype), q], 2)
    at = torch.where(place >= start, (chunk + place - start).clamp(max=both.shape[2] - 1), place % chunk)
    queries = both.gather(2, at[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))
    k, v = (rows_at(x, place).repeat_interleave(q.shape[1] // _heads(x), 1) for x in held)
    queries, k, v = (
        x.unflatten(2, (-1, chunk)).to(torch.promote_types(q.dtype, torch.float32)) for x in (queries, k, v)
    )
    scale = q.shape[3] ** -0.5
    o = ((queries @ k.mT * scale).softmax(-1) @ v).mean(3, keepdim=True)
    c = ((o @ k.mT * scale).softmax(-1) @ k).squeeze(3)
    first = (index == 0).to(c.dtype)[:, None, :, None].expand(-1, c.shape[1], -1, 1)
    return hold_summaries(summaries, torch.cat([c, first], -1), index, full, chunk)


def _heads(held: Held) -> int:
    return held.shape[1] if isinstance(held, Tensor) else held.pool.shape[1]
