"""How much is read by layers that were trained to find pages or blocks: more of them for longer texts, fewer for speed.

What `polar_pages` and `landmark` read in training is an option of theirs; what they read of a long text may be another
number. It changes neither their states nor their weights (mixers.md, sections 5.8 and 6.8).
"""

from dataclasses import dataclass

from atma.mixers.policies.base import Policy
from atma.strict import check_fields, require


@dataclass(frozen=True)
class PagesConfig:
    """How many."""

    k: int = 32
    """Pages, or blocks, that each query head reads beside those that it always does."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.k >= 1, "k", self.k, "at least 1")


class TrainedPages(Policy):
    """See the module; the mixer itself reads."""

    Config = PagesConfig
    config: PagesConfig
    trained = True


SMALL = ({"k": 3},)
