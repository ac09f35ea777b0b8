"""How a model is given length: the way, what is trained, and the weights of the losses, as frozen data."""

import math
from dataclasses import dataclass
from typing import Literal

from atma.strict import check_fields, require

Way = Literal["polar", "window-memory", "linear"]
Trained = Literal["all", "new", "low-rank"]


@dataclass(frozen=True)
class ExtendConfig:
    """One extension. Shares are of the steps; lengths are tokens."""

    way: Way = "polar"
    trained: Trained | None = None
    """All parameters; only those that the way adds; or those, and low-rank adapters on every projection of a block.
    Left out, what is new for window-memory, and all for the others."""
    memory: str = "delta"
    """The memory beside attention, by name; "none" for none."""
    mix_share: float = 0.2
    """polar: over this share of the steps λ goes from 0 to 1."""
    fade_share: float = 0.2
    """polar: over this share, after that, the rotation of queries and keys is taken away; with 0 it stays."""
    sharpening: float = 3.0
    """polar: how much faster the temperature grows with the visible keys beyond a training row; it is of lengths beyond
    that alone, and changes nothing in training."""
    rate: float = 0.5
    """What the rates of the model's own training are multiplied by."""
    logits_weight: float = 1.0
    """Of KL(teacher ‖ student) of the predictions, while there is a teacher."""
    hidden_weight: float = 0.0
    """Of the mean square distance of student and teacher after each block, while there is a teacher."""
    text_weight: float = 0.3
    """Of the loss on the text itself while there is a teacher; without one it is 1."""
    teacher_share: float = 1.0
    """Share of the steps with a teacher."""
    window: int | None = None
    """window-memory and linear: keys that a query of the finished model sees, its own among them. Left out, a training
    row's for window-memory, and 64 for linear."""
    sinks: int = 4
    """window-memory: first tokens of a text that every query sees too."""
    window_range: tuple[int, int] | None = None
    """window-memory: each step draws its window from these, each factor of two equally likely; from an eighth of a
    training row to all of it where they are left out."""
    sinks_most: int = 8
    """window-memory: and its sinks from 0 to these."""
    align_share: float = 0.3
    """linear: share of the steps in which each layer alone learns the attention of the teacher's."""
    rank: int = 8
    """Of low-rank changes."""

    @property
    def trains(self) -> Trained:
        """What is trained."""
        return self.trained or ("new" if self.way == "window-memory" else "all")

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("mix_share", "fade_share", "teacher_share", "align_share"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        together = self.mix_share + self.fade_share
        require(together <= 1, "fade_share", self.fade_share, f"at most 1 − mix_share = {1 - self.mix_share:g}")
        for name in ("logits_weight", "hidden_weight", "text_weight", "rate", "sharpening"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 or more, and finite")
        require(self.rank >= 1, "rank", self.rank, "at least 1")
        require(self.window is None or self.window >= 1, "window", self.window, "at least 1, or left out")
        for name in ("sinks", "sinks_most"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        low, high = self.window_range or (1, 1)
        require(
            1 <= low <= high, "window_range", self.window_range, "two lengths, the first at least 1 and the shorter"
        )
