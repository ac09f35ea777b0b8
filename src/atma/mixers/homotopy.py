"""Between softmax and polar attention: how a softmax checkpoint becomes a polar model (mixers.md, section 7.2).

One number, `mix`, goes from 0 to 1 while a model is converted. At 0 this is the checkpoint's softmax attention to the
last bit, at 1 it is polar attention with the checkpoint's scores; `fade` then takes the rotation out of queries and
keys. Both are buffers, so that they are saved with the model.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers import rotary
from atma.mixers.heads import Heads, Held
from atma.mixers.polar import PolarConfig
from atma.mixers.rope import RopeConfig, RopeCore, frequencies
from atma.mixers.softmax import SoftmaxCore
from atma.ops import paged, polar_attention
from atma.ops.backend import own_precision
from atma.ops.paged.pages import Pages
from atma.ops.polar import fold as polar_fold
from atma.ops.polar import statistics_of, temperature_and_floor, visible_range
from atma.ops.rows import rotate
from atma.strict import FOLLOWS, require

SCALARS = ("length_gain", "null_base", "null_slope", "magnitude_slope")


@dataclass(frozen=True)
class MixConfig:
    """Where between the two a core starts, and what bounds the count."""

    start_mix: float = 0.0
    """λ at the start: 0 for softmax, 1 for polar attention."""
    start_fade: float = 0.0
    """Share of the rotation that is taken away at the start."""
    count_limit: int | None = field(default=None, metadata=FOLLOWS)
    """Visible keys beyond which the null floor stays and the temperature grows `sharpening` times as fast."""
    sharpening: float = 2.0
    """As that of `PolarConfig`."""

    def check_mix(self) -> None:
        """ValueError names a value that is none of a mix's."""
        for name in ("start_mix", "start_fade"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        limit = self.count_limit
        require(limit is None or limit >= 1, "count_limit", limit, "at least 1, or left out")
        require(0 <= self.sharpening < math.inf, "sharpening", self.sharpening, "a finite number of at least 0")


@dataclass(frozen=True)
class RopeHomotopyConfig(MixConfig, RopeConfig):
    """Those of a rope layer, and the mix."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mix()


@dataclass(frozen=True)
class RotaryHomotopyConfig(MixConfig, rotary.RotaryConfig):
    """Those of a rotary layer, and the mix."""

    rotary_canon: bool = False
    """Canon on q, k and v, which takes over what the rotation tells of the order of near tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_mix()


class Homotopy(SoftmaxCore):
    """A softmax core on its way to polar attention. Another class gives it its scores, their `scale` and positions."""

    vectors = ("null_value",)
    plain_softmax = False
    mix: Tensor
    fade: Tensor
    length_gain: nn.Parameter
    null_base: nn.Parameter
    null_slope: nn.Parameter
    magnitude_slope: nn.Parameter
    log_radius: nn.Parameter

    def begin(self, config: MixConfig, heads: Heads) -> None:
        """Add polar attention's parameters, the radius of each head's reads, and the two buffers."""
        self.count_limit, self.sharpening = config.count_limit, config.sharpening
        for name in (*SCALARS, "log_radius"):
            setattr(self, name, nn.Parameter(torch.empty(heads.heads)))
        self.null_value = nn.Parameter(torch.empty(heads.heads, heads.head_width))
        self.count_proj = Linear(heads.heads, heads.place.width)
        self.register_buffer("mix", torch.tensor(float(config.start_mix)))
        self.register_buffer("fade", torch.tensor(float(config.start_fade)))

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Core.init_weights`: polar attention's initial values; a radius of √K, as it has."""
        initial = PolarConfig()
        for name in SCALARS:
            nn.init.constant_(getattr(self, name), getattr(initial, name))
        nn.init.constant_(self.log_radius, math.log(self.null_value.shape[1]) / 2)
        nn.init.zeros_(self.null_value)
        init_linear(self.count_proj, generator, zero=True)

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`Core.forward`."""
        mix = float(self.mix)
        if mix == 0:
            return super().forward(q, k, v, start, segment_ids)
        if mix < 1:
            if isinstance(k, Pages) and isinstance(v, Pages):
                assert start is not None
                k, v, start = paged.gather(k, v, start, q.shape[2], self.window)
            assert isinstance(k, Tensor) and isinstance(v, Tensor)
            visible = visible_range(q, start, segment_ids, self.window)
            read, magnitude = self.between(q, k, v, visible, mix)
        else:
            read, magnitude = self.polar(q, k, v, start, segment_ids)
        return read, self.count_proj(magnitude.mT)

    def polar(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What is read (B, H, T, K) at λ = 1, and its magnitude (B, H, T): polar attention, scaled as here."""
        q = q * (self.scale * q.shape[-1] ** 0.5)
        scalars = (self.length_gain, self.null_base, self.null_slope, self.magnitude_slope, self.null_value)
        if isinstance(k, Pages) and isinstance(v, Pages):
            c, magnitude = paged.polar_attention(
                q, k, v, scalars, start, self.window, self.count_limit, self.sharpening
            )
        else:
            assert isinstance(k, Tensor) and isinstance(v, Tensor)
            window, limit, sharpening = self.window, self.count_limit, self.sharpening
            c, magnitude = polar_attention(q, k, v, *scalars, start, segment_ids, window, limit, sharpening)
        return c * self.log_radius.exp().to(c.dtype)[:, None, None], magnitude

    @own_precision
    def between(
        self, q: Tensor, k: Tensor, v: Tensor, visible: tuple[Tensor, Tensor], mix: float
    ) -> tuple[Tensor, Tensor]:
        """What is read (B, H, T, K) at 0 < λ < 1, and its magnitude (B, H, T)."""
        first, last = visible
        scale, null_logit = self._scale_and_null(q, last - first, mix)
        S, L, Q, M = statistics_of("auto", q)(q, k, v, scale, first, last)
        slope, null_value = self.magnitude_slope.to(L.dtype), self.null_value.to(L.dtype)
        radius = self.log_radius.to(L.dtype).exp()
        read, magnitude = fold_between((S, L, Q), null_logit - M, slope, null_value, radius, mix)
        return read.to(q.dtype), magnitude.to(q.dtype)

    def _scale_and_null(self, q: Tensor, count: Tensor, mix: float) -> tuple[Tensor, Tensor]:
        """Scores' factor t_λ · scale and the null's logit t_λ ν + log λ, (B, H, T), for λ > 0."""
        count = count.to(torch.promote_types(q.dtype, torch.float32))
        scalars = self.length_gain, self.null_base, self.null_slope
        whole, floor = temperature_and_floor(count, *scalars, self.count_limit, self.sharpening)
        temperature = 1 + mix * (whole - 1)
        return temperature * self.scale, temperature * floor + math.log(mix)

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Core.scale_and_null`."""
        mix = float(self.mix)
        return super().scale_and_null(q, count) if mix == 0 else self._scale_and_null(q, count, mix)

    def toward_own(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, own: tuple[Tensor, Tensor], strength: Tensor
    ) -> tuple[Tensor, None]:
        """`Core.toward_own`, at λ = 0 alone."""
        if float(self.mix) != 0:
            raise NotImplementedError("attention between softmax and polar has no map of weights that could be moved")
        return super().toward_own(q, k, v, start, own, strength)

    def channels(self) -> dict[str, nn.Linear]:
        """`Core.channels`."""
        return {"count": self.count_proj}

    def steady(self, on: bool = True) -> bool:
        """`Core.steady`: at either end; between them the sums are folded by operations of any order."""
        return float(self.mix) in (0.0, 1.0)


class RopeHomotopy(Homotopy, RopeCore):
    """From rotary softmax attention, the control called rope, to polar attention."""

    Config = RopeHomotopyConfig

    def __init__(self, config: RopeHomotopyConfig, heads: Heads) -> None:
        super().__init__(config, heads)  # pyright: ignore[reportArgumentType]
        self.begin(config, heads)

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """`Core.turned`: by angles times 1 − fade."""
        fade = float(self.fade)
        if fade == 0:
            return super().turned(x, position)
        if fade == 1:
            return x
        return rotate(x, position, frequencies(self.config, self.head_width, x.device) * (1 - fade))


class RotaryHomotopy(Homotopy, rotary.RotaryCore):
    """From softmax attention over rotary positions, as public checkpoints have it, to polar attention."""

    Config = RotaryHomotopyConfig

    def __init__(self, config: RotaryHomotopyConfig, heads: Heads) -> None:
        super().__init__(config, heads)  # pyright: ignore[reportArgumentType]
        self.begin(config, heads)

    @classmethod
    def canon(cls, config: RotaryHomotopyConfig) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Core.canon`."""
        return config.rotary_canon

    def turned(self, x: Tensor, position: Tensor) -> Tensor:
        """`Core.turned`: by angles times 1 − fade."""
        fade = float(self.fade)
        if fade == 1 or self.turning == 0:
            return x
        if fade == 0:
            return super().turned(x, position)
        angles = -rotary.frequencies(self.config, self.turning).to(x.device) * (1 - fade)
        turned = rotate(x[..., : self.turning], position, angles) * rotary.gain_of(self.config) ** (1 - fade)
        return torch.cat([turned, x[..., self.turning :]], -1)


def fold_between(
    sums: tuple[Tensor, Tensor, Tensor],
    null_logit: Tensor,
    magnitude_slope: Tensor,
    null_value: Tensor,
    radius: Tensor,
    mix: float,
) -> tuple[Tensor, Tensor]:
    """read = (d/‖d‖) ‖d‖^(1−λ) ϱ^λ (…, K) for 0 < λ < 1, and the magnitude (…) (mixers.md, formula 7.2).

    sums: S (B, H, T, K), L and Q (B, H, T) as `statistics_of` gives them, and null_logit relative to their maximum M;
    magnitude_slope and radius (H,), null_value (H, K).
    """
    S, L, Q = sums
    shift = null_logit.detach().clamp(min=0)
    small, null = (-shift).exp(), (null_logit - shift).exp()
    d = S * small[..., None] + null[..., None] * null_value[:, None]
    size = torch.linalg.vector_norm(d, dim=-1) / (L * small + null)
    c, magnitude = polar_fold(S, L, Q, null_logit, magnitude_slope, null_value)
    length = size.clamp(min=1e-6) ** (1 - mix) * radius[:, None] ** mix
    return c * length[..., None], magnitude


__all__ = [
    "Homotopy",
    "MixConfig",
    "RopeHomotopy",
    "RopeHomotopyConfig",
    "RotaryHomotopy",
    "RotaryHomotopyConfig",
    "fold_between",
]
