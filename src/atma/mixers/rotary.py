"""Rotary positions, and the ways to stretch those of a trained model over texts longer than it was trained on.

Position interpolation (arXiv 2306.15595) turns every pair s times more slowly. YaRN (arXiv 2309.00071) leaves alone the
pairs that make more than `SHORT` turns over the trained length, slows by s those that make less than `LONG`, mixes the
two between, and makes the attention's logits (0.1 ln s + 1)² times as large.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from atma.model_config import ModelConfig, RopeScaling
from atma.ops.rows import rotate

SCALE = 0.12
"""Of a rope layer's logits."""
LONG, SHORT = 1.0, 32.0
"""Turns over the trained length between which YaRN goes from slowing a pair to leaving it alone: its α and β."""


class Rotary(nn.Module):
    """Rotation of the first K/4 frequency pairs by position, the others left alone (maths.md, section 3)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        """x (B, H, T, K), position (B or 1, T) int. Angles are computed in float64: positions reach a million."""
        return rotate(x, position, frequencies(self.config, x.device))


def frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Angle a token of each turning pair (K/4,) float64, stretched as the configuration says."""
    pairs = config.head_width // 4
    own = (1 / 1024) ** torch.linspace(0, 1, pairs, dtype=torch.float64, device=device)
    if config.rope_scaling == "none":
        return own
    slowed = own / config.rope_factor
    if config.rope_scaling == "linear":
        return slowed
    assert config.rope_trained is not None
    turns = config.rope_trained * own / (2 * math.pi)
    kept = ((turns - LONG) / (SHORT - LONG)).clamp(0, 1)
    return kept * own + (1 - kept) * slowed


def logit_scale(config: ModelConfig) -> float:
    """What a rope layer multiplies its scores by."""
    if config.rope_scaling != "yarn":
        return SCALE
    return SCALE * (0.1 * math.log(config.rope_factor) + 1) ** 2


def stretched(config: ModelConfig, kind: RopeScaling, trained: int, factor: float) -> ModelConfig:
    """The configuration of the same weights with positions stretched `factor` times beyond the trained length."""
    return replace(config, rope_scaling=kind, rope_trained=trained, rope_factor=float(factor))
