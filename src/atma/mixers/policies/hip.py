"""Blocks of keys found by halving intervals, in a number of steps that grows with the logarithm of the text (HiP).

HiP (arXiv 2406.09827; mixers.md, section 6.2) looks at the first block of each part of the text, keeps the better
parts, and halves them until they are single blocks. No summary is kept: what is looked at are the keys themselves.
"""

from dataclasses import dataclass

from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, Seat, hold, read_pages
from atma.mixers.policies.whole import Rows, new_keys, read_all
from atma.ops.search import Reach, search_blocks
from atma.strict import check_fields, require


@dataclass(frozen=True)
class HipConfig:
    """Sizes are tokens."""

    k: int = 512
    """Tokens that each query head finds and reads, in whole blocks."""
    block: int = 2
    """Tokens of a block."""
    sinks: int = 4
    """First tokens of a text, which are always read; in whole blocks."""
    window: int = 128
    """Last tokens that are always read."""
    dense: int = 3
    """So many of the first attention layers read everything, but never more than a quarter of all."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.block >= 1, "block", self.block, "at least 1")
        blocks = f"a multiple of block = {self.block}"
        require(self.k >= 1 and self.k % self.block == 0, "k", self.k, f"{blocks}, at least one")
        require(self.sinks >= 0 and self.sinks % self.block == 0, "sinks", self.sinks, f"{blocks}, or 0")
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.dense >= 0, "dense", self.dense, "at least 0")


class Hip(Policy):
    """See the module."""

    Config = HipConfig
    config: HipConfig

    def __init__(self, config: HipConfig, seat: Seat) -> None:
        super().__init__(config, seat)
        self.reads_all = seat.index < min(config.dense, seat.count // 4)
        self.reach = Reach(config.block, config.k, config.sinks, config.window)

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Rows:
        """`Policy.init_cache`."""
        return new_keys(self.seat.heads.groups, self.seat.heads.head_width, batch, capacity, like)

    def __call__(self, new: New, cache: Rows, call: Call | None) -> Read:
        """`Policy.__call__`."""
        keys, values = held = hold(cache.keys, cache.values, new, self.config.block)
        if self.reads_all:
            self.count(new)
            return Read(*read_all(self.core, new, keys, values), Rows(keys, values))
        blocks = search_blocks(new.q, keys, new.last, self.reach)
        self.count(new, chosen=(blocks, self.config.block))
        return Read(*read_pages(self.core, new, held, (blocks, self.config.block)), Rows(keys, values))


SMALL = ({"k": 8, "sinks": 4, "window": 6, "dense": 0}, {"k": 6, "block": 3, "sinks": 0, "window": 2})
