"""Which projections get low-rank adapters, and of what size, as frozen data (`atma.lora` does it)."""

import math
from dataclasses import dataclass

from atma.strict import check_fields, require


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters W + (α/r) B A (Hu et al. 2021, arXiv 2106.09685, section 4.1), and what else is trained.

    A pattern is the end of a module's name ("q_proj", "mlp.in_proj"), a module that holds it ("blocks.3", "memory"), or
    a name with * for anything.
    """

    rank: int = 8
    """r, rows of A and columns of B; a layer with fewer inputs or outputs has that many."""
    alpha: float = 16.0
    """α: what an adapter adds counts α/r times."""
    targets: tuple[str, ...] = ("blocks",)
    """Patterns of the linear layers that are adapted: every projection of every block by default, or also "head"."""
    train: tuple[str, ...] = ()
    """Patterns of parameters that are trained themselves beside the adapters, such as "norm_*" or "mixer.memory"."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(0 < self.alpha < math.inf, "alpha", self.alpha, "positive and finite")
        require(bool(self.targets or self.train), "targets", self.targets, "one pattern or more, or 'train' must have")
        for name in ("targets", "train"):
            require(all(getattr(self, name)), name, getattr(self, name), "patterns that are not empty")
