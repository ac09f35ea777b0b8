"""A bounded set of keys: what receives little attention is evicted, and the state does not grow with the text.

Carried over to text from the tokens that HiPrune keeps of a picture (arXiv 2508.00553; mixers.md, section 6.9): those
that received most attention lately (anchors), what stands beside them (buffers), and those that received most since
they came (registers). The last tokens are always kept. What is evicted is gone: a later question cannot find it.
"""

from dataclasses import dataclass

from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, Seat
from atma.ops.chosen import Sums
from atma.ops.eviction import Budget, Kept, attend_kept, empty
from atma.strict import check_fields, require


@dataclass(frozen=True)
class EvictConfig:
    """Sizes are tokens of each key head."""

    budget: int = 1024
    """Kept at the end of a block, the window's among them."""
    window: int = 128
    """Last tokens that are always kept."""
    block: int = 64
    """After so many tokens of a text the rest is evicted."""
    anchors: float = 0.5
    """Of what is kept beside the window, the share of anchors and of the two tokens beside each."""
    decay: float = 0.9
    """What counts of the attention received lately after one more block."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.block >= 1, "block", self.block, "at least 1")
        require(self.window >= 1, "window", self.window, "at least 1")
        require(self.budget > self.window, "budget", self.budget, f"more than window = {self.window}")
        require(0 <= self.anchors <= 1, "anchors", self.anchors, "from 0 to 1")
        require(0 <= self.decay <= 1, "decay", self.decay, "from 0 to 1")


class Evict(Policy):
    """See the module."""

    Config = EvictConfig
    config: EvictConfig

    def __init__(self, config: EvictConfig, seat: Seat) -> None:
        super().__init__(config, seat)
        anchors = int((config.budget - config.window) * config.anchors) // 3
        self.budget = Budget(config.budget, config.block, config.window, anchors, config.decay)

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Kept:
        """`Policy.init_cache`; of any capacity it is the same."""
        return empty(batch, self.seat.heads.groups, self.seat.heads.head_width, self.budget, like)

    def __call__(self, new: New, cache: Kept, call: Call | None) -> Read:
        """`Policy.__call__`."""
        scale, null = self.core.scored(new.q, new.last)
        sums, kept = attend_kept(new.q, new.k, new.v, scale, null, new.start, cache, self.budget)
        whole = (new.last - 1) // self.config.block * self.config.block
        self.count(new, (whole.clamp(max=self.config.budget) + new.last - whole)[:, None].expand(new.q.shape[:3]))
        return Read(*self.core.assemble(Sums(*sums), null, new.q.dtype), kept)


SMALL = ({"budget": 16, "window": 6, "block": 8}, {"budget": 9, "window": 2, "block": 5, "anchors": 1.0, "decay": 0.5})
