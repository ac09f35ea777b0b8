"""How a command reads with a model: the options --select and --weights, the same in every command that has both."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reading:
    """How the model is read."""

    select: str | None = None
    """A selection policy: how less of the keys is read, such as "top_pages k=64" (docs/selection.md)."""
    weights: Literal["int8", "int4"] | None = None
    """Read the large weights in so few bits (docs/narrow.md), on the CPU; as they are by default."""
