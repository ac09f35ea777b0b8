"""Softmax attention that also sees learned keys and values, at every token: persistent rows (mixers.md, section 4.11).

They stand before every text, are no token's and have no position, so that they are in no state. They are one more part
of the softmax over the visible keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atma.mixers.heads import Heads, Held
from atma.mixers.softmax import SoftmaxConfig, SoftmaxCore
from atma.ops import paged
from atma.ops.backend import own_precision
from atma.ops.paged.pages import Pages
from atma.ops.polar import statistics_of, visible_range
from atma.strict import check_fields, require

DEVIATION = 0.02
"""Of the entries of a row at the start."""


@dataclass(frozen=True)
class PersistentConfig(SoftmaxConfig):
    """How many there are."""

    persistent: int = 4
    """N_p, learned keys and values of each key head."""

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.persistent >= 1, "persistent", self.persistent, 'at least 1, or core = "nope" for none')


class PersistentCore(SoftmaxCore):
    """softmax(scale · q [persistent keys; k]ᵀ) [persistent values; v]."""

    Config = PersistentConfig
    plain_softmax = False
    vectors = ("persistent_keys", "persistent_values")

    def __init__(self, config: PersistentConfig, heads: Heads) -> None:
        super().__init__(config, heads)
        shape = heads.groups, config.persistent, heads.head_width
        self.persistent_keys, self.persistent_values = (nn.Parameter(torch.empty(shape)) for _ in "kv")

    def init_weights(self, generator: torch.Generator | None) -> None:
        """`Core.init_weights`."""
        for rows in (self.persistent_keys, self.persistent_values):
            nn.init.normal_(rows, 0.0, DEVIATION, generator=generator)

    def forward(
        self, q: Tensor, k: Held, v: Held, start: Tensor | None, segment_ids: Tensor | None
    ) -> tuple[Tensor, None]:
        """`Core.forward`."""
        if isinstance(k, Pages) and isinstance(v, Pages):
            assert start is not None
            k, v, start = paged.gather(k, v, start, q.shape[2], self.window)
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        return self.over(q, k, v, *visible_range(q, start, segment_ids, self.window)), None

    @own_precision
    def over(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
        """What q (B, H, T, K) reads (B, H, T, K) of the keys first ≤ s < last (B, T) of k and v (B, G, S, K)."""
        scale, _ = super().scale_and_null(q, last)
        S, L, _, M = statistics_of("auto", q)(q, k, v, scale, first, last)
        own = self._scores(q)
        most = torch.maximum(M, own.detach().amax(-1))
        p, part = (own - most[..., None]).exp(), (M - most).exp()
        values = self.persistent_values.to(p.dtype).repeat_interleave(q.shape[1] // k.shape[1], 0)
        return ((S * part[..., None] + p @ values) / (L * part + p.sum(-1))[..., None]).to(q.dtype)

    @own_precision
    def _scores(self, q: Tensor) -> Tensor:
        """Logits (B, H, T, N_p) of the persistent rows, float32 or wider."""
        q = q.to(torch.promote_types(q.dtype, torch.float32))
        keys = self.persistent_keys.to(q.dtype)
        return self.scale * (q @ keys.repeat_interleave(q.shape[1] // len(keys), 0).mT)

    def scale_and_null(self, q: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`Core.scale_and_null`: the persistent rows together are what takes weight from the keys."""
        return super().scale_and_null(q, count)[0], self._scores(q).logsumexp(-1)

    def steady(self, on: bool = True) -> bool:
        """`Core.steady`: there is no such form."""
        return False
