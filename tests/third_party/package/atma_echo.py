"""A mixer that a package of its own brings: it looks back by small codes, and keeps a fading average beside that.

Each head gives a token a code of C numbers. The near read is the average of the codes so far, weighed by how well they
match the token's own; the far read is an average in which every token fades at the rate that later ones choose. So its
state has a field that grows, of three dimensions and a token's place in the second, and one that does not.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atma.layers import Linear
from atma.mixers import Mixer, Place
from atma.strict import check_fields, require


@dataclass(frozen=True)
class EchoConfig:
    """Sizes are counts."""

    echo_heads: int = 2
    code_width: int = 8
    fade_bias: float = 2.0
    """Of the logit of γ, which every token multiplies the average by."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("echo_heads", "code_width"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")


class EchoState(NamedTuple):
    """`length` tokens have been read."""

    length: Tensor  # (B,) int32
    codes: Tensor  # (B, capacity, H·C)
    average: Tensor  # (B, H, C)

    grows = {"codes": 1}  # noqa: RUF012


class Echo(Mixer):
    """y = near_proj(Σ_s softmax_s(c_t·c_s) c_s) + far_proj(m_t), m_t = γ_t m_{t−1} + (1 − γ_t) c_t, for each head."""

    Config = EchoConfig

    def __init__(self, config: EchoConfig, place: Place) -> None:
        super().__init__()
        self.config, self.heads = config, config.echo_heads
        inner = config.echo_heads * config.code_width
        self.code_proj = Linear(place.width, inner, bias=False)
        self.fade_proj = Linear(place.width, config.echo_heads)
        self.near_proj = Linear(inner, place.width)
        self.far_proj = Linear(inner, place.width)

    def init_state(self, batch: int, capacity: int) -> EchoState:
        weight, heads, width = self.code_proj.weight, self.heads, self.config.code_width
        length = torch.zeros(batch, dtype=torch.int32, device=weight.device)
        codes = weight.new_zeros(batch, capacity, heads * width)
        return EchoState(length, codes, weight.new_zeros(batch, heads, width))

    def log_decay(self, x: Tensor) -> Tensor:
        return F.logsigmoid(self.fade_proj(x) + self.config.fade_bias).mT

    def forward(
        self, x: Tensor, state: EchoState | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, EchoState | None]:
        batch, length, _ = x.shape
        flat = self.code_proj(x)
        own = flat.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, C)
        places = torch.arange(length, device=x.device)
        seen = (places <= places[:, None])[None]
        if segment_ids is not None:
            seen = seen & (segment_ids[:, :, None] == segment_ids[:, None])
        far = self._fade(own, self.log_decay(x), None if state is None else state.average, seen)
        codes, look = own, seen
        if state is not None:
            places = state.length[:, None] + places
            rows = torch.arange(batch, device=x.device)[:, None]
            held = state.codes.index_put((rows, places.long()), flat)
            codes = held.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            look = torch.arange(codes.shape[2], device=x.device) <= places[:, :, None]
        scores = (own @ codes.mT).masked_fill(~look[:, None], -torch.inf)
        near = scores.softmax(-1) @ codes
        y = self.near_proj(near.transpose(1, 2).flatten(2)) + self.far_proj(far.transpose(1, 2).flatten(2))
        if state is None:
            return y, None
        return y, EchoState(state.length + length, held, far[:, :, -1])

    def _fade(self, own: Tensor, log_decay: Tensor, average: Tensor | None, seen: Tensor) -> Tensor:
        """m (B, H, T, C): what each token leaves of itself, and of what was before the call, at each later one."""
        later = torch.ones_like(seen[0]).tril(-1)  # sums begin behind the token itself: nothing of before it is in them
        faded = log_decay[..., None].masked_fill(~later, 0).cumsum(-2)
        left = faded.masked_fill(~seen[:, None], -torch.inf).exp()
        made = left @ ((1 - log_decay.exp())[..., None] * own)
        return made if average is None else made + log_decay.cumsum(-1).exp()[..., None] * average[:, :, None]

    def channels(self) -> dict[str, nn.Linear]:
        return {"near": self.near_proj, "far": self.far_proj}


SMALL = ({"echo_heads": 2, "code_width": 4}, {"echo_heads": 1, "code_width": 3, "fade_bias": -1.0})
