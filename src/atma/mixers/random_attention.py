"""Attention whose queries and keys are never learned: frozen Gaussian projections (2307.11353; mixers.md, section 5.6).

Only values and the output are learned. The score is a softmax, or the mean of what is positive; `identity` adds the
match of the inputs themselves, which is what weights with a mean that is not zero bring.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.layers import init_linear
from atma.mixers.base import Place
from atma.mixers.heads import Attended
from atma.mixers.held import State
from atma.mixers.plain_attention import PlainAttention, PlainConfig
from atma.ops.backend import own_precision
from atma.ops.paged import gather
from atma.ops.paged.pages import Pages
from atma.ops.polar import visible_range
from atma.ops.polar.poison import poisoned
from atma.strict import require

BLOCK = 128
"""Queries whose scores are computed together."""


@dataclass(frozen=True)
class RandomConfig(PlainConfig):
    """Heads, window, and the score."""

    score: Literal["softmax", "relu"] = "softmax"
    """"relu" is the mean over the keys seen of what is positive, times the value."""
    identity: float = 0.0
    """β: adds β x_i[h]·x_j[h]/√K to the score, x[h] the head's slice of the input."""
    projection_seed: int = 0
    """Of the frozen projections, beside the layer's number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.projection_seed < 2**32, "projection_seed", self.projection_seed, "of 32 bits, 0 or more")
        require(math.isfinite(self.identity), "identity", self.identity, "finite")
        groups = self.key_value_heads
        alike = self.identity == 0 or groups == self.query_heads
        require(alike, "key_value_heads", groups, f"query_heads = {self.query_heads} for identity")


class RandomQK(PlainAttention):
    """`PlainAttention` of the input, with W_q and W_k frozen at N(0, 1/D)."""

    Config = RandomConfig
    config: RandomConfig

    def __init__(self, config: RandomConfig, place: Place) -> None:
        super().__init__(config, place)
        generator = torch.Generator().manual_seed(1_000_003 * config.projection_seed + place.layer)
        for projection in (self.q_proj, self.k_proj):
            shape = projection.weight.shape
            del projection.weight
            frozen = torch.randn(shape, generator=generator) * place.width**-0.5
            projection.register_buffer("weight", frozen)
        if config.identity:
            inner = self.heads * config.head_width
            require(inner == place.width, "head_width", config.head_width, f"width {place.width} / query_heads")
            self.held_width = 2 * config.head_width

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Mixer.init_weights`, of what is learned."""
        init_linear(self.v_proj, generator)
        init_linear(self.out_proj, generator, zero=True)

    def project(self, source: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`PlainAttention.project`; with an identity [q, β x[h]], [k, x[h]] and [v, 0]."""
        q, k, v = super().project(source, x)
        if self.config.identity:
            own = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            q, k = torch.cat([q, self.config.identity * own], -1), torch.cat([k, own.to(k.dtype)], -1)
            v = F.pad(v, (0, v.shape[-1]))
        return q, k, v

    def read(self, q: Tensor, seen: Attended, segment_ids: Tensor | None) -> Tensor:
        """`PlainAttention.read`."""
        scale, window = self.config.head_width**-0.5, self.config.window
        if self.config.score == "softmax":
            read = super().read(q, seen, segment_ids)
        elif isinstance(seen.keys, Pages) and isinstance(seen.values, Pages):
            assert seen.start is not None
            k, v, start = gather(seen.keys, seen.values, seen.start, q.shape[2], window)
            read = mean_of_positive(q, k, v, scale, *visible_range(q, start, None, window))
        else:
            assert isinstance(seen.keys, Tensor) and isinstance(seen.values, Tensor)
            visible = visible_range(q, seen.start, segment_ids, window)
            read = mean_of_positive(q, seen.keys, seen.values, scale, *visible)
        return read[..., : self.config.head_width]

    def forward(
        self, x: Tensor, state: State | None = None, *, segment_ids: Tensor | None = None
    ) -> tuple[Tensor, State | None]:
        """x (B, T, D) to y (B, T, D)."""
        return self.attend(x, x, state, segment_ids)

    def steady(self, on: bool = True) -> bool:
        """`Mixer.steady`: that of softmax."""
        return self.config.score == "softmax" and super().steady(on)


@own_precision
def mean_of_positive(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor, last: Tensor) -> Tensor:
    """Σ_s relu(scale q·k_s) v_s / n over the n keys first ≤ s < last (B, T) that each query sees: (B, H, T, K).

    q (B, H, T, K), k and v (B, G, S, K). A key that is not finite spoils what sees it and nothing else. Scores are
    float32 or wider, of `BLOCK` queries at a time.
    """
    groups, work = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    spoilt = None
    if q.shape[2] > 1:
        bad, spoilt = poisoned(k, v, first, last)
        k, v = (x.masked_fill(bad.unsqueeze(-1), 0) for x in (k, v))
    place, reads = torch.arange(k.shape[2], device=k.device), []
    wide, k, v = q.to(work).unflatten(1, (groups, -1)), k.to(work).unsqueeze(2), v.to(work).unsqueeze(2)
    for some, begin, end in zip(wide.split(BLOCK, 3), first.split(BLOCK, 1), last.split(BLOCK, 1), strict=True):
        seen = ((place >= begin[..., None]) & (place < end[..., None]))[:, None, None]
        held = v if spoilt is not None else v.masked_fill(~seen.mT, 0)
        weight = (scale * some @ k.mT).relu().masked_fill(~seen, 0)
        reads.append(weight @ held / (end - begin)[:, None, None, :, None].to(work))
    read = torch.cat(reads, 3).flatten(1, 2).to(q.dtype)
    return (
        read
        if spoilt is None
        else read.masked_fill(spoilt.repeat_interleave(q.shape[1] // groups, 1).unsqueeze(-1), torch.nan)
    )


_TINY = {"query_heads": 2, "key_value_heads": 2, "head_width": 8}
SMALL = (
    {**_TINY, "identity": 0.5, "window": 7},
    {**_TINY, "score": "relu", "identity": -0.5},
    {**_TINY, "score": "relu", "key_value_heads": 1, "window": 7},
)
