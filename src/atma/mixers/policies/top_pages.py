"""Pages whose keys might match best: the uncertified baseline (Quest, arXiv 2406.10774; mixers.md, section 6.1).

Of every full page the least and the most of each channel of its keys are kept. A query's product with no key of the
page can be larger than Σ max(q_κ min_κ, q_κ max_κ), and the pages for which this bound is largest are read.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, hold, new_rows, read_pages
from atma.ops.chosen import Held, choose_pages, page_boxes
from atma.strict import check_fields, require


@dataclass(frozen=True)
class TopPagesConfig:
    """Sizes are tokens, k pages."""

    page: int = 16
    """Tokens of a page."""
    k: int = 32
    """Pages that each query head reads beside its window."""
    window: int = 128
    """Last tokens that are always read, to whole pages."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.page >= 1, "page", self.page, "at least 1")
        require(self.k >= 0, "k", self.k, "at least 0")
        require(self.window >= 1, "window", self.window, "at least 1")


class BoxedKeys(NamedTuple):
    """Keys and values, and the boxes around the keys of full pages."""

    keys: Held  # (B, G, capacity, K)
    values: Held
    boxes: Held  # (B, G, capacity, ⌈2K / page⌉): of each page 2K numbers spread over its tokens

    grows = {"keys": 2, "values": 2, "boxes": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"keys": 2, "values": 2, "boxes": 2}  # noqa: RUF012


class TopPages(Policy):
    """See the module."""

    Config = TopPagesConfig
    config: TopPagesConfig

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> BoxedKeys:
        """`Policy.init_cache`."""
        groups, width = self.seat.heads.groups, self.seat.heads.head_width
        spread = -(-2 * width // self.config.page)
        rows = like.new_empty(batch)
        keys, values = (new_rows(rows, groups, capacity, width) for _ in range(2))
        return BoxedKeys(keys, values, new_rows(rows, groups, capacity, spread))

    def __call__(self, new: New, cache: BoxedKeys, call: Call | None) -> Read:
        """`Policy.__call__`."""
        page = self.config.page
        keys, values = hold(cache.keys, cache.values, new, page)
        boxes = page_boxes(keys, cache.boxes, new.start, new.q.shape[2], page)
        # q · min where q < 0 is the larger product, q · max elsewhere: one product with the box.
        u = torch.cat([new.q.clamp(max=0), new.q.clamp(min=0)], -1)
        pages = choose_pages(u, boxes, new.last, page, self.config.k, self.config.window)
        self.count(new, chosen=(pages, page))
        read, added = read_pages(self.core, new, (keys, values), (pages, page))
        return Read(read, added, BoxedKeys(keys, values, boxes))


SMALL = ({"page": 4, "k": 2, "window": 6}, {"page": 1, "k": 3, "window": 2})
