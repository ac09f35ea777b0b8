"""Softmax attention over rotary positions as public checkpoints have them (RoFormer, arXiv 2104.09864).

The first `rotary_share` of a head's numbers are halves of pairs, and the pair i of P is turned by theta^(−i/P) a token.
Checkpoints that were stretched after training say how: "linear" (arXiv 2306.15595), "llama3" (Llama 3.1: slow pairs
slowed, fast ones left, the rest between) or "yarn" (arXiv 2309.00071, with a factor on what is turned).

Frequencies are rounded to float32, as the checkpoints were trained with; angles are float64, where most other code
rounds them to float32, which at token 100,000 is off by up to 0.004.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from atma.mixers.heads import Heads
from atma.mixers.softmax import SoftmaxCore
from atma.ops.polar import visible_range
from atma.ops.rows import rotate
from atma.strict import check_fields, require

Scaling = Literal["none", "linear", "llama3", "yarn"]


@dataclass(frozen=True)
class RotaryConfig:
    """How fast pairs turn, and how positions are stretched."""

    rotary_theta: float = 10_000.0
    """Base of the frequencies: the slowest pair turns about so many times as slowly as the first."""
    rotary_share: float = 1.0
    """Share of a head's numbers that are turned, its first ones; 0 for no positions."""
    score_scale: float | None = None
    """What scores q·k are multiplied by; 1/√K where it is left out."""
    rotary_scaling: Scaling = "none"
    """How positions are stretched over texts longer than those of training."""
    rotary_factor: float = 1.0
    """How many times as long as the trained length."""
    rotary_trained: int | None = None
    """The trained length in tokens, which "llama3" and "yarn" go by."""
    rotary_slow: float = 1.0
    """Turns over the trained length below which a pair is slowed by the whole factor."""
    rotary_fast: float = 32.0
    """Turns over the trained length above which a pair is left as it is."""
    rotary_truncate: bool = True
    """Whether "yarn" begins and ends its slope between the two at whole pairs."""
    rotary_gain: float | None = None
    """What "yarn" multiplies turned queries and keys by; 0.1 ln(factor) + 1 where it is left out."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(
            math.isfinite(self.rotary_theta) and self.rotary_theta > 1, "rotary_theta", self.rotary_theta, "above 1"
        )
        require(0 <= self.rotary_share <= 1, "rotary_share", self.rotary_share, "between 0 and 1")
        scale, factor, scaling = self.score_scale, self.rotary_factor, self.rotary_scaling
        require(scale is None or scale > 0, "score_scale", scale, "positive, or left out for 1/√head_width")
        require(math.isfinite(factor) and factor >= 1, "rotary_factor", factor, "a finite number of at least 1")
        require(scaling != "none" or factor == 1, "rotary_factor", factor, "left out without rotary_scaling")
        trained = self.rotary_trained
        known = trained is not None or scaling not in ("llama3", "yarn")
        require(known and (trained is None or trained >= 1), "rotary_trained", trained, "the trained length in tokens")
        require(0 < self.rotary_slow < self.rotary_fast, "rotary_slow", self.rotary_slow, "positive, below rotary_fast")
        gain = self.rotary_gain
        require(gain is None or gain > 0, "rotary_gain", gain, "positive, or left out")


class RotaryCore(SoftmaxCore):
    """softmax(scale · q kᵀ) v, q and k turned by their positions."""

    Config = RotaryConfig

    def __init__(self, config: RotaryConfig, heads: Heads) -> None:
        super().__init__(config, heads)  # pyright: ignore[reportArgumentType]
        self.own, self.config, self.turning = config, config, int(heads.head_width * config.rotary_share)
        even = self.turning % 2 == 0
        require(even, "rotary_share", config.rotary_share, f"such that an even part of {heads.head_width} is turned")
        self.scale = self.scale if config.score_scale is None else config.score_scale

    @classmethod
    def canon(cls, config: RotaryConfig) -> bool:
        """`Core.canon`: not before this core."""
        return False

    def turn(self, q: Tensor, k: Tensor, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """`Core.turn`."""
        if self.turning == 0:
            return q, k
        first, last = visible_range(q, start, segment_ids, None)
        position = last - first - 1
        return self.turned(q, position), self.turned(k, position)

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """`Core.turned`."""
        if self.turning == 0:
            return x
        backward = -frequencies(self.config, self.turning).to(x.device)  # `rotate` turns the other way
        whole = self.turning == x.shape[-1]
        turned = rotate(x if whole else x[..., : self.turning], position, backward)
        if (gain := gain_of(self.config)) != 1:
            turned = turned * gain
        return turned if whole else torch.cat([turned, x[..., self.turning :]], -1)

    def stretch(self, kind: Literal["linear", "yarn"], trained: int, factor: float) -> None:
        """Take the positions of a model stretched `factor` times beyond its trained length, from here on.

        ValueError for a checkpoint whose own positions are stretched already.
        """
        own = self.own.rotary_scaling
        require(own == "none", "rope_scaling", kind, f"none: this checkpoint is stretched already, by {own!r}")
        self.config = replace(self.own, rotary_scaling=kind, rotary_trained=trained, rotary_factor=float(factor))


def frequencies(config: RotaryConfig, turning: int) -> Tensor:
    """Angle a token (pairs,) of each pair, float64 of float32 numbers, stretched as the configuration says."""
    periods = config.rotary_theta ** (torch.arange(0, turning, 2, dtype=torch.float32) / turning)
    own = 1.0 / periods
    if config.rotary_scaling == "linear":
        own = own / config.rotary_factor
    elif config.rotary_scaling == "llama3":
        own = _llama3(own, config)
    elif config.rotary_scaling == "yarn":
        own = _yarn(periods, config, turning)
    return own.double()


def gain_of(config: RotaryConfig) -> float:
    """What turned queries and keys are multiplied by."""
    if config.rotary_scaling != "yarn":
        return 1.0
    return 0.1 * math.log(config.rotary_factor) + 1 if config.rotary_gain is None else config.rotary_gain


def _llama3(own: Tensor, config: RotaryConfig) -> Tensor:
    assert config.rotary_trained is not None
    slow, fast, factor = config.rotary_slow, config.rotary_fast, config.rotary_factor
    length = 2 * math.pi / own
    slowed = torch.where(length > config.rotary_trained / slow, own / factor, own)
    kept = (config.rotary_trained / length - slow) / (fast - slow)
    between = (length >= config.rotary_trained / fast) & (length <= config.rotary_trained / slow)
    return torch.where(between, (1 - kept) * slowed / factor + kept * slowed, slowed)


def _yarn(periods: Tensor, config: RotaryConfig, turning: int) -> Tensor:
    """The slope goes over the pairs by their number, between those that make `fast` and `slow` turns."""
    assert config.rotary_trained is not None

    def pair(turns: float) -> float:
        by_turns = math.log(config.rotary_trained / (turns * 2 * math.pi))  # pyright: ignore[reportOptionalOperand]
        return turning * by_turns / (2 * math.log(config.rotary_theta))

    low, high = pair(config.rotary_fast), pair(config.rotary_slow)
    if config.rotary_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, turning - 1)
    slope = (torch.arange(turning // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - slope.clamp(0, 1)
    return 1.0 / (config.rotary_factor * periods) * (1 - kept) + 1.0 / periods * kept
