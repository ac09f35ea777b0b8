"""What a linear recurrence keeps and writes at each token: its decays, bounded, and its β (mixers.md, section 3.3)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.features import widened
from atma.mixers.recurrent_decays import DECAYS, DecayName, Sizes, Step
from atma.ops.rows import sigmoid

WriteName = Literal["none", "sigmoid", "biased", "step"]


class Gates(nn.Module):
    """log a, bounded by `max_half_life`, and β of x (B, T, D)."""

    def __init__(
        self, sizes: Sizes, decay: DecayName, write: WriteName, negative: bool, max_half_life: float, least: float
    ) -> None:
        super().__init__()
        self.decay = DECAYS[decay](sizes) if decay != "none" else None
        self.beta_proj = (
            Linear(sizes.width, sizes.heads, bias=write == "biased") if write in ("sigmoid", "biased") else None
        )
        self.most, self.least = max_half_life, least
        self.stretch = 2.0 if negative else 1.0
        self.steps = write == "step"

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Set what is no linear layer."""
        if isinstance(self.decay, Step):
            self.decay.init_weights(generator, self.least)
        elif self.decay is not None:
            self.decay.init_weights(generator)

    def forward(self, x: Tensor, steady: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """log a, (B, H, T) or (B, H, T, K), and β (B, H, T); None where nothing decays, and for β = 1."""
        if self.steps:
            assert isinstance(self.decay, Step)
            step = self.decay.step(x, steady)
            return self._bounded(self.decay.of_step(step)), step
        log_decay = None if self.decay is None else self._bounded(self.decay(x, steady))
        if self.beta_proj is None:
            return log_decay, None
        beta = sigmoid(widened(self.beta_proj(x)), steady).mT
        return log_decay, beta if self.stretch == 1 else self.stretch * beta

    def _bounded(self, log_decay: Tensor) -> Tensor:
        if self.decay is None or not self.decay.learned or math.isinf(self.most):
            return log_decay
        return log_decay.clamp(max=-math.log(2) / self.most)

    @torch.no_grad()
    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have."""
        if self.decay is None:
            return math.inf
        return self.most if self.decay.learned else self.decay.bound(head)
