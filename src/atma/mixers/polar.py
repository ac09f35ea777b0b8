"""Polar attention with its learned scalars; the count channel is projected here (maths.md, section 4)."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear, init_linear
from atma.mixers.heads import Core, Heads, Held
from atma.ops import paged, polar_attention
from atma.ops.chosen import Sums
from atma.ops.paged.pages import Pages
from atma.ops.polar import folded, logits_of, statistics_of, temperature_and_floor, visible_range
from atma.strict import FOLLOWS, check_fields, require


@dataclass(frozen=True)
class PolarConfig:
    """Initial values of the scalars, and what bounds the count."""

    count_limit: int | None = field(default=None, metadata=FOLLOWS)
    """Visible keys beyond which a polar layer's null floor stays and its temperature grows `sharpening` times as fast;
    None is the published form, both growing on. At the training length it changes nothing in training."""
    sharpening: float = 2.0
    """Growth of a polar layer's temperature with ln n beyond `count_limit`, relative to its growth before."""
    direction_radius: float | None = None
    """Length of the direction a polar layer hands on; None is sqrt(head_width), 1.0 is the published form."""
    length_gain: float = -1.0
    """Initial value: how fast the temperature grows with ln n (maths.md, section 4)."""
    null_base: float = 2.0
    """Initial value of the null floor, the logit that the null sink has."""
    null_slope: float = 0.5
    """Initial value: how fast the null floor grows with √ln(n + 1)."""
    magnitude_slope: float = -1.5
    """Initial value: how fast the magnitude grows with the number of keys that match."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("length_gain", "null_base", "null_slope", "magnitude_slope"):
            require(math.isfinite(getattr(self, name)), name, getattr(self, name), "finite")
        limit, radius = self.count_limit, self.direction_radius
        require(limit is None or limit >= 1, "count_limit", limit, "at least 1, or left out")
        require(0 <= self.sharpening < math.inf, "sharpening", self.sharpening, "a finite number of at least 0")
        require(radius is None or radius > 0, "direction_radius", radius, "positive, or left out")


class PolarCore(Core):
    """A direction that ignores how many keys matched, and a bounded magnitude in a channel of its own."""

    Config = PolarConfig

    def __init__(self, config: PolarConfig, heads: Heads) -> None:
        super().__init__(heads)
        self.config = config
        self.length_gain = nn.Parameter(torch.empty(heads.heads))
        self.null_base = nn.Parameter(torch.empty(heads.heads))
        self.null_slope = nn.Parameter(torch.empty(heads.heads))
        self.magnitude_slope = nn.Parameter(torch.empty(heads.heads))
        self.null_value = nn.Parameter(torch.empty(heads.heads, heads.head_width))
        self.count_proj = Linear(heads.heads, heads.place.width)
        radius = config.direction_radius
        self.radius = math.sqrt(heads.head_width) if radius is None else radius
        self.count_limit, self.sharpening = config.count_limit, config.sharpening

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Core.init_weights`."""
        for name in ("length_gain", "null_base", "null_slope", "magnitude_slope"):
            nn.init.constant_(getattr(self, name), getattr(self.config, name))
        nn.init.zeros_(self.null_value)
        init_linear(self.count_proj, generator, zero=True)

    def attend(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Direction (B, H, T, K), before the radius, and magnitude (B, H, T)."""
        scalars = (self.length_gain, self.null_base, self.null_slope, self.magnitude_slope, self.null_value)
        if isinstance(k, Pages) and isinstance(v, Pages):
            return paged.polar_attention(q, k, v, scalars, start, self.window, self.count_limit, self.sharpening)
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return polar_attention(q, k, v, *scalars, start, segment_ids, self.window, self.count_limit, self.sharpening)

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """`Core.forward`."""
        direction, magnitude = self.attend(q, k, v, start, segment_ids)
        return direction * self.radius, self.count_proj(magnitude.mT)

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """`Core.scale_and_null`: temperature / √K, and temperature · floor."""
        count = count.to(torch.promote_types(q.dtype, torch.float32))
        scalars = self.length_gain, self.null_base, self.null_slope
        temperature, floor = temperature_and_floor(count, *scalars, self.count_limit, self.sharpening)
        return temperature * q.shape[-1] ** -0.5, temperature * floor

    def scored(self, q: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """`Core.scored`, compiled where it can be."""
        scalars = self.length_gain, self.null_base, self.null_slope
        return logits_of(q, last, scalars, self.count_limit, self.sharpening)

    def assemble(self, sums: Sums, null: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`Core.assemble`."""
        assert null is not None
        return self.handed(*folded(sums, null, self.magnitude_slope, self.null_value), dtype)

    def handed(self, direction: Tensor, magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`Core.handed`."""
        return (direction * self.radius).to(dtype), self.count_proj(magnitude.to(dtype).mT)

    def toward_own(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, own: tuple[Tensor, Tensor], strength: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`Core.toward_own`: the null's weight is of the map too; direction and magnitude are made of the moved map."""
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        work, group = torch.promote_types(q.dtype, torch.float32), q.shape[1] // own[0].shape[1]
        key, value = (x.to(work).repeat_interleave(group, 1) for x in own)
        first, last = visible_range(q, start, None, self.window)
        scale, null_logit = self.scale_and_null(q, (last - first).to(work))
        S, L, Q, M = statistics_of("auto", q)(q, k, v, scale, first, last)
        total = torch.logaddexp(M + L.log(), null_logit)  # of all weights before they are normalised
        share, null = (M - total).exp(), (null_logit - total).exp()
        own_weight = ((q.to(work) * key).sum(-1) * scale - total).exp()
        s = strength.to(work)[:, None]
        d = (S * share[..., None] + null[..., None] * self.null_value.to(work)[:, None]).lerp(value, s[..., None])
        c = d / torch.linalg.vector_norm(d, dim=-1, keepdim=True).clamp(min=1e-6)
        real = (1 - s) * L * share + s
        squares = (1 - s) ** 2 * Q * share**2 + 2 * s * (1 - s) * own_weight + s**2
        effective = real**3 / squares  # n_eff (1 − w_N)
        magnitude = torch.tanh(F.softplus(self.magnitude_slope.to(work))[:, None] * effective.log1p())
        return (c * self.radius).to(q.dtype), self.count_proj(magnitude.to(q.dtype).mT)

    def channels(self) -> dict[str, nn.Linear]:
        """`Core.channels`."""
        return {"count": self.count_proj}

    def steady(self, on: bool = True) -> bool:
        """`Core.steady`: compiled, it is as it is."""
        return True
