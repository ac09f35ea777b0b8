"""Chunks found by a key of their own, and no position beyond those of training (LongHeads; mixers.md, section 6.3).

LongHeads (arXiv 2402.10685) reads the first chunk of a text, the last two, and those whose keys are most like the
query, as if they stood side by side: the chunks that are read get the positions 0, 1, …. Keys are held with their place
in their chunk as position, and a query is turned anew for each chunk by how far before its own that chunk then stands.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.heads import Core
from atma.mixers.policies.base import New, Policy, Read, hold, new_rows, read_pages
from atma.ops.chosen import Held, choose_pages, chosen_statistics
from atma.ops.chunk_keys import chunk_keys
from atma.ops.polar.held import hold as hold_tokens
from atma.strict import check_fields, require


@dataclass(frozen=True)
class LongHeadsConfig:
    """Sizes are tokens."""

    chunk: int = 256
    """Tokens of a chunk."""
    budget: int = 4096
    """What each query head reads at the most, in whole chunks: the first, the last two, and those it finds."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.chunk >= 1, "chunk", self.chunk, "at least 1")
        whole = self.budget % self.chunk == 0 and self.budget >= 3 * self.chunk
        require(whole, "budget", self.budget, f"a multiple of chunk = {self.chunk}, three of them at least")


class ChunkedKeys(NamedTuple):
    """Keys, with their places in their chunks as positions, values, keys of chunks, and queries of the current one."""

    keys: Held  # (B, G, capacity, K)
    values: Held
    chunks: Held  # (B, H, capacity, ⌈(K + 1) / chunk⌉)
    queries: Tensor  # (B, H, chunk, K): position p at place p mod chunk

    grows = {"keys": 2, "values": 2, "chunks": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 2, "values": 2, "chunks": 2}  # noqa: RUF012


class LongHeads(Policy):
    """See the module."""

    Config = LongHeadsConfig
    config: LongHeadsConfig

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> ChunkedKeys:
        """`Policy.init_cache`."""
        heads, groups, width = self.seat.heads.heads, self.seat.heads.groups, self.seat.heads.head_width
        rows = like.new_empty(batch)
        keys, values = (new_rows(rows, groups, capacity, width) for _ in range(2))
        chunks = new_rows(rows, heads, capacity, -(-(width + 1) // self.config.chunk))
        return ChunkedKeys(keys, values, chunks, new_rows(rows, heads, self.config.chunk, width))

    def __call__(self, new: New, cache: ChunkedKeys, call: Call | None) -> Read:
        """`Policy.__call__`."""
        chunk = self.config.chunk
        within = (new.last - 1) % chunk
        q, k = (self.core.turned(x, within) for x in (new.bare_q, new.bare_k))
        held = hold(cache.keys, cache.values, new._replace(k=k), chunk)
        chunks = chunk_keys(cache.chunks, q, cache.queries, held, new.start)
        first = torch.full_like(new.bare_q[..., :1], torch.finfo(q.dtype).max / 4)  # the first chunk is always found
        found = self.config.budget // chunk - 2
        pages = choose_pages(torch.cat([new.bare_q, first], -1), chunks, new.last, chunk, found, chunk + 1)
        self.count(new, chosen=(pages, chunk))
        if type(self.core).turned is Core.turned:
            read = read_pages(self.core, new, held, (pages, chunk))
        else:
            read = self._read_turned(new, held, pages)
        return Read(*read, ChunkedKeys(*held, chunks, joined(cache.queries, q, new.start)))

    def _read_turned(self, new: New, held: tuple[Held, Held], pages: Tensor) -> tuple[Tensor, Tensor | None]:
        """Each chunk by the query turned as far as the chunk stands before the query's own."""
        chunk, last = self.config.chunk, new.last
        count = ((last - 1) // chunk + 1).clamp(max=pages.shape[3])  # chunks read, of any head
        turned = [
            self.core.turned(new.bare_q, (count - 1 - slot).clamp(min=0) * chunk + (last - 1) % chunk)
            for slot in range(pages.shape[3])
        ]
        scale, null = self.core.scored(new.q, last)
        sums = chosen_statistics(torch.stack(turned, 3), *held, scale, (pages, chunk), last)
        return self.core.assemble(sums, null, new.q.dtype)


def joined(ring: Tensor, new: Tensor, length: Tensor) -> Tensor:
    """The ring (B, H, w, K) with new tokens (B, H, T, K) from position length (B,) on, one without grad in place."""
    size, tokens = ring.shape[2], new.shape[2]
    if tokens == 1 and not torch.is_grad_enabled():
        return hold_tokens(ring, ring, new, new, length % size)[0]
    end = length.long()[:, None] + tokens
    place = torch.arange(size, device=ring.device)
    position = end - 1 - (end - 1 - place) % size  # the newest at each place
    index = torch.where(position >= end - tokens, size + position - (end - tokens), place)
    both = torch.cat([ring, new.to(ring.dtype)], 2)
    return both.gather(2, index[:, None, :, None].expand(-1, both.shape[1], -1, both.shape[3]))


SMALL = ({"chunk": 4, "budget": 16}, {"chunk": 7, "budget": 21})
