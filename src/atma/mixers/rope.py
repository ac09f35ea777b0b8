"""Softmax attention over rotary positions: the control called rope (maths.md, section 3), and its stretched forms.

Position interpolation (arXiv 2306.15595) turns every pair s times more slowly. YaRN (arXiv 2309.00071) leaves alone the
pairs that make more than `SHORT` turns over the trained length, slows by s those that make less than `LONG`, mixes the
two between, and makes the attention's logits (0.1 ln s + 1)² times as large.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from atma.mixers.heads import Heads
from atma.mixers.softmax import SoftmaxCore
from atma.ops.polar import visible_range
from atma.ops.rows import rotate
from atma.strict import LATER, check_fields, require

RopeScaling = Literal["none", "linear", "yarn"]
SCALE = 0.12
"""Of a rope layer's logits."""
LONG, SHORT = 1.0, 32.0
"""Turns over the trained length between which YaRN goes from slowing a pair to leaving it alone: its α and β."""


@dataclass(frozen=True)
class RopeConfig:
    """Canon of a rope layer, and how its positions are stretched."""

    rope_canon: bool = field(default=False, metadata=LATER)
    """Canon on q, k and v of rope layers too, before the rotation; `canon_init` and `share_query_key_init` then hold
    for them as for the other cores. False is the published form: a rope layer without Canon."""
    rope_scaling: RopeScaling = field(default="none", metadata=LATER)
    """How a rope layer's positions are stretched over longer texts: "linear" interpolation, or "yarn"."""
    rope_factor: float = field(default=1.0, metadata=LATER)
    """How many times as long as the trained length."""
    rope_trained: int | None = field(default=None, metadata=LATER)
    """The trained length in tokens, which "yarn" goes by."""

    def __post_init__(self) -> None:
        check_fields(self)
        scaling, trained, factor = self.rope_scaling, self.rope_trained, self.rope_factor
        require(scaling != "none" or factor == 1, "rope_factor", factor, "left out without rope_scaling")
        require(math.isfinite(factor) and factor >= 1, "rope_factor", factor, "a finite number of at least 1")
        known = trained is not None or scaling != "yarn"
        require(known and (trained is None or trained >= 1), "rope_trained", trained, "the trained length in tokens")


class RopeCore(SoftmaxCore):
    """Softmax attention whose first K/4 frequency pairs are turned by position, the others left alone."""

    Config = RopeConfig

    def __init__(self, config: RopeConfig, heads: Heads) -> None:
        super().__init__(config, heads)  # pyright: ignore[reportArgumentType]
        width = heads.head_width
        require(width % 4 == 0, "head_width", width, "a multiple of 4 for rotary positions")
        self.config, self.head_width = config, width
        self.scale = logit_scale(config)

    @classmethod
    def canon(cls, config: RopeConfig) -> bool:
        """`Core.canon`."""
        return config.rope_canon

    def turn(self, q: Tensor, k: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Core.turn`."""
        first, last = visible_range(q, start, segment_ids, None)
        position = last - first - 1
        return self.turned(q, position), self.turned(k, position)

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """`Core.turned`. Angles are computed in float64: positions reach a million."""
        return rotate(x, position, frequencies(self.config, self.head_width, x.device))

    def stretch(self, kind: RopeScaling, trained: int, factor: float) -> None:
        """Take the positions of a model stretched `factor` times beyond its trained length, from here on."""
        config = replace(self.config, rope_scaling=kind, rope_trained=trained, rope_factor=float(factor))
        self.config, self.scale = config, logit_scale(config)


def frequencies(config: RopeConfig, head_width: int, device: torch.device | None = None) -> Tensor:
    """Angle a token of each turning pair (K/4,) float64, stretched as the configuration says."""
    own = (1 / 1024) ** torch.linspace(0, 1, head_width // 4, dtype=torch.float64, device=device)
    if config.rope_scaling == "none":
        return own
    slowed = own / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    assert config.rope_trained is not None
    turns = config.rope_trained * own / (2 * math.pi)
    kept = ((turns - LONG) / (SHORT - LONG)).clamp(0, 1)
    return kept * own + (1 - kept) * slowed


def logit_scale(config: RopeConfig) -> float:
    """What a rope layer multiplies its scores by."""
    if config.rope_scaling != "yarn":
        return SCALE
    return SCALE * (0.1 * math.log(config.rope_factor) + 1) ** 2
