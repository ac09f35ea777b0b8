"""How long a linear recurrence keeps what it holds, and the sizes of one (mixers.md, section 3.3).

Each kind of decay is a module that gives log a ≤ 0 of x (B, T, D): (B, H, T), or (B, H, T, K) for each key channel, in
float32 or wider.
"""

import math
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers.base import Place
from atma.mixers.features import widened
from atma.ops.rows import log_sigmoid, sigmoid

DecayName = Literal["none", "lightning", "retnet", "sigmoid", "low_rank", "floor", "step", "channel_step"]
SHORTEST, LONGEST = 1e-3, 0.1
"""Bounds of the step Δ that decays start from, drawn evenly on a logarithmic scale."""
LOW_RANK = 16
"""Of GLA's decays."""
OPEN = 3.9
"""Added to the logit of `delta_memory`'s decay."""
SLOW = 560.0
"""Half-life, in tokens, of a decay that begins slowly."""


class Sizes(NamedTuple):
    """H, K and V of a recurrence in a stream of width D, and where it stands."""

    place: Place
    heads: int
    key_width: int
    value_width: int

    @property
    def width(self) -> int:
        """D."""
        return self.place.width


class Decay(nn.Module):
    """log a of x."""

    learned: ClassVar[bool] = True

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes

    def init_weights(self, generator: torch.Generator | None) -> None:
        """Set what is no linear layer."""

    def begin_slowly(self, most: float) -> None:
        """Let learned half-lives, of at most `most` tokens, begin at tens to hundreds, all else being set."""

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """log a."""
        raise NotImplementedError(f"{type(self).__name__} decays nothing")

    def bound(self, head: int) -> float:
        """The longest half-life, in tokens, that a head can have."""
        return math.inf


class Fixed(Decay):
    """A number for each head, that nothing learns."""

    learned = False

    def rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """log a (H,)."""
        raise NotImplementedError(f"{type(self).__name__} has no decays")

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        rates = self.rates(torch.promote_types(x.dtype, torch.float32), x.device)
        return rates[None, :, None].expand(x.shape[0], -1, x.shape[1])

    def bound(self, head: int) -> float:
        """`Decay.bound`."""
        return -math.log(2) / float(self.rates(torch.float64, torch.device("cpu"))[head])


class Lightning(Fixed):
    """−2^(−8h/H) (1 − l/(N − 1) + 1e-5), h from 1, of layer l of N (2405.17381)."""

    def rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`Fixed.rates`."""
        place = self.sizes.place
        share = 1 - place.layer / (place.layers - 1) if place.layers > 1 else 1.0
        h = torch.arange(1, self.sizes.heads + 1, dtype=dtype, device=device)
        return -(share + 1e-5) * (-8 / self.sizes.heads * h).exp2()


class Retnet(Fixed):
    """log(1 − 2^(−5 − h)), h from 0 (2307.08621)."""

    def rates(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`Fixed.rates`."""
        h = torch.arange(self.sizes.heads, dtype=dtype, device=device)
        return (-((-5 - h).exp2())).log1p()


class Sigmoid(Decay):
    """log σ(w x + b + 3.9) of each head (maths.md, section 5)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.proj = Linear(sizes.width, sizes.heads)

    def begin_slowly(self, most: float) -> None:
        """`Decay.begin_slowly`: at `slow_logit`."""
        nn.init.constant_(self.proj.bias, slow_logit(most) - OPEN)

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        return log_sigmoid(widened(self.proj(x)) + OPEN, steady).mT


class LowRank(Decay):
    """log σ(W₂W₁x + b) / 16 of each channel (GLA, 2312.06635)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.down_proj = Linear(sizes.width, LOW_RANK, bias=False)
        self.up_proj = Linear(LOW_RANK, sizes.heads * sizes.key_width)

    def begin_slowly(self, most: float) -> None:
        """`Decay.begin_slowly`: at `slow_logit`."""
        nn.init.constant_(self.up_proj.bias, slow_logit(most, 16))

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        rates = log_sigmoid(widened(self.up_proj(self.down_proj(x))), steady) / 16
        return by_head(rates, self.sizes.heads)


class Floor(Decay):
    """log(λ + (1 − λ) σ(W_f x)) of each channel, with a floor λ that rises over the layers (HGRN-2, 2404.07904).

    Row l of one table Λ of the model belongs to the l-th of its N such layers: λ_l = Σ_{1≤i≤l} softmax(Λ)_i. The first
    has no floor, and where it is the only one there is no table.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        place, inner = sizes.place, sizes.heads * sizes.key_width
        self.forget_proj = Linear(sizes.width, inner, bias=False)
        self.table = nn.Parameter(torch.empty(place.alike, inner)) if place.alike > 1 else None

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Decay.init_weights`."""
        if self.table is not None:
            nn.init.zeros_(self.table)

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        rates, layer = log_sigmoid(widened(self.forget_proj(x)), steady), self.sizes.place.among
        if layer and self.table is not None:
            table = self.table.to(rates.dtype)
            whole, below = table.logsumexp(0), table[1 : layer + 1].logsumexp(0)
            above = torch.cat([table[:1], table[layer + 1 :]]).logsumexp(0)
            # log(λ + (1 − λ) σ(f)) = log λ + softplus(log(1 − λ) + log σ(f) − log λ).
            # An open gate is log 1, which rounding must not lift above 0.
            rates = ((below - whole) + softplus(rates + (above - below), steady)).clamp(max=0)
        return by_head(rates, self.sizes.heads)


class Step(Decay):
    """−e^A Δ of each head, Δ = softplus(W x + b) (Mamba-2, 2405.21060; gated DeltaNet, 2412.06464)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        self.step_proj = Linear(sizes.width, sizes.heads, bias=False)
        self.rate = nn.Parameter(torch.empty(sizes.heads))
        self.bias = nn.Parameter(torch.empty(sizes.heads))

    def init_weights(self, generator: torch.Generator | None, least: float = 0.0) -> None:
        """`Decay.init_weights`: A = log U(least, 16), U at least 1e-4, and Δ = softplus(b) in [1e-3, 0.1]."""
        init_rate(self.rate, generator, least)
        init_step(self.bias, generator)

    def begin_slowly(self, most: float) -> None:
        """`Decay.begin_slowly`: at 7 to 690."""
        nn.init.zeros_(self.rate)

    def step(self, x: Tensor, steady: bool = False) -> Tensor:
        """Δ (B, H, T)."""
        return softplus(widened(self.step_proj(x)) + self.bias, steady).mT

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        return self.of_step(self.step(x, steady))

    def of_step(self, step: Tensor) -> Tensor:
        """−e^A Δ of Δ (B, H, T)."""
        return -self.rate.to(step.dtype).exp()[:, None] * step


class ChannelStep(Decay):
    """−e^A softplus(W₂W₁x + b) of each channel, A of each head, of rank V (Kimi Linear, KDA)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes)
        inner = sizes.heads * sizes.key_width
        self.down_proj = Linear(sizes.width, sizes.value_width, bias=False)
        self.up_proj = Linear(sizes.value_width, inner, bias=False)
        self.rate, self.bias = nn.Parameter(torch.empty(sizes.heads)), nn.Parameter(torch.empty(inner))

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Decay.init_weights`."""
        init_rate(self.rate, generator, 1.0)
        init_step(self.bias, generator)

    def begin_slowly(self, most: float) -> None:
        """`Decay.begin_slowly`: at 7 to 690."""
        nn.init.zeros_(self.rate)

    def forward(self, x: Tensor, steady: bool = False) -> Tensor:
        """`Decay.forward`."""
        steps = softplus(widened(self.up_proj(self.down_proj(x))) + self.bias, steady)
        return -self.rate.to(steps.dtype).exp()[:, None, None] * by_head(steps, self.sizes.heads)


def slow_logit(most: float, parts: int = 1) -> float:
    """b of σ(b)^(1/parts) = 2^(−1/h), h `SLOW` or half the bound `most` if that is less: at it nothing is learned."""
    return -math.log(math.expm1(parts * math.log(2) / min(SLOW, most / 2)))


def softplus(x: Tensor, steady: bool) -> Tensor:
    """log(1 + e^x)."""
    return -log_sigmoid(-x, steady)


def silu(x: Tensor, steady: bool) -> Tensor:
    """x σ(x)."""
    return x * sigmoid(x, steady) if steady else F.silu(x)


def by_head(x: Tensor, heads: int) -> Tensor:
    """x (B, T, H·K) as (B, H, T, K)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def init_rate(rate: Tensor, generator: torch.Generator | None, least: float) -> None:
    """A = log U(least, 16)."""
    rate.copy_(nn.init.uniform_(rate, least, 16.0, generator=generator).clamp(min=1e-4).log())


def init_step(bias: Tensor, generator: torch.Generator | None) -> None:
    """b such that softplus(b) lies evenly, on a logarithmic scale, between `SHORTEST` and `LONGEST`."""
    step = nn.init.uniform_(bias, math.log(SHORTEST), math.log(LONGEST), generator=generator).exp()
    bias.copy_(step.expm1().log())


DECAYS: dict[str, type[Decay]] = {
    "lightning": Lightning,
    "retnet": Retnet,
    "sigmoid": Sigmoid,
    "low_rank": LowRank,
    "floor": Floor,
    "step": Step,
    "channel_step": ChannelStep,
}
