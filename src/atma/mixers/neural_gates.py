"""What a neural memory makes of each token beside its key and value: γ, θ, η, δ and ω (mixers.md, section 4.9)."""

import functools
import math

import torch
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.features import widened
from atma.mixers.neural_config import NeuralConfig, stable
from atma.mixers.recurrent_decays import OPEN, Sizes, by_head, slow_logit, softplus
from atma.ops.fast_weights import Gates, Rule
from atma.ops.fast_weights.rule import HUBERS
from atma.ops.rows import sigmoid

RANK = 32
"""Of gates for each channel."""
FIRST = 1e-3
"""What a step without bounds starts from."""
ONE = math.log(math.e - 1)
"""sp⁻¹(1)."""


class Gate(nn.Module):
    """w x + b of each head (B, H, T), or of each of its parts (B, H, T, parts), float32 or wider."""

    def __init__(self, sizes: Sizes, parts: int | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.heads, self.parts = sizes.heads, parts
        self.down_proj = Linear(sizes.width, rank, bias=False) if rank else None
        self.proj = Linear(rank or sizes.width, sizes.heads * (parts or 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D)."""
        found = widened(self.proj(x if self.down_proj is None else self.down_proj(x)))
        return found.mT if self.parts is None else by_head(found, self.heads)


class Omega(Gate):
    """ω (B, H, T, c), the token's own first: σ(w x + b), each 1/c at the start, and ½ where c = 1."""

    def __init__(self, sizes: Sizes, window: int) -> None:
        super().__init__(sizes, window)

    def init_weights(self) -> None:
        """b = −log(c − 1), linear layers being set."""
        if self.parts is not None and self.parts > 1:
            nn.init.constant_(self.proj.bias, -math.log(self.parts - 1))

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Gate.forward`."""
        return sigmoid(super().forward(x), steady)


class NeuralGates(nn.Module):
    """γ by `log_keep`, and with it everything else, of a memory with fast weights."""

    def __init__(self, config: NeuralConfig, rule: Rule, sizes: Sizes, features: int) -> None:
        super().__init__()
        self.form, self.half_life = config.step_form, config.max_half_life
        self.most = config.most / (features if config.step_form == "ttt" else 1)
        parts, rank = (sizes.value_width, RANK) if rule.gates == "channel" else (None, None)
        self.keep = Gate(sizes, parts, rank) if config.forgets else None
        self.momentum = Gate(sizes, parts, rank) if rule.optimiser != "gd" else None
        self.step = Gate(sizes, rule.matrices if rule.gates == "matrix" else parts, rank)
        self.delta = Gate(sizes) if rule.bias in HUBERS else None
        self.omega = Omega(sizes, rule.window) if rule.window > 1 else None
        self.shares = self.omega is not None and math.isfinite(stable(config))
        """Whether the tokens of a window share the step, whose bound is that of a sum of gradients."""
        self.first_delta = delta_of(rule, sizes.value_width)

    def init_weights(self) -> None:
        """Set what does not start at zero, linear layers being set."""
        if self.omega is not None:
            self.omega.init_weights()

    def begin_slowly(self) -> None:
        """Let γ begin at `slow_logit`, all else being set."""
        if self.keep is not None:
            nn.init.constant_(self.keep.proj.bias, slow_logit(self.half_life) - OPEN)

    def log_keep(self, x: Tensor, steady: bool = False) -> Tensor | None:
        """log γ ≤ 0 (B, H, T), or (B, H, T, V), of σ(w x + b + 3.9) bounded by the half-life; None where γ = 1."""
        if self.keep is None:
            return None
        log_keep = -softplus(-(self.keep(x) + OPEN), steady)
        return log_keep if math.isinf(self.half_life) else log_keep.clamp(max=-math.log(2) / self.half_life)

    def forward(self, x: Tensor, log_keep: Tensor | None, steady: bool = False) -> Gates:
        """Of x (B, T, D) and what `log_keep` gave, or what a measurement made of it."""
        eta = None if self.momentum is None else sigmoid(self.momentum(x), steady)
        omega = None if self.omega is None else self.omega(x, steady)
        step = self._step(x, eta, steady)
        if omega is not None and self.shares:
            whole = functools.reduce(torch.add, omega.unbind(-1)) if steady else omega.sum(-1)
            whole = whole.clamp(min=1)
            step = step / (whole[..., None] if step.ndim > whole.ndim else whole)
        delta = None if self.delta is None else self.first_delta * softplus(self.delta(x) + ONE, steady)
        return Gates(step, None if log_keep is None else _exp(log_keep, steady), eta, delta, omega)

    def _step(self, x: Tensor, eta: Tensor | None, steady: bool) -> Tensor:
        """θ_max (1 − η) σ(…), base σ(…)/K′, or a softplus that starts at 10⁻³."""
        logits = self.step(x)
        if self.form == "softplus":
            return softplus(logits + inverse_softplus(FIRST), steady)
        theta = self.most * sigmoid(logits, steady)
        if eta is None or self.form == "ttt":
            return theta
        return theta * (1 - (eta[..., None] if theta.ndim > eta.ndim else eta))


def _exp(x: Tensor, steady: bool) -> Tensor:
    """e^x ≤ 1, which is σ(x)/σ(−x) where bits are to be a row's own."""
    return (sigmoid(x, True) / sigmoid(-x, True)).clamp(max=1) if steady else x.exp()


def delta_of(rule: Rule, width: int) -> float:
    """δ₀: as long as a value, whose coordinates have a mean square of 1 under a layer norm, or 1/V."""
    if rule.bias == "huber_coordinate":
        return 1.0 if rule.norm else width**-0.5
    return math.sqrt(width) if rule.norm else 1.0


def inverse_softplus(x: float) -> float:
    """sp⁻¹(x)."""
    return x + math.log(-math.expm1(-x))


__all__ = ["Gate", "NeuralGates", "Omega", "delta_of", "inverse_softplus"]
